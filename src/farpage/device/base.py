"""The small interface of paging devices.

The plain methods block and are safe to call from any thread; `run` carries them out for an
event loop. The coroutines belong to the loop in which the device was opened.
"""

from __future__ import annotations

import abc
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, Protocol, TypeAlias, TypeVar

from farpage.blockio import BlockIO, BlockLimits, Feature
from farpage.device.claim import Claim
from farpage.device.errors import DeviceUnusable
from farpage.device.spec import Allocate
from farpage.errors import InvalidInput

BLOCK_BYTES: Final = 4096
"""Volumes are multiples of it, and so is everything that direct I/O transfers."""

EPOCH_MAX: Final = (1 << 64) - 1
"""Stands in the header of a deleted volume, so that whoever has it open yet cannot write."""

Result = TypeVar("Result")


def never() -> bool:
    """Say that nothing ends the leave to write."""
    return False


Admit: TypeAlias = Callable[[str, str], None]
"""Refuses a device, by its identifier and its name, before anything is changed on it; fit for any thread.

The identifier of one without a label is empty."""


def admit_all(_identifier: str, _name: str) -> None:
    """Refuse none."""


NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
"""The definition's `Name`, fit for a file name."""


@dataclass(frozen=True)
class VolumeStat:
    """A volume as it is on its device.

    `id` (a UUID) tells a volume from an earlier one of the same name; `claim` is the present one, through
    whichever VIOS it came, with epoch 0 where there is none yet.
    """

    name: str
    id: str
    size_bytes: int
    used_bytes: int
    claim: Claim


@dataclass(frozen=True)
class Usage:
    """Bytes that the volumes were promised, and bytes that they occupy."""

    provisioned_bytes: int
    used_bytes: int
    volumes: int


class PagingDevice(abc.ABC):
    """Storage for volumes; opened devices are made by `farpage.device.open.open_device`."""

    kind: str
    id: str
    name: str
    spec: str
    size_bytes: int
    access: str
    """How the storage is read and written, in words for users."""
    features: Feature
    """What its volumes can do."""
    allocate = Allocate.SPARSE
    """When the storage allocates the blocks of a new volume; in full takes as long as to write all of it."""
    limits = BlockLimits(minimum=1, preferred=BLOCK_BYTES, maximum=32 << 20)
    """Block size constraints of its volumes."""

    @property
    def reconnects(self) -> int:
        """Connections to the storage that were made anew since the start; for remote devices."""
        return 0

    @abc.abstractmethod
    def volumes(self) -> list[VolumeStat]:
        """List the volumes, sorted by name.

        :raise DeviceUnusable: the storage does not answer as it should.
        """

    @abc.abstractmethod
    def names(self) -> list[str]:
        """List the names of the volumes, sorted, without a look at each.

        :raise DeviceUnusable: the storage does not answer as it should.
        """

    @abc.abstractmethod
    def volume(self, name: str) -> VolumeStat:
        """Look a volume up.

        :raise VolumeMissing: there is none.
        """

    @abc.abstractmethod
    def usage(self) -> Usage:
        """Add the volumes up."""

    @abc.abstractmethod
    def create_volume(self, name: str, size_bytes: int) -> VolumeStat:
        """Make a volume that reads as zeros.

        :raise InvalidInput: a name or size that no volume can have.
        :raise VolumeExists: the name is taken.
        :raise VolumeBeingMade: the name is about to be taken.
        :raise CapacityExceeded: it does not fit.
        :raise DeviceUnusable: the storage refuses.
        """

    async def make_volume(self, name: str, size_bytes: int) -> VolumeStat:
        """Call `create_volume` without blocking the loop, however long that takes."""
        return await self.run(self.create_volume, name, size_bytes)

    @abc.abstractmethod
    def delete_volume(self, name: str, *, force: bool = False) -> None:
        """Delete a volume; with `force` also while it is open, upon which writes to it are refused.

        :raise VolumeMissing: there is none.
        :raise VolumeInUse: somebody has it open, through this VIOS or another.
        """

    @abc.abstractmethod
    def claim(self, name: str, claim: Claim) -> Claim:
        """Record a claim of the volume durably, unless an earlier one refuses it; return the present one.

        From then on writes with an older epoch are refused, through whichever VIOS they come.

        :raise VolumeMissing: there is none.
        """

    @abc.abstractmethod
    async def run(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Call a blocking method without blocking the loop: `await device.run(device.volume, name)`.

        Storage that hangs so holds up only those who want something of it.
        """

    @abc.abstractmethod
    async def open_volume(self, name: str, epoch: int | None, over: Callable[[], bool] = never) -> BlockIO:
        """Open a volume for the owner at `epoch`, or read-only where that is None.

        Commands that change a volume finish with ESHUTDOWN when a newer epoch owns it, and when `over`, which
        must be cheap and fit for any thread, says True: it is asked as late as possible.

        :raise VolumeMissing: there is none.
        :raise DeviceUnusable: the storage refuses.
        """

    @abc.abstractmethod
    async def close(self) -> None:
        """Let go of the storage; its volumes must have been closed."""


def check_new_volume(name: str, size_bytes: int) -> None:
    """Refuse what cannot be a volume.

    :raise InvalidInput: naming the field.
    """
    if NAME.fullmatch(name) is None:
        hint = "use lower-case letters, digits, '.', '_' and '-', at most 63, the first a letter or digit"
        raise InvalidInput("name", f"{name!r} cannot be the name of a volume", hint)
    if size_bytes <= 0 or size_bytes % BLOCK_BYTES:
        raise InvalidInput(
            "size_bytes", f"{size_bytes} is not a size for a volume", f"give a multiple of {BLOCK_BYTES}"
        )


class Labelled(Protocol):
    """A label, or a device that has one."""

    @property
    def name(self) -> str:
        """What the device is called."""

    @property
    def size_bytes(self) -> int:
        """What its volumes may add up to."""


def refuse_relabelling(spec: str, found: Labelled, *, name: str | None, size_bytes: int | None) -> None:
    """Refuse a device that is asked for under another name or size than it has.

    :raise DeviceUnusable:
    """
    # Some kinds keep whole blocks only of a size that was asked for.
    if size_bytes is not None and found.size_bytes not in (
        size_bytes,
        size_bytes // BLOCK_BYTES * BLOCK_BYTES,
    ):
        raise DeviceUnusable(
            spec,
            f"it has {found.size_bytes} bytes, not {size_bytes}",
            "leave the size out: a device keeps the size that it was labelled with",
        )
    if name is not None and name != found.name:
        raise DeviceUnusable(spec, f"its name is {found.name!r}, not {name!r}", "leave the name out")
