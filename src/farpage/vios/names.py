"""What owners and a VIOS say to each other beside NBD's commands: export names and refusals. Pure.

Export names: `VOLUME@EPOCH` for an owner who has made no claim, `VOLUME@EPOCH:OWNER` for one who has,
`VOLUME@EPOCH:OWNER:LEASE` where its writes stop with a lease, `VOLUME` for a read-only view. `VOLUME/DEVICE`
in its place names the replica on one device, by the device's identifier, where the VIOS may reach several.

While a volume is moved, its owner opens `VOLUME/TARGET<SOURCE@EPOCH:OWNER` at the target's VIOS: pages
that are not there yet come from the source. An intermediate client adds its token: it reads
`VOLUME/SOURCE+PRINCIPAL` and fills `VOLUME/TARGET<SOURCE+PRINCIPAL`; `VOLUME/SOURCE@EPOCH:OWNER+PRINCIPAL` is
its relay's way for the owner.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from farpage.definition.model import NUMBER_MAX
from farpage.device.errors import VolumeFenced
from farpage.errors import FarpageError, InvalidInput

_EXPORT = re.compile(
    r"(?P<volume>[a-z0-9][a-z0-9._-]{0,62})"
    r"(?:/(?P<device>[a-z0-9][a-z0-9-]{0,62})(?:<(?P<source>[a-z0-9][a-z0-9-]{0,62}))?)?"
    r"(?:@(?P<epoch>[1-9][0-9]{0,15})(?::(?P<owner>[0-9a-f]{16})(?::(?P<lease>[0-9a-f]{16}))?)?)?"
    r"(?:\+(?P<principal>[0-9a-f]{16}))?"
)
_PLACE = re.compile(r"[<@+]")


@dataclass(frozen=True)
class ExportName:
    """A volume, and the epoch of the owner who opens it; None for a read-only view.

    `owner` is the token of the owner's claim, `lease` the identifier of a lease, `device` that of
    the replica's device, `source` that of the device that the replica is copied from, `principal` the
    token of an intermediate client; empty for none.
    """

    volume: str
    epoch: int | None
    owner: str = ""
    lease: str = ""
    device: str = ""
    source: str = ""
    principal: str = ""

    def __str__(self) -> str:
        name = f"{self.volume}/{self.device}" if self.device else self.volume
        if self.source:
            name += f"<{self.source}"
        if self.epoch is not None:
            name = ":".join(filter(None, (f"{name}@{self.epoch}", self.owner, self.lease)))
        return f"{name}+{self.principal}" if self.principal else name


def place_of(text: str) -> str:
    """Return the part of an export's name that says which volume is meant, and on which device."""
    return _PLACE.split(text, 1)[0]


def parse_export_name(text: str) -> ExportName:
    """Parse what an NBD client asks for.

    :raise InvalidInput: it is no export name.
    """
    match = _EXPORT.fullmatch(text)
    epoch = int(match["epoch"]) if match and match["epoch"] else None
    if match is None or (epoch or 0) > NUMBER_MAX:
        raise InvalidInput(
            "export",
            f"{text[:80]!r} is no export name",
            "ask for VOLUME@EPOCH or VOLUME@EPOCH:OWNER, or for VOLUME to read only",
        )
    return ExportName(
        volume=match["volume"],
        epoch=epoch,
        owner=match["owner"] or "",
        lease=match["lease"] or "",
        device=match["device"] or "",
        source=match["source"] or "",
        principal=match["principal"] or "",
    )


def refusal_text(error: FarpageError) -> str:
    """Say why an export is refused; `farpage.volume.refusal` reads what is for machines."""
    if isinstance(error, VolumeFenced):
        return f"{error.code} {error.current}: {error.cause}"
    return error.cause
