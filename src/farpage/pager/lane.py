"""One client's short way: page-ins that the compiled loop (`_lane.pyx`) does without the interpreter.

It shares the page table with the rest of the pager, and both run in one thread, so one of them is at work at
a time. What the loop does is what `Faults` would have done; here it is told what it must know for that, and
what it has done is taken over before anybody decides by it.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final

from farpage.errors import Unsupported
from farpage.kernel.io_uring import Ring
from farpage.log import get_logger
from farpage.pager.compiled import COMPILED, libraries
from farpage.pager.readahead import ReadAhead
from farpage.pager.space import Space
from farpage.pager.streams import Streams
from farpage.pager.table import PAGE_BYTES

if TYPE_CHECKING:
    from farpage.pager._hub import Hub
    from farpage.pager._lane import Lane

log = get_logger()

READS_IN_FLIGHT: Final = 512
"""Entries of a hub's queue: 256 reads of a page each and 32 of neighbours, rounded up as the kernel does."""
TASTED_TOGETHER: Final = 256
"""The RAM tier is asked what it wants of so many victims at a time."""
_NEVER: Final = 1 << 60


MOST, READING, HIGH, DEFERRED, LOW, WRITABLE, UNWRITABLE, AHEAD = range(8)
"""Places in the array of numbers that the loop goes by."""


def open_hub(epoll: int) -> Hub | None:
    """Make what waits for the events of an epoll descriptor; None where the short way cannot be had."""
    if COMPILED is None or libraries() is None:
        log.info("paging_without_compiled_loops", reason="they were not built, or are not wanted")
        return None
    try:
        return COMPILED.hub(epoll, Ring(READS_IN_FLIGHT))
    except Unsupported as error:
        log.info("paging_without_compiled_loops", reason=error.cause)
        return None


class ShortWay:
    """What one client's pager and its lane know of each other."""

    def __init__(
        self,
        hub: Hub,
        space: Space,
        streams: Streams,
        *,
        zero_ahead: ReadAhead,
        write_ahead: ReadAhead,
        on_attention: Callable[[], None],
        ask: Callable[[int, bool, float], None],
        deferred: Callable[[], int],
    ) -> None:
        """`on_attention` is called when there is something in `left` or `back`, or to be seen to otherwise.

        By `zero_ahead` and `write_ahead` sequential writers are found, of new pages and of clean ones.

        `ask(page, write, began_seconds)` asks the volume for a page that is READING already, negative where
        nobody waits for it; `deferred` tells how many accesses wait for room.
        """
        assert COMPILED is not None
        store, order = space.tier.store, space.replacement
        assert isinstance(store, COMPILED.store)
        assert isinstance(order, COMPILED.order)
        assert isinstance(streams, COMPILED.streams)
        assert isinstance(zero_ahead, COMPILED.read_ahead)
        assert isinstance(write_ahead, COMPILED.read_ahead)
        self._space = space
        self._streams = streams
        self.glance: Final = hub.glance
        """Answer accesses that have come meanwhile."""
        self._ask = ask
        self._deferred = deferred
        self._marks = array("q", [0] * (AHEAD + 1))
        table = space.table
        self._lane: Lane = COMPILED.lane(
            hub,
            space.memory.fileno(),
            space.memory.start_address,
            *space.memory.memfd,
            table.state,
            table.checksum,
            table.counts,
            self._marks,
            store,
            order,
            streams,
            zero_ahead,
            write_ahead,
            on_attention,
        )
        self.refresh()
        self._lane.turn(on=True)
        self.follow_volume()

    @property
    def in_flight(self) -> int:
        """Accesses that wait for its reads."""
        return self._lane.in_flight

    # What the loop is told

    def refresh(self) -> None:
        """Tell the loop how much room there is now, and who waits for some."""
        space, marks = self._space, self._marks
        limit = space.limit
        held_pages = space.volume.held_bytes // PAGE_BYTES
        marks[MOST] = limit.most
        marks[READING] = limit.reading
        marks[WRITABLE] = limit.in_flight + held_pages + space.doubtful_pages
        marks[UNWRITABLE] = -1 if space.unwritable_page is None else space.unwritable_page
        if space.page_outs_wait or limit.pages >= space.table.pages:
            marks[HIGH] = _NEVER
        else:
            # Held back with a server that failed: those stay, though they are being written.
            marks[HIGH] = (limit.low if space.paging_out else limit.high) - held_pages
            marks[LOW] = limit.low - held_pages
        marks[DEFERRED] = self._deferred()
        if self._lane.taste <= 0 and not space.page_outs_wait:
            self._lane.taste = space.tier.wanted(TASTED_TOGETHER)
        marks[AHEAD] = limit.ahead
        self._lane.look()

    def turn(self, *, on: bool) -> None:
        """Let the loop answer accesses, or leave all of them to the interpreter."""
        self._lane.turn(on)

    def follow_volume(self) -> None:
        """Read what the volume allows, which is another one now."""
        shortcut = self._space.volume.shortcut
        if shortcut is not None:
            shortcut.on_change = self._changed
        self._changed(useless=True)

    def _changed(self, useless: bool) -> None:
        if self._space.closed:
            return
        shortcut = self._space.volume.shortcut
        place = shortcut.place if shortcut is not None else None
        if place is None:
            self._lane.use(-1, 0, 0.0)
        else:
            self._lane.use(*place)
        if useless:
            self.ask_all()

    # Pages that are to be given back

    @property
    def leaving(self) -> int:
        """Pages that are about to be given back or got ready to be written."""
        return self._lane.offered + self._lane.chosen

    def evict(self, count: int, taste: int) -> None:
        """Choose victims, which leave while nothing else is to be done.

        Of those that are just given back, `taste` are offered to the RAM tier before.
        """
        self._lane.evict(count, taste)

    @property
    def wants_buffer(self) -> bool:
        """Whether there are dirty victims, and nowhere to read them to."""
        return self._lane.wants_buffer

    @property
    def is_ready(self) -> bool:
        """Whether there is something in the buffer to be written."""
        return self._lane.is_ready

    def lend(self, buffer: memoryview) -> None:
        """Have dirty victims got ready in a buffer, until `take` or `recall`."""
        self._lane.lend(buffer)

    def give_up_buffer(self) -> bool:
        """Have the buffer back where nothing is in it; tells whether it is back."""
        return self._lane.give_up_buffer()

    def take(self) -> tuple[list[tuple[int, int, int]], list[int]]:
        """Take what is to be written, which is protected, and the buffer back.

        Returns `(first, count, place in the buffer, in pages)` for each run, rising, and the pages that
        cannot be protected at the moment, which are in no queue.

        :raise OSError: the client's memory cannot be read.
        """
        return self._lane.take()

    def acknowledged(self, runs: list[tuple[int, int, int]], buffer: memoryview, taste: int) -> None:
        """Have pages given back whose write was acknowledged, but those that were written to meanwhile.

        `runs` are those of `take`. The first `taste` pages are offered to the RAM tier.
        """
        self._lane.acknowledged(runs, buffer, taste)

    def checksums(self, content: memoryview) -> list[int]:
        """Return the checksum of each page in a run of whole pages."""
        return self._lane.checksums(content)

    def give_back(self, pages: int) -> None:
        """Give back so many of the pages that are to be, or all, now: there is little room."""
        self._lane.give_back(pages)

    def recall(self) -> None:
        """Let no more pages leave: the victims stay in memory, and the buffer is free."""
        self._lane.recall()

    # What it has done

    def left(self) -> list[tuple[int, int, float]]:
        """Take the accesses that it leaves to the interpreter, as `(page, flags, began_seconds)`."""
        return self._lane.left()

    def fetch(self, pages: range, *, write: bool) -> tuple[int, list[tuple[int, int]]]:
        """Read those of some pages ahead that are on the device.

        Returns how many that are, and as runs `(first, count)` those for which no read can be begun here.
        """
        begun, left = self._lane.fetch(pages, write)
        return begun, [(page, 1) for page in left]

    def fetch_near(self, page: int, count: int, *, write: bool, began_seconds: float) -> int:
        """Read up to `count` pages that are on the device, from one on that somebody waits for.

        Returns how many that are; 0 when no read can be begun here.
        """
        return self._lane.fetch_near(page, count, write, began_seconds)

    def fetch_runs(
        self, runs: Iterable[tuple[int, int]], *, write: bool
    ) -> tuple[int, list[tuple[int, int]]]:
        """Do what `fetch` does for runs of at most 64 neighbours, each with few reads."""
        begun, left = 0, []
        for first, count in runs:
            more, rest = self._lane.fetch_run(first, count, write)
            begun += more
            left += rest
        return begun, left

    def join(self, page: int, *, write: bool) -> bool:
        """Let an access wait for a read that is in flight here; False when there is none of its page."""
        return self._lane.join(page, write)

    def ask_all(self) -> None:
        """Ask the volume for everything that is being read here, which may never come."""
        for read in self._lane.withdraw():
            self._ask(*read)
        self._space.volume.push()

    def ask_again(self) -> None:
        """Ask the volume for what did not come, or not as it should."""
        shortcut = self._space.volume.shortcut
        for page, write, late, began_seconds in self._lane.back():
            if late and shortcut is not None:
                shortcut.failed()
            self._ask(page, write, began_seconds)

    def settle(self) -> None:
        """Count what it has done."""
        space, counters = self._space, self._space.counters
        faults, read, from_tier, zeroed, given_back, zeros, ahead, buckets, waited, longest, stalls = (
            self._lane.counted()
        )
        counters.faults += faults
        counters.clean_evict_pages += given_back
        counters.zero_evict_pages += zeros
        counters.read_ahead_pages += ahead
        counters.read_ahead_wasted_pages = self._streams.wasted_pages
        if not any(buckets) and not (read or from_tier or zeroed):
            return
        counters.page_in_pages += read
        counters.tier_hit_pages += from_tier
        counters.zero_fill_pages += zeroed
        counters.waits(buckets, waited, longest)
        for began_seconds, ended_seconds in stalls:
            counters.stalled(ended_seconds - began_seconds)
            space.volume.failovers.note_stall(began_seconds, ended_seconds)
        shortcut = space.volume.shortcut
        if read and shortcut is not None:
            shortcut.answered(read, waited / (read + from_tier + zeroed))

    def close(self) -> None:
        """Touch nothing of the client any more."""
        self._lane.close()
