"""A client's memory and its volume as models, for tests of the pager that decide when what happens."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import os
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from farpage.blockio import Done, ReadDone, Run, write_each
from farpage.kernel.userfaultfd import FLAG_MINOR, FLAG_WP, FLAG_WRITE
from farpage.pager.buffers import BufferPool
from farpage.pager.eviction import Eviction
from farpage.pager.faults import Faults
from farpage.pager.limit import Limit
from farpage.pager.memory import PagedMemory
from farpage.pager.outage import Outage
from farpage.pager.space import Space
from farpage.pager.states import STATE_NAMES
from farpage.pager.table import PAGE_BYTES, PageTable
from farpage.volume.connector import Endpoint
from farpage.volume.failover import FailoverLog
from farpage.volume.link import PathStatus
from farpage.volume.ownership import Ownership
from farpage.volume.paged import MirrorCounts, PagedVolume, ReplicaStatus
from farpage.volume.shortcut import Shortcut
from farpage.volume.state import ReplicaHealth
from tests.support.blockio import MemoryIO


def content_of(page: int, version: int = 1) -> bytes:
    """Return the bytes that tests put into a page; never zeros."""
    return ((page << 8 | version) * 2654435761 % 2**32 + 1).to_bytes(8, "little") * (PAGE_BYTES // 8)


class ModelMemory(PagedMemory):
    """Memory of a client as userfaultfd and the memfd show it.

    `before` is called with the name, first page and count of everything that the pager does, right before it
    is done. What is named in `busy` has no effect and says "try later".
    """

    def __init__(self) -> None:
        self.content: dict[int, bytes] = {}
        """Pages that the memfd holds."""
        self.mapped: set[int] = set()
        self.protected: set[int] = set()
        self.poisoned: set[int] = set()
        self.before: Callable[[str, int, int], None] = lambda name, first, count: None
        self.busy: set[str] = set()
        self._faults: list[tuple[int, int]] = []
        self._eventfd = os.eventfd(0, os.EFD_NONBLOCK)

    # What the client does

    def touch(self, page: int, write: bytes | None = None) -> bytes | None:
        """Read a page or write it whole; None when the access has to wait, and is in the events.

        :raise MemoryError: the page is poisoned.
        """
        if page in self.poisoned:
            raise MemoryError(f"page {page} is poisoned")
        flags = FLAG_WRITE if write is not None else 0
        if page not in self.content:
            self._faults.append((flags, page))
            return None
        if page not in self.mapped:
            self._faults.append((flags | FLAG_MINOR, page))
            return None
        if write is not None:
            if page in self.protected:
                self._faults.append((flags | FLAG_WP, page))
                return None
            self.content[page] = write
        return self.content[page]

    def remove(self, page: int) -> None:
        """Punch a hole, as a balloon does."""
        self.content.pop(page, None)
        self.mapped.discard(page)

    def unmap(self, page: int) -> None:
        """Take a page out of the client's page table only."""
        self.mapped.discard(page)

    # What the pager does

    def fileno(self) -> int:
        return self._eventfd

    def read_faults(self) -> list[tuple[int, int]]:
        faults = self._faults[:64]
        del self._faults[:64]
        return faults

    def _does(self, name: str, first: int, count: int) -> bool:
        self.before(name, first, count)
        return name not in self.busy

    def _missing(self, first: int, count: int) -> int:
        if first in self.content or first in self.poisoned:
            raise FileExistsError(errno.EEXIST, "the page is present")
        present = (page for page in range(first, first + count) if page in self.content)
        return next(present, first + count) - first

    def copy_in(self, first: int, source_address: int, count: int, *, protect: bool) -> int:
        if not self._does("copy_in", first, count):
            return 0
        done = self._missing(first, count)
        source = ctypes.string_at(source_address, done * PAGE_BYTES)
        for index in range(done):
            self._put(first + index, source[index * PAGE_BYTES :][:PAGE_BYTES], protect)
        return done

    def _put(self, page: int, content: bytes, protect: bool) -> None:
        self.content[page] = content
        self.mapped.add(page)
        (self.protected.add if protect else self.protected.discard)(page)

    def zero_in(self, first: int, count: int) -> int:
        if not self._does("zero_in", first, count):
            return 0
        done = self._missing(first, count)
        for page in range(first, first + done):
            self._put(page, bytes(PAGE_BYTES), protect=False)
        return done

    def map_in(self, page: int, *, protect: bool) -> int:
        if not self._does("map_in", page, 1):
            return 0
        if page in self.mapped:
            raise FileExistsError(errno.EEXIST, "the page is present")
        if page not in self.content:
            raise FileNotFoundError(errno.ENOENT, "the page is not in the memfd")
        self._put(page, self.content[page], protect)
        return 1

    def poison(self, page: int) -> int:
        if not self._does("poison", page, 1):
            return 0
        self._missing(page, 1)
        self.poisoned.add(page)
        return 1

    def protect(self, first: int, count: int) -> bool:
        if not self._does("protect", first, count):
            return False
        self.protected.update(range(first, first + count))
        return True

    def unprotect(self, first: int, count: int) -> bool:
        if not self._does("unprotect", first, count):
            return False
        self.protected.difference_update(range(first, first + count))
        return True

    def wake(self, first: int, count: int) -> None:
        self._does("wake", first, count)

    def read_out(self, first: int, into: memoryview) -> None:
        self._does("read_out", first, len(into) // PAGE_BYTES)
        for index in range(len(into) // PAGE_BYTES):
            page = self.content.get(first + index, bytes(PAGE_BYTES))
            into[index * PAGE_BYTES : (index + 1) * PAGE_BYTES] = page

    def release(self, first: int, count: int) -> None:
        self._does("release", first, count)
        for page in range(first, first + count):
            self.remove(page)

    def present_runs(self) -> list[tuple[int, int]]:
        return [(page, 1) for page in sorted(self.content)]

    def unregister(self) -> None:
        self._does("unregister", 0, 0)

    def close(self) -> None:
        os.close(self._eventfd)


class ModelVolume(MemoryIO):
    """A volume that never fails, with a replica on each of some devices; it reads from the first.

    With `hold` set its commands wait in `held`. `other_path` has what the other path to every replica reads,
    where that is not what it holds.
    """

    def __init__(self, size_bytes: int, devices: tuple[str, ...] = ("disk1",)) -> None:
        super().__init__(size_bytes, at_hand=False)
        self.on = {
            device: self.content if device == devices[0] else bytearray(size_bytes) for device in devices
        }
        """What each device holds."""
        self.stale: set[str] = set()
        self.rewritten: list[tuple[str, int]] = []
        """Replicas put right: the device and the page."""
        self.other_path: dict[int, bytes] = {}
        self.shortcut: Shortcut | None = None
        self.held_bytes = 0
        self.relayed = False
        self.predecessors_gone = True
        self.epoch = 1
        self.ownership = Ownership("", 1)
        self.failovers = FailoverLog()
        self.on_active: Callable[[], None] = lambda: None
        self.on_full: Callable[[bool], None] = lambda _full: None
        self.wanted_pages: Callable[[], npt.NDArray[np.bool_]] | None = None
        self.wrong_pages: Callable[[int, memoryview], set[int]] | None = None
        self.on_no_path: Callable[[bool], None] = lambda _none: None

    @property
    def replicas(self) -> tuple[str, ...]:
        return tuple(device for device in self.on if device not in self.stale)

    @property
    def counts(self) -> MirrorCounts:
        return MirrorCounts()

    def status(self) -> list[PathStatus]:
        return []

    def replica_status(self) -> list[ReplicaStatus]:
        return [
            ReplicaStatus(device, f"name of {device}", ReplicaHealth.IN_SYNC, "", 0, 0, 0.0, None, 0.0)
            for device in self.on
        ]

    async def open(self, timeout_seconds: float) -> None:
        """Be open."""

    async def go_over(
        self, endpoints: Sequence[Endpoint], device: str, device_name: str, fences: str = ""
    ) -> None:
        """Stay: there is no VIOS."""

    async def leave(self, vios: str) -> None:
        """Stay: there is no VIOS."""

    def rejoin(self, vios: str, reason: str = "") -> None:
        """Stay: there is no VIOS."""

    async def abandon(self) -> None:
        self.closed = True

    def write(self, offset: int, data: memoryview, done: Done, *, fua: bool = False) -> None:
        def everywhere(error: int) -> None:
            for content in self.on.values():
                content[offset : offset + len(data)] = data
            done(error)

        super().write(offset, data, everywhere, fua=fua)

    def write_runs(self, runs: Sequence[Run], done: Done) -> None:
        write_each(self, runs, done)

    def read_replica(
        self, device: str, offset: int, length: int, done: ReadDone, *, other_path: bool = False
    ) -> None:
        def step() -> None:
            if device in self.stale:
                done(errno.ESTALE, None)
            elif other_path and offset // PAGE_BYTES not in self.other_path:
                done(errno.ENOLINK, None)
            elif other_path:
                done(0, memoryview(self.other_path[offset // PAGE_BYTES]))
            else:
                done(0, memoryview(bytes(self.on[device][offset : offset + length])))

        self._run(step)

    def rewrite_replica(self, device: str, offset: int, data: memoryview, done: Done) -> None:
        def step() -> None:
            self.rewritten.append((device, offset // PAGE_BYTES))
            self.on[device][offset : offset + len(data)] = data
            done(0)

        self._run(step)

    def spoil(self, page: int, device: str = "disk1") -> None:
        """Change a byte of a page on a device."""
        self.on[device][page * PAGE_BYTES + 100] ^= 0xFF

    def push(self) -> None:
        """Everything is sent at once."""


NOTHING_STAYS_PAGES = 33
"""A limit so low that page-outs, once begun, end only when nothing is left in memory."""


class ModelClient:
    """A client of `pages` pages: real faults and page-outs over a model of its memory and volume."""

    def __init__(
        self,
        pages: int,
        limit_pages: int | None = None,
        devices: tuple[str, ...] = ("disk1",),
        paged_to: PagedVolume | None = None,
        ram_tier_percent: int = 0,
    ) -> None:
        """Make the client within a running event loop; without `paged_to` it has a model of a volume."""
        self.memory = ModelMemory()
        self.table = PageTable(pages)
        self.volume = ModelVolume(pages * PAGE_BYTES, devices)
        self.alarms: list[tuple[str, str]] = []
        self.space = Space(
            self.memory,
            self.table,
            paged_to or self.volume,
            Limit(limit_pages or pages),
            BufferPool(preallocated=1),
            lambda kind, message: self.alarms.append((kind, message)),
            lambda: None,
            ram_tier_percent,
        )
        self.faults = Faults(self.space)
        self.eviction = Eviction(self.space, self.faults.admit)
        self.outage = Outage(self.space, self.faults, self.eviction, None, lambda: None)

    def read(self, page: int) -> bytes | None:
        """Read a page, with the faults that this takes; None when it has to wait for the volume."""
        return self._access(page, None)

    def write(self, page: int, version: int = 1) -> bytes | None:
        """Write a page whole, as `read`."""
        return self._access(page, content_of(page, version))

    def _access(self, page: int, write: bytes | None) -> bytes | None:
        for _ in range(3):  # missing, then protected
            if (found := self.memory.touch(page, write)) is not None:
                return found
            self.faults.on_events()
        return None

    async def evict(self) -> None:
        """Page out until the client is within its marks, or waits for the volume."""
        self.eviction.wake()
        await self.settle()

    async def settle(self) -> None:
        """Let everything happen that waits for nothing but its turn."""
        for _ in range(20):
            await asyncio.sleep(0)

    async def fill(self, pages: int) -> None:
        """Write pages from 0 on, and have those above the limit paged out."""
        for page in range(pages):
            assert self.write(page)
        await self.evict()

    async def page_out(self, limit_pages: int) -> None:
        """Page out all that is in memory, and go on with this limit."""
        self.space.set_limit(Limit(NOTHING_STAYS_PAGES))
        await self.evict()
        self.space.set_limit(Limit(limit_pages))

    def states(self, *pages: int) -> list[str]:
        """Return the states of pages, by name."""
        return [STATE_NAMES[self.table.state[page]] for page in pages]

    def close(self) -> None:
        self.memory.close()
