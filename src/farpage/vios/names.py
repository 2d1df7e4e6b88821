"""Export names: `VOLUME@EPOCH` for its owner, `VOLUME` for a read-only view. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass

from farpage.definition.model import NUMBER_MAX
from farpage.errors import InvalidInput

_EXPORT = re.compile(r"([a-z0-9][a-z0-9._-]{0,62})(?:@([1-9][0-9]{0,15}))?")


@dataclass(frozen=True)
class ExportName:
    """A volume, and the epoch of the owner who opens it; None for a read-only view."""

    volume: str
    epoch: int | None

    def __str__(self) -> str:
        return self.volume if self.epoch is None else f"{self.volume}@{self.epoch}"


def parse_export_name(text: str) -> ExportName:
    """Parse what an NBD client asks for.

    :raise InvalidInput: it is no export name.
    """
    match = _EXPORT.fullmatch(text)
    epoch = int(match[2]) if match and match[2] else None
    if match is None or (epoch or 0) > NUMBER_MAX:
        raise InvalidInput(
            "export", f"{text[:80]!r} is no export name", "ask for VOLUME@EPOCH, or VOLUME to read only"
        )
    return ExportName(match[1], epoch)
