"""The conversion of paging commands: what a VIOS accepts, how NBD carries it, what the device is told.

`CONVERSIONS` is that table. Everything follows it: which commands a device can have configured,
which NBD features an export offers, and where each command of a connection goes.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Protocol, runtime_checkable

from farpage.blockio import BlockIO, Feature, FileBacked, Lent, SharedFile
from farpage.definition.model import PagingCommand
from farpage.nbd import protocol as p
from farpage.vios.refusing import RefusingCommands


@dataclass(frozen=True)
class Conversion:
    """One row: a paging command, as it arrives and as it goes on."""

    command: PagingCommand
    nbd: tuple[str, ...]
    """NBD options or commands that carry it, as the specification names them."""
    device: tuple[str, ...]
    """Commands of an opened device volume (methods of `BlockIO`) that it becomes."""
    needs: Feature = Feature.NONE
    """What the device must be able to do, all of it, to be configured for the command."""
    offers: Feature = Feature.NONE
    """NBD features that the export offers on account of it, as far as the device has them."""


CONVERSIONS: Final = (
    Conversion(PagingCommand.OPEN, ("NBD_OPT_GO", "NBD_OPT_EXPORT_NAME"), (), offers=Feature.MULTI_CONN),
    Conversion(
        PagingCommand.PAGE_IN,
        ("NBD_CMD_READ", "NBD_CMD_CACHE"),
        ("read", "read_now", "cache"),
        offers=Feature.CACHE,
    ),
    Conversion(PagingCommand.PAGE_OUT, ("NBD_CMD_WRITE",), ("write",)),
    Conversion(PagingCommand.DISCARD, ("NBD_CMD_TRIM",), ("trim",), needs=Feature.TRIM, offers=Feature.TRIM),
    Conversion(
        PagingCommand.ZERO,
        ("NBD_CMD_WRITE_ZEROES",),
        ("zero",),
        needs=Feature.ZERO,
        offers=Feature.ZERO | Feature.FAST_ZERO,
    ),
    Conversion(
        PagingCommand.FLUSH,
        ("NBD_CMD_FLUSH",),
        ("flush",),
        needs=Feature.FLUSH,
        offers=Feature.FLUSH | Feature.FUA,
    ),
    Conversion(
        PagingCommand.QUERY,
        ("NBD_CMD_BLOCK_STATUS",),
        ("extents",),
        needs=Feature.EXTENTS,
        offers=Feature.EXTENTS,
    ),
    Conversion(PagingCommand.CLOSE, ("NBD_CMD_DISC",), ("close",)),
)

NBD_NUMBERS: Final[dict[str, int]] = {
    name: getattr(p, name) for conversion in CONVERSIONS for name in conversion.nbd
}


def commands_of(features: Feature) -> tuple[PagingCommand, ...]:
    """Return the commands that a device with these features can be configured for."""
    return tuple(conversion.command for conversion in CONVERSIONS if conversion.needs in features)


def offered_features(features: Feature, commands: Iterable[PagingCommand]) -> Feature:
    """Return what an export offers of a device's features when `commands` are configured."""
    configured = set(commands)
    offered = Feature.NONE
    for conversion in CONVERSIONS:
        if conversion.command in configured:
            offered |= conversion.offers
    return features & offered


@runtime_checkable
class Lending(Protocol):
    """A device's volume whose storage a client on this host may read by itself."""

    async def lend(self) -> Lent | None:
        """Open the storage once more, read-only; None where it cannot be."""


class ConvertedVolume(RefusingCommands):
    """A device's volume behind the table: configured commands go straight to it, others finish with ENOTSUP.

    The methods of the device are bound to this object at its creation, so that a command on its way
    costs nothing here.
    """

    def __init__(self, volume: BlockIO, commands: Iterable[PagingCommand]) -> None:
        configured = set(commands)
        self._volume = volume
        self._may_lend = PagingCommand.PAGE_IN in configured
        self.size_bytes = volume.size_bytes
        self.limits = volume.limits
        self.read_only = volume.read_only or PagingCommand.PAGE_OUT not in configured
        self.features = offered_features(volume.features, configured)
        for conversion in CONVERSIONS:
            if conversion.command in configured:
                for method in conversion.device:
                    setattr(self, method, getattr(volume, method))

    def share_file(self) -> SharedFile | None:
        """Return another descriptor of the file; None where device or configuration forbid it."""
        if not self._may_lend or not isinstance(self._volume, FileBacked):
            return None
        return self._volume.share_file()

    async def lend(self) -> Lent | None:
        """Open the storage for a client to read by itself; None where device or configuration forbid it."""
        if not self._may_lend or not isinstance(self._volume, Lending):
            return None
        return await self._volume.lend()

    async def close(self) -> None:
        """Close the device's volume; that is never refused."""
        await self._volume.close()
