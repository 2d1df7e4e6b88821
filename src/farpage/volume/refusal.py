"""What a VIOS means when it refuses to open a volume. No I/O.

A refusal that has to do with ownership begins with its code and the epoch of the present owner, as in
`another_owner 7: volume 'vm1': ...`; `farpage.vios.names` writes it.
"""

from __future__ import annotations

import enum
import re
from dataclasses import dataclass

from farpage.nbd.errors import ServerRefused

_REFUSAL = re.compile(r"(another_owner|stale_epoch) ([0-9]{1,20}): (.*)", re.DOTALL)


class RefusalKind(enum.StrEnum):
    """Who has the volume instead."""

    ANOTHER_OWNER = "another_owner"
    """Somebody else has claimed it: do not come back."""
    STALE_EPOCH = "stale_epoch"
    """This very owner, under a newer epoch: come back under that."""


@dataclass(frozen=True)
class Refusal:
    """A refusal that has to do with ownership, with the epoch of the present owner."""

    kind: RefusalKind
    epoch: int
    message: str


def refusal_of(error: Exception) -> Refusal | None:
    """Read a refusal; None for an error that has nothing to do with ownership."""
    match = _REFUSAL.fullmatch(error.reason) if isinstance(error, ServerRefused) else None
    return Refusal(RefusalKind(match[1]), int(match[2]), match[3]) if match else None
