"""Simulated disks, and the paging devices through which VIOS reach them.

A command goes the way that it goes on a real device: a thread looks at the epoch in the volume's header, then
at the lease, then calls the kernel. Before the look at the lease the process may be stopped; once in the
kernel the command is carried out whatever becomes of the process.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from farpage.blockio import Allocation, BlockIO, BlockLimits, Done, Extent, ExtentsDone, Feature, ReadDone
from farpage.device.base import EPOCH_MAX, PagingDevice, Usage, VolumeStat, never
from farpage.device.claim import Claim, Claims
from farpage.device.errors import DeviceUnusable, VolumeExists, VolumeInUse, VolumeMissing
from farpage.pager.table import PAGE_BYTES
from farpage.vios.copying.copies import FILL_EPOCH
from tests.simulation.world import Process, World

Result = TypeVar("Result")

ZEROS = bytes(PAGE_BYTES)


@dataclass(eq=False)
class Change:
    """A change of pages under way: in a thread of its process, or already in the kernel."""

    pages: range
    process: Process
    over: Callable[[], bool]
    superseded: Callable[[], bool]
    work: Callable[[], int]
    """Carries it out; returns an errno."""
    looked: bool = False
    """The thread has seen that no newer epoch owns the volume."""
    in_kernel: bool = False
    result: int | None = None
    """What it ended with in the kernel."""

    @property
    def under_way(self) -> bool:
        """Whether it can still happen.

        What is in a thread ends with the process, with the lease, and with a newer epoch that it has yet to
        look for.
        """
        if self.in_kernel:
            return True
        return self.process.alive and not self.over() and (self.looked or not self.superseded())

    def carry_out(self) -> int:
        """Let the kernel be done with it; returns an errno."""
        self.in_kernel = False
        if self.result is None:
            self.result = self.work()
        return self.result


@dataclass
class StoredVolume:
    """What a disk holds of a volume."""

    id: str
    size_bytes: int
    claims: Claims = field(default_factory=Claims)
    pages: dict[int, bytes] = field(default_factory=dict)
    written_under: dict[int, int] = field(default_factory=dict)
    """By page, the newest epoch under which it was written."""
    in_flight: list[Change] = field(default_factory=list)


class Disk:
    """Storage that one or more VIOS reach."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.volumes: dict[str, StoredVolume] = {}
        self.created = 0
        """Volumes so far: each has an identifier of its own."""
        self.full = False
        self.failing = False
        self.hung = False
        self.flips = 0
        """So many coming reads return a wrong bit."""
        self.flipped_seconds = -1000.0
        self.slowness = 1.0
        self.thread_slowness = 1.0
        self._chance = world.random(f"disk {name}")
        self._waiting: list[Callable[[], None]] = []

    def thread_seconds(self) -> float:
        """Draw how long it takes until a thread has got from one system call to the next."""
        chance = self._chance.random()
        return self.thread_slowness * (0.00002 if chance > 0.05 else 0.02 * chance)

    def seconds(self) -> float:
        """Draw how long a command takes in the device."""
        chance = self._chance.random()
        return self.slowness * (0.0001 + (0.0004 * chance if chance < 0.97 else 0.05 * self._chance.random()))

    def command(self, process: Process, work: Callable[[], int], done: Callable[[int], None]) -> None:
        """Carry out a command for a process; on a disk that hangs, when that goes on."""

        if not self.hung:
            process.system_call(self.seconds(), work, done)
            return

        def again() -> None:
            self.command(process, work, done)
            process.release()

        process.hold()
        self._waiting.append(again)

    def resume(self) -> None:
        """Go on with what waits."""
        self.hung = False
        waiting, self._waiting = self._waiting, []
        for command in waiting:
            command()

    def store(self, volume: StoredVolume, page: int, content: bytes, epoch: int) -> int:
        """Change a page; returns an errno."""
        if self.full and page not in volume.pages:
            return errno.ENOSPC
        newest = volume.written_under.get(page, 0)
        if epoch < newest:
            self.world.violated(f"{self.name}: page {page} is written under epoch {epoch} after {newest}")
        if epoch != FILL_EPOCH:
            volume.written_under[page] = epoch
        volume.pages[page] = content
        return 0

    def begin(self, volume: StoredVolume, change: Change) -> None:
        """Begin a change; the pages must have no other one under way.

        What the kernel holds up beyond the end of the lease is all that a lease cannot keep from happening
        later, when another VIOS writes ("What remains" in docs/architecture.md). Here it happens by then.
        """
        if not change.under_way:
            return  # it will be refused
        pages = change.pages
        volume.in_flight = [other for other in volume.in_flight if other.under_way]
        for other in volume.in_flight:
            if other.pages.start < pages.stop and pages.start < other.pages.stop:
                if other.in_kernel and other.over() and other.process is not change.process:
                    self.world.note(f"{self.name}: a write of page {other.pages.start} outlived its lease")
                    other.carry_out()
                    continue
                self.world.violated(
                    f"{self.name}: two writes of page {max(other.pages.start, pages.start)} in flight"
                )
        volume.in_flight.append(change)

    def stored_pages(self) -> list[int]:
        """Return the pages that any volume has."""
        return sorted({page for volume in self.volumes.values() for page in volume.pages})

    def flip(self, page: int) -> None:
        """Change a bit of a stored page of each volume."""
        for volume in self.volumes.values():
            if page in volume.pages:
                volume.pages[page] = self.flipped(volume.pages[page])

    def flipped(self, content: bytes | bytearray) -> bytes:
        """Return content with one bit changed."""
        changed = bytearray(content)
        changed[self._chance.randrange(len(content))] ^= 1 << self._chance.randrange(8)
        return bytes(changed)


class SimulatedDevice(PagingDevice):
    """One VIOS' view of a disk."""

    kind = "dir"
    access = "simulated"
    features = (
        Feature.FLUSH | Feature.FUA | Feature.TRIM | Feature.ZERO | Feature.EXTENTS | Feature.MULTI_CONN
    )

    def __init__(self, disk: Disk, process: Process) -> None:
        self.id = disk.name
        self.name = disk.name
        self.spec = f"dir:/{disk.name}"
        self.size_bytes = 1 << 40
        self._disk = disk
        self._process = process

    def volumes(self) -> list[VolumeStat]:
        return [self.volume(name) for name in self.names()]

    def names(self) -> list[str]:
        return sorted(self._disk.volumes)

    def volume(self, name: str) -> VolumeStat:
        stored = self._find(name)
        used_bytes = len(stored.pages) * PAGE_BYTES
        return VolumeStat(name, stored.id, stored.size_bytes, used_bytes, stored.claims.current)

    def usage(self) -> Usage:
        stats = self.volumes()
        return Usage(sum(s.size_bytes for s in stats), sum(s.used_bytes for s in stats), len(stats))

    def create_volume(self, name: str, size_bytes: int) -> VolumeStat:
        if name in self._disk.volumes:
            raise VolumeExists(name, self.name)
        self._disk.created += 1
        identifier = f"{self._disk.name}/{name}/{self._disk.created}"
        self._disk.volumes[name] = StoredVolume(identifier, size_bytes)
        return self.volume(name)

    def delete_volume(self, name: str, *, force: bool = False) -> None:
        if not force:
            raise VolumeInUse(name, self.name)
        self._find(name).claims.add(Claim(EPOCH_MAX))
        del self._disk.volumes[name]

    def claim(self, name: str, claim: Claim) -> Claim:
        claims = self._find(name).claims
        claims.add(claim)
        return claims.current

    async def run(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Run something in a thread of the process; a disk that hangs makes it wait."""
        future: asyncio.Future[Result] = asyncio.get_running_loop().create_future()
        outcome: list[Result] = []
        problem: list[Exception] = []

        def carry_out() -> int:
            if self._disk.failing:
                return errno.EIO
            try:
                outcome.append(work(*arguments))
            except Exception as error:
                problem.append(error)
            return 0

        def done(_: int) -> None:
            if future.done():
                return
            if problem:
                future.set_exception(problem[0])
            elif outcome:
                future.set_result(outcome[0])
            else:
                future.set_exception(DeviceUnusable(self.spec, "I/O error", "replace it"))

        self._disk.command(self._process, carry_out, done)
        return await future

    async def open_volume(self, name: str, epoch: int | None, over: Callable[[], bool] = never) -> BlockIO:
        stored = await self.run(self._find, name)
        return SimulatedVolume(self._disk, stored, epoch, self._process, over)

    def lent(self, volume_id: str, process: Process) -> SimulatedFile | None:
        """Return the volume as another process reads it by itself; None if it is on another disk."""
        for stored in self._disk.volumes.values():
            if stored.id == volume_id:
                return SimulatedFile(SimulatedVolume(self._disk, stored, None, process))
        return None

    async def close(self) -> None:
        """Keep nothing."""

    def _find(self, name: str) -> StoredVolume:
        if name not in self._disk.volumes:
            raise VolumeMissing(name, f"device {self.name!r}")
        return self._disk.volumes[name]


class SimulatedFile:
    """A volume as a process reads it by itself: a `DirectFile`."""

    def __init__(self, volume: SimulatedVolume) -> None:
        self._volume = volume
        self._closed = False

    place: tuple[int, int] | None = None

    def read(self, offset: int, length: int, done: ReadDone) -> bool:
        if self._closed:
            return False
        self._volume.read(offset, length, done)
        return True

    def push(self) -> None:
        """Everything is begun at once here."""

    def close(self) -> None:
        self._closed = True


class SimulatedVolume:
    """An open volume on a simulated disk."""

    limits = BlockLimits(minimum=1, preferred=PAGE_BYTES, maximum=32 << 20)
    features = SimulatedDevice.features

    def __init__(
        self,
        disk: Disk,
        stored: StoredVolume,
        epoch: int | None,
        process: Process,
        over: Callable[[], bool] = never,
    ) -> None:
        self.size_bytes = stored.size_bytes
        self.read_only = epoch is None
        self._disk = disk
        self._stored = stored
        self._epoch = epoch or 0
        self._over = over
        self._process = process

    def read_now(self, offset: int, into: memoryview) -> bool:
        return False

    def read(self, offset: int, length: int, done: ReadDone) -> None:
        content = bytearray()

        def work() -> int:
            if self._disk.failing:
                return errno.EIO
            pages = self._stored.pages
            first = offset // PAGE_BYTES
            for page in range(first, first + length // PAGE_BYTES):
                content.extend(pages.get(page, ZEROS))
            if self._disk.flips:
                self._disk.flips -= 1
                self._disk.flipped_seconds = self._disk.world.now_seconds
                content[:] = self._disk.flipped(content)
            return 0

        self._disk.command(
            self._process, work, lambda error: done(error, None if error else memoryview(content))
        )

    def write(self, offset: int, data: memoryview, done: Done, *, fua: bool = False) -> None:
        content = bytes(data)
        first = offset // PAGE_BYTES

        def work() -> int:
            for index in range(len(content) // PAGE_BYTES):
                page = content[index * PAGE_BYTES : (index + 1) * PAGE_BYTES]
                error = self._disk.store(self._stored, first + index, page, self._epoch)
                if error:
                    return error
            return 0

        self._change(range(first, first + len(content) // PAGE_BYTES), work, done)

    def zero(
        self,
        offset: int,
        length: int,
        done: Done,
        *,
        punch: bool = True,
        fast: bool = False,
        fua: bool = False,
    ) -> None:
        self.trim(offset, length, done)

    def trim(self, offset: int, length: int, done: Done, *, fua: bool = False) -> None:
        pages = range(offset // PAGE_BYTES, (offset + length) // PAGE_BYTES)

        def work() -> int:
            for page in pages:
                self._disk.store(self._stored, page, ZEROS, self._epoch)
            return 0

        self._change(pages, work, done)

    def _change(self, pages: range, work: Callable[[], int], done: Done) -> None:
        """Look at the epoch in a thread, and then call the kernel."""
        loop = asyncio.get_running_loop()

        change = Change(
            pages,
            self._process,
            self._over,
            lambda: self.superseded,
            lambda: errno.EIO if self._disk.failing else work(),
        )
        self._disk.begin(self._stored, change)

        def end(error: int) -> None:
            self._stored.in_flight = [other for other in self._stored.in_flight if other is not change]
            done(error)

        def look() -> None:
            if self.superseded:
                loop.call_later(self._disk.thread_seconds(), end, errno.ESHUTDOWN)
            else:
                change.looked = True
                loop.call_later(self._disk.thread_seconds(), call)

        def call() -> None:
            if self._over():  # the last thing before the system call
                end(errno.ESHUTDOWN)
            else:
                change.in_kernel = True
                self._disk.command(self._process, change.carry_out, end)

        loop.call_later(self._disk.thread_seconds(), look)

    @property
    def superseded(self) -> bool:
        """Whether the header in the device says that a newer epoch owns the volume."""
        return self._stored.claims.current.epoch > self._epoch

    def cache(self, offset: int, length: int, done: Done) -> None:
        done(0)

    def flush(self, done: Done) -> None:
        self._disk.command(self._process, lambda: errno.EIO if self._disk.failing else 0, done)

    def extents(self, offset: int, length: int, done: ExtentsDone) -> None:
        found: list[Extent] = []

        def work() -> int:
            if self._disk.failing:
                return errno.EIO
            for page in range(offset // PAGE_BYTES, (offset + length) // PAGE_BYTES):
                hole = self._stored.pages.get(page, ZEROS) == ZEROS
                allocation = Allocation.HOLE | Allocation.ZERO if hole else Allocation.DATA
                found.append(Extent(PAGE_BYTES, allocation))
            return 0

        self._disk.command(self._process, work, lambda error: done(error, None if error else found))

    async def close(self) -> None:
        """Keep nothing."""
