"""A volume that is copied, as the intermediate client fills it: changes apply to absent pages alone."""

from __future__ import annotations

import asyncio
import errno

from farpage.blockio import Allocation, BlockLimits, Done, Extent, ExtentsDone, Feature, ReadDone
from farpage.vios.copying.copy import PAGE_SHIFT, VolumeCopy
from farpage.vios.copying.volume import page_limits

EXTENTS_MAX = 4096
"""Extents in one answer."""


class FillVolume:
    """`BlockIO` of an intermediate client; whole pages only.

    A change of pages that are present, or that the client changes, succeeds without effect. Absent pages are
    holes, present ones data. A flush makes durable which pages are present.
    """

    read_only = False
    features = Feature.FLUSH | Feature.ZERO | Feature.EXTENTS | Feature.MULTI_CONN

    def __init__(self, copy: VolumeCopy, limits: BlockLimits) -> None:
        self._copy = copy
        self.size_bytes = copy.presence.pages << PAGE_SHIFT
        self.limits = page_limits(limits)
        self._tasks: set[asyncio.Task[None]] = set()

    def read_now(self, offset: int, into: memoryview) -> bool:
        """Return False."""
        del offset, into
        return False

    def read(self, offset: int, length: int, done: ReadDone) -> None:
        """Refuse: the contents are the client's."""
        del offset, length
        done(errno.EPERM, None)

    def write(self, offset: int, data: memoryview, done: Done, *, fua: bool = False) -> None:
        """Fill."""
        del fua
        self._copy.fill(offset, data, done)

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
        """Fill with zeros, which take no room where the device has holes; never `fast`."""
        del punch, fua
        if fast:
            done(errno.ENOTSUP)
        else:
            self._copy.fill_zeros(offset, length, done)

    def trim(self, offset: int, length: int, done: Done, *, fua: bool = False) -> None:
        """Refuse."""
        del offset, length, fua
        done(errno.ENOTSUP)

    def cache(self, offset: int, length: int, done: Done) -> None:
        """Refuse."""
        del offset, length
        done(errno.ENOTSUP)

    def flush(self, done: Done) -> None:
        """Store which pages are present, after their data."""

        async def store() -> None:
            stored = False
            try:
                stored = await self._copy.store()
            finally:
                done(0 if stored else errno.EIO)

        task = asyncio.get_running_loop().create_task(store())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def extents(self, offset: int, length: int, done: ExtentsDone) -> None:
        """Report which pages are absent."""
        found: list[Extent] = []
        first, last = offset >> PAGE_SHIFT, (offset + length) >> PAGE_SHIFT
        for start, end, present in self._copy.presence.runs(first, last):
            absent = Allocation.HOLE | Allocation.ZERO
            found.append(Extent((end - start) << PAGE_SHIFT, Allocation.DATA if present else absent))
            if len(found) == EXTENTS_MAX:
                break
        done(0, found)

    async def close(self) -> None:
        """Wait for the flushes under way."""
        if self._tasks:
            await asyncio.wait(self._tasks)
