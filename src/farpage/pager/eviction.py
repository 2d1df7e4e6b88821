"""Page-out: victims in small slices, so that faults never wait behind a big one.

The way of a slice: victims -> clean ones are given back at once -> the others are write-protected, read
from the memfd and checked for zeros -> zero pages are given back without I/O -> runs of the rest are written
to the volume -> when a write is acknowledged, the pages that nobody wrote to meanwhile are given back.

On the short way (`farpage.pager.lane`) all of that but the writes is done between events, one run at a time.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final

from farpage.nbd import eventloop
from farpage.pager.buffers import BUFFER_BYTES, SharedBuffer
from farpage.pager.checksum import checksums_of, zero_pages
from farpage.pager.space import Space, ends_with_client
from farpage.pager.states import CLEAN, DIRTY, ON_DEVICE, REWRITTEN, WRITING, ZERO
from farpage.pager.table import PAGE_BYTES, runs_of

if TYPE_CHECKING:
    from farpage.pager.lane import ShortWay

SLICE_PAGES: Final = BUFFER_BYTES // PAGE_BYTES
SLICE_RUNS: Final = 16
"""A slice is as long as its system calls and commands, which come by runs of pages: some 50 us each. Faults
that come meanwhile wait for its end."""
PACE_SECONDS: Final = 0.1
"""The marks of the limit follow the client's pace at least so often, while it has one."""
CHOSEN_PAGES: Final = 256
"""Victims that the short way chooses at a time when it is told to."""
RETRY_SECONDS: Final = 0.001


class Eviction:
    """Keeps one client within its limit."""

    def __init__(self, space: Space, on_room: Callable[[], None]) -> None:
        """`on_room` is called when pages were given back."""
        self._space = space
        self._on_room = on_room
        self._loop = asyncio.get_running_loop()
        self._scheduled: asyncio.Handle | None = None
        self._running = False
        self._stopped = False
        self._draining = False
        self._waking = False
        self._paced_seconds = self._loop.time()
        self._paced_pages = 0
        self._victims: list[int] = []
        """Chosen and rising, for the next slices: they are in no queue."""
        self._lent: SharedBuffer | None = None
        """Where the short way gets pages ready to be written."""
        self._taking = False

    def wake(self) -> None:
        """Page out when the client is above its mark; returns at once."""
        if self._scheduled is not None:
            return
        space = self._space
        short = None if space.page_outs_wait else space.short
        if short is not None:
            self._wake_shortly(short)
        elif not self._stopped and self._excess() > 0:
            self._scheduled = self._loop.call_soon(self._slice)
        space.paging_out = self._running
        space.changed()

    def _wake_shortly(self, short: ShortWay) -> None:
        if self._loop.time() - self._paced_seconds > PACE_SECONDS:
            self._follow_pace()
        if self._stopped:
            return
        if (excess := self._excess()) > 0:
            count = min(excess, CHOSEN_PAGES)
            short.evict(count, self._tier_wants(count))
        self._lend(short)
        if short.is_ready and not self._taking:
            self._taking = True
            self._loop.call_soon(self._write_shortly)  # after the accesses that came meanwhile

    def _lend(self, short: ShortWay) -> None:
        """See that there is a buffer for dirty victims while page-outs go on, and none while they do not."""
        if self._lent is None and (self._running or short.wants_buffer):
            self._lent = SharedBuffer(self._space.buffers)
            short.lend(self._lent.view)
        elif self._lent is not None and not self._running and not short.leaving and short.give_up_buffer():
            self._lent.release()
            self._lent = None

    def stop(self) -> None:
        """Page out no more; pages whose write is in flight stay in memory."""
        self._stopped = True
        if self._scheduled:
            self._scheduled.cancel()
            self._scheduled = None
        self._put_back()

    def _put_back(self) -> None:
        """Let the victims stay that have not left."""
        victims, self._victims = self._victims, []
        for first, count in runs_of(victims):
            self._space.replacement.added(first, count)
        if self._space.short is not None:
            self._space.short.recall()
        lent, self._lent = self._lent, None
        if lent is not None:
            lent.release()

    def resume(self) -> None:
        """Take back `stop`."""
        self._stopped = False
        self.wake()

    def drain(self, *, on: bool) -> None:
        """Page out all that there is, whatever the limit; or no more than that again."""
        self._draining = on
        if on:
            self._put_back()
            self._space.tier.clear()
        self.wake()

    def _excess(self) -> int:
        """Pages that should leave, beyond those that are leaving; between the marks, only once begun.

        Those held back from a failed server leave when that is fenced, whenever that is.
        """
        space = self._space
        if space.limit.pages >= space.table.pages and not self._draining:
            return 0  # it may have all of its memory
        taken = space.taken
        if taken <= space.limit.high and not self._running and not self._draining:
            return 0
        leaving = 0 if space.page_outs_wait else max(space.table.counts[WRITING] - self._held_pages, 0)
        if space.short is not None:
            leaving += space.short.leaving
        staying = taken - leaving
        if self._draining:
            return staying
        if staying > space.limit.high and not self._running:
            self._follow_pace()
            self._running = staying > space.limit.high
        excess = staying - space.limit.low
        if excess <= 0:
            self._running = False
        return excess if self._running else 0

    def _follow_pace(self) -> None:
        """Set the marks by how many pages have come into memory since the last time."""
        counters = self._space.counters
        pages = counters.zero_fill_pages + counters.page_in_pages + counters.tier_hit_pages
        now = self._loop.time()
        self._space.limit.follow(pages - self._paced_pages, now - self._paced_seconds)
        self._paced_pages, self._paced_seconds = pages, now

    @property
    def _held_pages(self) -> int:
        return self._space.volume.held_bytes // PAGE_BYTES

    @ends_with_client
    def _slice(self) -> None:
        self._scheduled = None
        space = self._space
        if space.page_outs_wait:
            self._put_back()
            self._release_clean_ones()
            return
        if space.short is not None:  # they waited when this was scheduled
            self.wake()
            return
        victims = self._next_victims()
        states = space.table.state
        dirty = [page for page in victims if states[page] == DIRTY]
        if space.unwritable_page in dirty:
            dirty.remove(space.unwritable_page)
            space.replacement.added(space.unwritable_page)
        try:
            freed = self._release_clean([page for page in victims if states[page] == CLEAN])
            if dirty:
                freed += self._write(dirty)
        except OSError:
            self._let_stay(victims)
            raise
        if freed:
            self._on_room()
        if freed or dirty or self._victims:
            self.wake()

    def _next_victims(self) -> list[int]:
        """Return the pages of the next slice, rising."""
        space = self._space
        victims = self._victims
        if not victims:
            counts = space.table.counts
            waiting = self._held_pages + space.doubtful_pages
            budget = space.limit.in_flight + waiting - counts[WRITING] - counts[REWRITTEN]
            victims = space.replacement.victims(max(min(self._excess(), SLICE_PAGES, budget), 0))
            victims.sort()
        slice_of = victims
        runs = runs_of(slice_of)
        if len(runs) > SLICE_RUNS:
            slice_of = slice_of[: bisect_left(slice_of, runs[SLICE_RUNS][0])]
        self._victims = victims[len(slice_of) :]
        return slice_of

    def _release_clean_ones(self) -> None:
        """Give back what the volume has already; it cannot take the others, which go on in the queue."""
        space = self._space
        states = space.table.state
        victims = sorted(space.replacement.victims(min(self._excess(), SLICE_PAGES)))
        try:
            freed = self._release_clean([page for page in victims if states[page] == CLEAN])
        finally:
            self._let_stay(victims)
        if freed:
            self._on_room()
            self.wake()

    def _let_stay(self, victims: list[int]) -> None:
        """Put those back into the order that have neither left nor begun to be written."""
        space = self._space
        states = space.table.state
        for page in victims:
            if states[page] in {CLEAN, DIRTY}:
                space.replacement.added(page)

    def _release_clean(self, pages: list[int]) -> int:
        """Give back pages whose content is on the volume already."""
        space = self._space
        for first, count in runs_of(pages):
            self._keep_clean(first, count)
            space.memory.release(first, count)
            space.table.move(first, count, CLEAN, ON_DEVICE)
            space.replacement.evicted(first, count)
        space.counters.clean_evict_pages += len(pages)
        return len(pages)

    def _keep_clean(self, first: int, count: int) -> None:
        """Put clean pages into the RAM tier, as far as it wants them."""
        space = self._space
        if wanted := self._tier_wants(count):
            buffer = space.buffers.take()
            content = buffer.view[: wanted * PAGE_BYTES]
            try:
                space.memory.read_out(first, content)
                space.tier.keep(first, content)
            finally:
                space.buffers.give(buffer)

    def _tier_wants(self, count: int) -> int:
        """Return how many pages of a run should go to the RAM tier: none while that would only take room."""
        return 0 if self._draining or self._space.page_outs_wait else self._space.tier.wanted(count)

    def _write(self, pages: list[int]) -> int:
        """Start to write pages out; returns how many were zero and are given back already."""
        buffer = SharedBuffer(self._space.buffers)
        offset = freed = 0
        try:
            for first, count in runs_of(pages):
                freed += self._write_run(first, count, buffer, offset)
                offset += count * PAGE_BYTES
        finally:  # what has begun goes on
            buffer.release()
            self._space.volume.push()
        return freed

    @ends_with_client
    def _write_shortly(self) -> None:
        """Write what the short way has got ready."""
        self._taking = False
        space, short, buffer = self._space, self._space.short, self._lent
        if short is None or buffer is None or not short.is_ready:
            return
        self._lent = None
        try:
            runs, busy = short.take()
            if busy:  # the client's mappings are changing
                for page in busy:
                    space.replacement.added(page)
                self._loop.call_later(RETRY_SECONDS, self.wake)
            if runs:
                buffer.use()
                written = partial(self._shortly_written, runs, buffer)
                space.volume.write_runs(
                    [(first * PAGE_BYTES, buffer.content(at, count)) for first, count, at in runs], written
                )
                short.glance()  # to send so much takes its time
                space.volume.push()
        finally:
            buffer.release()
        self._lend(short)

    def _shortly_written(self, runs: list[tuple[int, int, int]], buffer: SharedBuffer, error: int) -> None:
        space = self._space
        if error or self._stopped or space.closed or space.short is None:
            for first, count, at in runs:
                self._acknowledged(first, count, buffer.content(at, count), error)
        else:
            pages = sum(count for _, count, _ in runs)
            space.short.acknowledged(runs, buffer.view, self._tier_wants(pages))
            space.counters.page_out_pages += pages
            if not self._waking:
                self._waking = True
                eventloop.defer(self._loop, self._wake)
        buffer.release()

    @ends_with_client
    def _wake(self) -> None:
        """Do so once for all writes that were acknowledged together."""
        self._waking = False
        self.wake()

    def _write_run(self, first: int, count: int, buffer: SharedBuffer, offset: int) -> int:
        space = self._space
        if not space.memory.protect(first, count):  # the client's mappings are changing
            space.replacement.added(first, count)
            self._loop.call_later(RETRY_SECONDS, self.wake)
            return 0
        content = buffer.view[offset : offset + count * PAGE_BYTES]
        space.memory.read_out(first, content)
        zeros = [first + index for index in zero_pages(content)]
        if not zeros:
            self._write_pages(first, count, buffer, offset)
            return 0
        for start, length in runs_of(zeros):
            space.memory.release(start, length)
            space.table.move(start, length, DIRTY, ZERO)
        space.counters.zero_evict_pages += len(zeros)
        gone = set(zeros)
        for start, length in runs_of([page for page in range(first, first + count) if page not in gone]):
            self._write_pages(start, length, buffer, offset + (start - first) * PAGE_BYTES)
        return len(zeros)

    def _write_pages(self, first: int, count: int, buffer: SharedBuffer, offset: int) -> None:
        table = self._space.table
        at = offset // PAGE_BYTES
        content = buffer.view[offset : offset + count * PAGE_BYTES]
        table.checksums[first : first + count] = checksums_of(buffer.pages[at : at + count])
        table.move(first, count, DIRTY, WRITING)
        buffer.use()
        written = partial(self._written, first, count, content, buffer)
        self._space.volume.write(first * PAGE_BYTES, content, written)

    def _written(self, first: int, count: int, content: memoryview, buffer: SharedBuffer, error: int) -> None:
        self._acknowledged(first, count, content, error)
        buffer.release()

    @ends_with_client
    def _acknowledged(self, first: int, count: int, content: memoryview, error: int) -> None:
        """Give back the pages of an acknowledged write, but those that were written to meanwhile."""
        space = self._space
        table = space.table
        freed = 0
        for start, length, state in table.runs(first, count):
            if state == REWRITTEN:
                table.move(start, length, REWRITTEN, DIRTY)
                space.replacement.returned(start, length)
            elif error:  # the volume was closed
                table.move(start, length, WRITING, DIRTY)
                space.replacement.added(start, length)
            else:
                # First of all the table says that the volume has it: a pager that is started in the place of
                # this one could not tell a page that was given back here from one that the balloon took.
                table.move(start, length, WRITING, CLEAN)
                if self._stopped:
                    space.replacement.added(start, length)
                    continue
                if wanted := self._tier_wants(length):
                    at = (start - first) * PAGE_BYTES
                    space.tier.keep(start, content[at : at + wanted * PAGE_BYTES])
                space.memory.release(start, length)
                table.move(start, length, CLEAN, ON_DEVICE)
                space.replacement.evicted(start, length)
                freed += length
        if not error:
            space.counters.page_out_pages += count
        if freed:
            self._on_room()
        self.wake()
