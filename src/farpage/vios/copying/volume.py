"""A volume that is copied, as its owner sees it: present pages from the new device, others over the relay.

A change goes to both devices and is acknowledged when both have it, so the old one stays whole until the end.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial
from typing import Final, Protocol, TypeAlias

from farpage.blockio import Allocation, BlockIO, BlockLimits, Done, Extent, ExtentsDone, Feature, ReadDone
from farpage.definition.model import PAGE_BYTES
from farpage.vios.copying.copy import PAGE_SHIFT, VolumeCopy

RELAY_DROPPED: Final = errno.ECANCELED
"""Commands of a relay that is not needed any more finish with it: the new device has everything."""
COPYING_FEATURES: Final = (
    Feature.FLUSH | Feature.FUA | Feature.TRIM | Feature.ZERO | Feature.EXTENTS | Feature.MULTI_CONN
)

Begin: TypeAlias = Callable[[Done], None]


class RelayIO(BlockIO, Protocol):
    """The way to the old device; its commands wait while there is no connection."""

    def give_up(self) -> None:
        """Finish every command with ESHUTDOWN, those in flight too, whose data is not looked at any more."""


class CopyingVolume:
    """`BlockIO` over the volume on its new device and a relay to the old one; whole pages only."""

    read_only = False

    def __init__(self, copy: VolumeCopy, target: BlockIO, relay: RelayIO) -> None:
        """Take over `target`, opened for the owner, and `relay`, which is its way to the old device."""
        self.size_bytes = target.size_bytes
        self.features = target.features & COPYING_FEATURES
        self.limits = page_limits(target.limits)
        self._copy = copy
        self._present = copy.presence.present
        self._target = target
        self._relay = relay
        self._given_up = False

    def give_up(self) -> None:
        """Finish what waits for the relay, now and later, with ESHUTDOWN: nobody waits for the answers."""
        self._given_up = True
        self._relay.give_up()

    # Reading

    def read_now(self, offset: int, into: memoryview) -> bool:
        """Fill `into` from the new device if the pages are present."""
        if self._present.find(0, offset >> PAGE_SHIFT, (offset + len(into)) >> PAGE_SHIFT) >= 0:
            return False
        return self._target.read_now(offset, into)

    def read(self, offset: int, length: int, done: ReadDone) -> None:
        """Read each run of pages where it is."""
        start, end = offset >> PAGE_SHIFT, (offset + length) >> PAGE_SHIFT
        if self._present.find(0, start, end) < 0:
            self._target.read(offset, length, done)
            return
        parts = list(self._copy.presence.runs(start, end))
        if len(parts) == 1:
            self._read_absent(offset, length, done)
            return
        assembly = _Assembly(length, len(parts), done)
        for first, last, present in parts:
            at, size = first << PAGE_SHIFT, (last - first) << PAGE_SHIFT
            part_done = partial(assembly.part_done, at - offset, size)
            if present:
                self._target.read(at, size, part_done)
            else:
                self._read_absent(at, size, part_done)

    def _read_absent(self, offset: int, length: int, done: ReadDone) -> None:
        if self._given_up:
            done(errno.ESHUTDOWN, None)
            return
        copy = self._copy
        generation = copy.generation

        def relayed(error: int, payload: memoryview | None) -> None:
            if error == RELAY_DROPPED:
                self._target.read(offset, length, done)
                return
            copy.counters.relayed_reads += 1
            done(error, payload)
            if payload is not None and not error:
                copy.keep(offset, payload, generation)

        self._relay.read(offset, length, relayed)

    def extents(self, offset: int, length: int, done: ExtentsDone) -> None:
        """Report the allocation of the first run of pages; what is absent counts as data."""
        start, end = offset >> PAGE_SHIFT, (offset + length) >> PAGE_SHIFT
        _, stop, present = next(self._copy.presence.runs(start, end))
        size = (stop - start) << PAGE_SHIFT
        if present:
            self._target.extents(offset, size, done)
        else:
            # To ask for it would take as long as to read it.
            done(0, [Extent(size, Allocation.DATA)])

    def cache(self, offset: int, length: int, done: Done) -> None:
        """Refuse."""
        del offset, length
        done(errno.ENOTSUP)

    # Changing

    def write(self, offset: int, data: memoryview, done: Done, *, fua: bool = False) -> None:
        """Write to both devices."""
        on_target = partial(self._target.write, offset, data, fua=fua)
        self._change(offset, len(data), on_target, partial(self._relay.write, offset, data, fua=fua), done)

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
        """Zero on both devices; never `fast`."""
        if fast:
            done(errno.ENOTSUP)
            return

        def begin(io: BlockIO) -> Begin:
            return lambda ended: io.zero(offset, length, ended, punch=punch, fua=fua)

        self._change(offset, length, begin(self._target), begin(self._relay), done)

    def trim(self, offset: int, length: int, done: Done, *, fua: bool = False) -> None:
        """Discard on both devices."""

        def begin(io: BlockIO) -> Begin:
            return lambda ended: io.trim(offset, length, ended, fua=fua)

        self._change(offset, length, begin(self._target), begin(self._relay), done)

    def flush(self, done: Done) -> None:
        """Flush both devices."""
        self._both(self._target.flush, self._relay.flush, True, done)

    def _change(self, offset: int, length: int, on_target: Begin, on_relay: Begin, done: Done) -> None:
        if self._copy.finished:
            on_target(done)
            return
        both = partial(self._both, on_target, on_relay)
        self._copy.change(offset >> PAGE_SHIFT, (offset + length) >> PAGE_SHIFT, both, done)

    def _both(self, on_target: Begin, on_relay: Begin, recording: bool, ended: Done) -> None:
        if self._given_up:
            ended(errno.ESHUTDOWN)
            return
        if self._copy.finished:
            on_target(ended)
            return
        if not recording:
            on_relay(ended)
            return
        left, problem = 2, 0

        def part_ended(error: int) -> None:
            nonlocal left, problem
            problem = problem or error
            left -= 1
            if not left:
                ended(problem)

        on_target(part_ended)
        if problem:  # refused at once, because the owner's lease is over for one
            part_ended(0)
        else:
            on_relay(lambda error: part_ended(0 if error == RELAY_DROPPED else error))

    async def close(self) -> None:
        """Close both."""
        await self._relay.close()
        await self._target.close()


class _Assembly:
    """Puts a read together whose parts come from several places, in any order."""

    def __init__(self, length: int, parts: int, done: ReadDone) -> None:
        self._whole = memoryview(bytearray(length))
        self._left = parts
        self._error = 0
        self._done = done

    def part_done(self, at: int, size: int, error: int, payload: memoryview | None) -> None:
        if payload is not None and not error:
            self._whole[at : at + size] = payload
        self._error = self._error or error
        self._left -= 1
        if not self._left:
            self._done(self._error, None if self._error else self._whole)


def page_limits(limits: BlockLimits) -> BlockLimits:
    """Return limits in whole pages: a part of a page that is absent cannot be changed alone."""
    return BlockLimits(PAGE_BYTES, max(PAGE_BYTES, limits.preferred), max(PAGE_BYTES, limits.maximum))
