"""What owners and a VIOS say to each other beside NBD's commands: export names and refusals. Pure.

Export names: `VOLUME@EPOCH` for an owner who has made no claim, `VOLUME@EPOCH:OWNER` for one who has,
`VOLUME@EPOCH:OWNER:LEASE` where its writes stop with a lease, `VOLUME` for a read-only view. `VOLUME/DEVICE`
in its place names the replica on one device, by the device's identifier, where the VIOS may reach several.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from farpage.definition.model import NUMBER_MAX
from farpage.device.errors import VolumeFenced
from farpage.errors import FarpageError, InvalidInput

_EXPORT = re.compile(
    r"([a-z0-9][a-z0-9._-]{0,62})(?:/([a-z0-9][a-z0-9-]{0,62}))?"
    r"(?:@([1-9][0-9]{0,15})(?::([0-9a-f]{16})(?::([0-9a-f]{16}))?)?)?"
)


@dataclass(frozen=True)
class ExportName:
    """A volume, and the epoch of the owner who opens it; None for a read-only view.

    `owner` is the token of the owner's claim, `lease` the identifier of a lease, `device` that of
    the replica's device; empty for none.
    """

    volume: str
    epoch: int | None
    owner: str = ""
    lease: str = ""
    device: str = ""

    def __str__(self) -> str:
        volume = f"{self.volume}/{self.device}" if self.device else self.volume
        if self.epoch is None:
            return volume
        return ":".join(filter(None, (f"{volume}@{self.epoch}", self.owner, self.lease)))


def parse_export_name(text: str) -> ExportName:
    """Parse what an NBD client asks for.

    :raise InvalidInput: it is no export name.
    """
    match = _EXPORT.fullmatch(text)
    epoch = int(match[3]) if match and match[3] else None
    if match is None or (epoch or 0) > NUMBER_MAX:
        raise InvalidInput(
            "export",
            f"{text[:80]!r} is no export name",
            "ask for VOLUME@EPOCH or VOLUME@EPOCH:OWNER, or for VOLUME to read only",
        )
    return ExportName(match[1], epoch, match[4] or "", match[5] or "", match[2] or "")


def refusal_text(error: FarpageError) -> str:
    """Say why an export is refused; `farpage.volume.refusal` reads what is for machines."""
    if isinstance(error, VolumeFenced):
        return f"{error.code} {error.current}: {error.cause}"
    return error.cause
