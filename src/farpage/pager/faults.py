"""Page faults: events -> page table -> zeros, or a read of the volume -> verify -> copy into the client.

Everything runs on one event loop, so the page table never changes within a step; what can change meanwhile
is the client. An event may be stale: two threads that touch one page raise two, and the second is read when
the page is long there, or gone again.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Final, NamedTuple

from farpage.kernel.memory import address_of
from farpage.kernel.userfaultfd import FLAG_MINOR, FLAG_WP, FLAG_WRITE
from farpage.nbd import eventloop
from farpage.pager.checksum import page_checksum, page_checksums
from farpage.pager.lane import ShortWay
from farpage.pager.memory import CannotPoison, ClientGone
from farpage.pager.readahead import new_read_ahead
from farpage.pager.salvage import Salvage, Salvaged
from farpage.pager.space import Space, ends_with_client
from farpage.pager.states import CLEAN, DIRTY, ON_DEVICE, POISONED, READING, REWRITTEN, WRITING, ZERO
from farpage.pager.streams import Ahead, new_streams, pieces
from farpage.pager.table import PAGE_BYTES, runs_of

if TYPE_CHECKING:
    from farpage.pager._hub import Hub

RETRY_SECONDS: Final = 0.001
"""Pause after an EAGAIN: the client's mappings are changing, or a remove event is pending."""

LITTLE_ROOM_PAGES: Final = 512
"""With less, clean pages that are about to be given back are so at once: two of the largest windows."""

NEAR_PAGES: Final = 8
"""Pages that are brought in with the one that is waited for; the rest of a window comes behind them."""

WRITE_AHEAD_PAGES: Final = 32
"""Most clean pages that are given to a sequential writer at one fault; each is paged out again if it isn't
written to, so a writer that leaves out pages gets single ones."""


class Fault(NamedTuple):
    """One access that waits; `flags` are those of the event, `began_seconds` when it was read."""

    page: int
    flags: int
    began_seconds: float


class Faults:
    """Answers one client's page faults."""

    def __init__(self, space: Space) -> None:
        self._space = space
        self.on_pressure: Callable[[], None] = lambda: None
        """Called after pages were brought in."""
        self._loop = asyncio.get_running_loop()
        self._streams = new_streams(space.table.pages)
        self._zero_ahead = new_read_ahead()
        self._write_ahead = new_read_ahead(WRITE_AHEAD_PAGES, gaps=False)
        self._waiting: dict[int, float] = {}
        self._write_wanted: set[int] = set()
        self._deferred: deque[Fault] = deque()
        self._admitting = False
        self._came: list[tuple[int, int]] = []
        """Runs that came into memory and are not in the order of replacement yet."""
        self._waits: list[tuple[float, float]] = []
        """Accesses that were answered and not counted yet: when they began and ended."""
        self.salvage = Salvage(space)
        self._salvaging: set[asyncio.Task[None]] = set()
        self.stopped = False
        self.frozen = False
        """No access is answered: the client is about to go to another hypervisor."""

    @property
    def stalled(self) -> int:
        """Accesses that wait now."""
        short = self._space.short
        return len(self._waiting) + len(self._deferred) + (short.in_flight if short else 0)

    # The short way

    def shorten(self, hub: Hub) -> None:
        """Have the compiled loop answer what it can from now on."""
        self._space.short = ShortWay(
            hub,
            self._space,
            self._streams,
            zero_ahead=self._zero_ahead,
            write_ahead=self._write_ahead,
            on_attention=self._on_attention,
            ask=self._ask_again,
            deferred=lambda: len(self._deferred),
        )

    def follow_volume(self) -> None:
        """Go on with the volume that the space has now."""
        if self._space.short is not None:
            self._space.short.follow_volume()
            self._space.volume.push()

    def stop(self) -> None:
        """Bring everything in from now on, whatever the limit, and nothing ahead."""
        self.stopped = True
        if self._space.short is not None:
            self._space.short.turn(on=False)
            self._space.short.ask_all()

    def resume(self) -> None:
        """Take back `stop`."""
        self.stopped = False
        if self._space.short is not None:
            self._space.short.turn(on=True)

    def close(self) -> None:
        """Answer nothing any more."""
        short, self._space.short = self._space.short, None
        if short is not None:
            short.close()

    @ends_with_client
    def _on_attention(self) -> None:
        """Do what the short way has left."""
        short = self._space.short
        if short is None:
            return
        short.settle()
        left = short.left()
        if not self.frozen:  # else who waits asks again when it is not any more
            for page, flags, began_seconds in left:
                self._answer(Fault(page, flags, began_seconds))
                short.glance()
        short.ask_again()
        self._space.volume.push()
        if self._deferred:
            self.admit()
        short.glance()
        self.on_pressure()

    def _ask_again(self, page: int, write: bool, began_seconds: float) -> None:
        """Ask the volume for a page that the short way has begun to read, in vain.

        Nobody waits for one with a negative `began_seconds`, which was read ahead.
        """
        if began_seconds >= 0:
            self._waiting[page] = began_seconds
        if write:
            self._write_wanted.add(page)
        self._space.volume.read(page * PAGE_BYTES, PAGE_BYTES, partial(self._page_arrived, page))

    # Hot path: from the events to the commands

    @ends_with_client
    def on_events(self) -> None:
        """Read a batch of events and answer or start to answer each."""
        faults = self._space.memory.read_faults()
        if not faults:
            return
        now = self._loop.time()
        for flags, page in faults:
            self._answer(Fault(page, flags, now))
        self._space.counters.faults += len(faults)
        self._space.volume.push()
        self.on_pressure()

    def _answer(self, fault: Fault) -> None:
        page = fault.page
        if fault.flags & FLAG_WP:
            self._write_to_protected(fault)
            return
        state = self._space.table.state[page]
        if fault.flags & FLAG_MINOR:
            if state not in (ON_DEVICE, ZERO, READING, POISONED):
                self._map(fault, state)
                return
            # Somebody other than the client and us filled the hole; what counts is what the table says.
            self._space.memory.release(page, 1)
        if state == ON_DEVICE:
            self._page_in(fault)
        elif state == ZERO:
            self._fill(fault)
        elif state == READING:
            short = self._space.short
            if short is None or not short.join(page, write=bool(fault.flags & FLAG_WRITE)):
                self._waiting.setdefault(page, fault.began_seconds)
                if fault.flags & FLAG_WRITE:
                    self._write_wanted.add(page)
            if page in self._streams.markers:
                self._read_ahead(fault, self._ahead(page, self._space.room))
        elif state == POISONED:
            self._poison(page)
        else:
            self._refill(fault, state)

    # From here to the end of the section the table changes first, since the table is what a worker that is
    # started in the place of a killed one goes by: a clean page that it calls dirty costs a write, a
    # written one that it calls clean would be given back.

    def _write_to_protected(self, fault: Fault) -> None:
        """Let a write through; it makes a clean page dirty and an on-going page-out of it useless."""
        table = self._space.table
        page, state = fault.page, table.state[fault.page]
        ahead = 1
        if state == CLEAN:
            ahead = table.run(page, self._write_ahead.window(page), CLEAN)
            table.move(page, ahead, CLEAN, DIRTY)
        elif state == WRITING:
            table.put(page, REWRITTEN)
            self._space.counters.cancelled_pages += 1
        if not self._space.memory.unprotect(page, ahead):
            self._later(fault)

    def _map(self, fault: Fault, state: int) -> None:
        """Answer a fault on a page that is in memory but not in the client's page table."""
        protect = state in (CLEAN, WRITING) and not fault.flags & FLAG_WRITE
        if not protect:
            self._dirtied(fault.page, state)
        try:
            if not self._space.memory.map_in(fault.page, protect=protect):
                self._later(fault)
        except (FileExistsError, FileNotFoundError):  # stale; or the balloon took it: then it faults anew
            self._as_it_was(fault.page, state)

    def _refill(self, fault: Fault, state: int) -> None:
        """Answer a missing fault on a page believed in memory: a stale event, or the balloon took it."""
        self._dirtied(fault.page, state)
        try:
            if not self._space.memory.zero_in(fault.page, 1):
                self._later(fault)
        except FileExistsError:
            self._as_it_was(fault.page, state)

    def _dirtied(self, page: int, state: int) -> None:
        if state == CLEAN:
            self._space.table.put(page, DIRTY)
        elif state == WRITING:
            self._space.table.put(page, REWRITTEN)

    def _as_it_was(self, page: int, state: int) -> None:
        """Take back `_dirtied`: the event was stale, a page that is present is still protected if it was."""
        self._space.table.put(page, state)
        self._space.memory.wake(page, 1)

    def _fill(self, fault: Fault) -> None:
        """Answer a first touch with zeros, and ahead of a sequential writer those that follow."""
        space = self._space
        room = self._room(fault)
        if room <= 0:
            return
        count = space.table.run(fault.page, min(self._zero_ahead.window(fault.page), room), ZERO)
        try:
            done = space.memory.zero_in(fault.page, count)
        except FileExistsError:  # filled by somebody else: it is in memory all the same
            done = 1
            space.memory.wake(fault.page, 1)
        if not done:
            self._later(fault)
            return
        space.table.move(fault.page, done, ZERO, DIRTY)
        space.replacement.added(fault.page, done)
        space.counters.zero_fill_pages += done
        space.waited(fault.began_seconds, self._loop.time())

    def _page_in(self, fault: Fault) -> None:
        room = self._room(fault)
        if room <= 0:
            return
        page = fault.page
        marker = page in self._streams.markers
        ahead = self._ahead(page, room)
        if not self._fetch_near(fault, ahead):
            self._waiting[page] = fault.began_seconds
            if fault.flags & FLAG_WRITE:
                self._write_wanted.add(page)
            self._fetch_one(fault, ahead, marker=marker)
        self._read_ahead(fault, ahead)

    def _fetch_near(self, fault: Fault, ahead: Ahead | None) -> bool:
        """Have the short way read the first pages of a window; tells whether it does."""
        space, page = self._space, fault.page
        short = space.short
        if short is None or ahead is None or ahead.step != 1 or ahead.first != page + 1 or page in space.tier:
            return False
        most = min(ahead.length + 1, NEAR_PAGES)
        write = bool(fault.flags & FLAG_WRITE)
        near = short.fetch_near(page, most, write=write, began_seconds=fault.began_seconds)
        space.counters.read_ahead_pages += max(near - 1, 0)
        return near > 0

    def _fetch_one(self, fault: Fault, ahead: Ahead | None, *, marker: bool) -> None:
        """Bring in a page that is waited for, from the RAM tier or the volume."""
        space, page = self._space, fault.page
        if page in space.tier and (content := space.tier.take(page, space.table.checksum[page])) is not None:
            if not marker:
                space.counters.tier_hit_pages += 1
            space.table.move(page, 1, ON_DEVICE, READING)
            self._copy_in(page, 1, address_of(content), memoryview(content))
        elif ahead and ahead.first == page + 1 and ahead.step == 1:
            # The page that is waited for comes with a few others, not at the end of the whole window.
            near = space.table.run(page, min(ahead.length + 1, NEAR_PAGES), ON_DEVICE)
            space.counters.read_ahead_pages += near - 1
            if fault.flags & FLAG_WRITE:
                self._write_wanted.update(range(page, page + near))
            self.fetch(page, near)
        else:
            self.fetch(page, 1)

    def _ahead(self, page: int, room: int) -> Ahead | None:
        """Return what should be read ahead, now that somebody asks for a page."""
        if self.stopped:
            return None
        ahead = self._streams.fault(page, min(room // 2, self._space.limit.ahead))
        return Ahead._make(ahead) if ahead else None

    def _read_ahead(self, fault: Fault, ahead: Ahead | None) -> None:
        """Bring in what is not in memory of a window."""
        if ahead is None:
            return
        self._space.counters.read_ahead_wasted_pages = self._streams.wasted_pages
        # A sequential writer is about to write to what is read ahead for it, too.
        write = bool(fault.flags & FLAG_WRITE)
        short = self._space.short
        if short is not None:
            if ahead.step in (1, -1):
                begun, left = short.fetch_runs(pieces(ahead), write=write)
            else:
                begun, left = short.fetch(ahead.pages(), write=write)
            self._space.counters.read_ahead_pages += begun
            for start, length in left:
                self._fetch_ahead(start, length, write=write)
            return
        for first, count in pieces(ahead):
            for start, length, state in self._space.table.runs(first, count):
                if state == ON_DEVICE:
                    self._fetch_ahead(start, length, write=write)

    def _fetch_ahead(self, first: int, count: int, *, write: bool) -> None:
        self._space.counters.read_ahead_pages += count
        if write:
            self._write_wanted.update(range(first, first + count))
        self.fetch(first, count)

    def _room(self, fault: Fault) -> int:
        """Return the pages that may be brought in; with none, the fault waits for page-outs."""
        room = self._space.room
        short = self._space.short
        if room < LITTLE_ROOM_PAGES and short is not None:
            short.give_back(LITTLE_ROOM_PAGES - room)
            room = self._space.room
        if self.stopped:
            return max(room, 64)
        if room <= 0:
            self._deferred.append(fault)
            self._space.changed()
        return room

    def _later(self, fault: Fault) -> None:
        self._loop.call_later(RETRY_SECONDS, self._again, fault)

    @ends_with_client
    def _again(self, fault: Fault) -> None:
        if not self.frozen:
            self._answer(fault)
            self._space.volume.push()
            self.on_pressure()

    def admit(self) -> None:
        """Answer the faults that waited for room."""
        if self._admitting:  # a page that one of them waited for has come at once, and left room
            return
        self._admitting = True
        try:
            deferred = self._deferred
            while deferred and self._space.room > 0 and not self.frozen:
                self._answer(deferred.popleft())
        finally:
            self._admitting = False
        self._space.volume.push()

    def _admit_more(self) -> None:
        self.admit()
        self.on_pressure()

    # Hot path: from the payloads to the client

    def fetch(self, first: int, count: int) -> None:
        """Bring in `count` pages that are all ON_DEVICE."""
        space = self._space
        space.table.move(first, count, ON_DEVICE, READING)
        space.tier.forget(first, count)
        arrived = partial(self._page_arrived, first) if count == 1 else partial(self._arrived, first, count)
        space.volume.read(first * PAGE_BYTES, count * PAGE_BYTES, arrived)

    def _page_arrived(self, page: int, error: int, payload: memoryview | None) -> None:
        """Do what `_arrived` does for one page, the short way as long as nothing is special about it."""
        space = self._space
        table = space.table
        if (
            space.closed
            or error
            or payload is None
            or table.state[page] != READING
            or page_checksum(payload) != table.checksum[page]
            or page in self._streams.markers
        ):
            self._arrived(page, 1, error, payload)
            return
        dirty = page in self._write_wanted
        try:
            done = space.memory.copy_in(page, address_of(payload), 1, protect=not dirty)
        except FileExistsError:
            done = 0
        except ClientGone:
            space.on_gone()
            return
        if not done:
            self._arrived(page, 1, 0, payload)
            return
        self._came_in(page, 1, DIRTY if dirty else CLEAN)
        space.counters.page_in_pages += 1
        if self._deferred:
            self._admit_more()

    @ends_with_client
    def _arrived(self, first: int, count: int, error: int, payload: memoryview | None) -> None:
        space = self._space
        table = space.table
        if error or payload is None:  # the volume was closed
            for start, length in self._still_reading(first, count):
                table.move(start, length, READING, ON_DEVICE)
            return
        expected = table.checksums[first : first + count].tolist()
        found = page_checksums(payload) if space.short is None else space.short.checksums(payload)
        good = self._still_reading(first, count)
        if found != expected:
            pages = [page for start, length in good for page in range(start, start + length)]
            good = runs_of([page for page in pages if found[page - first] == expected[page - first]])
            if wrong := [page for page in pages if found[page - first] != expected[page - first]]:
                self._mismatched(wrong)
        source = address_of(payload)
        if self._streams.markers:
            good = self._without_markers(good, first, payload)
        for start, length in good:
            self._copy_in(start, length, source + (start - first) * PAGE_BYTES, payload)
        space.counters.page_in_pages += count
        if self._deferred:  # what was held back may have left room
            self._admit_more()

    def _without_markers(
        self, runs: list[tuple[int, int]], first: int, payload: memoryview
    ) -> list[tuple[int, int]]:
        """Keep markers back until somebody asks for them; returns what is left of the runs."""
        space = self._space
        kept = {
            page
            for page in self._streams.markers
            if first <= page < first + len(payload) // PAGE_BYTES
            and page not in self._waiting
            and any(start <= page < start + length for start, length in runs)
        }
        if not kept or self.stopped:
            return runs
        for page in kept:
            at = (page - first) * PAGE_BYTES
            space.tier.hold(page, payload[at : at + PAGE_BYTES])
            space.table.move(page, 1, READING, ON_DEVICE)
            self._write_wanted.discard(page)
        return runs_of(
            [page for start, length in runs for page in range(start, start + length) if page not in kept]
        )

    def _still_reading(self, first: int, count: int) -> list[tuple[int, int]]:
        """Return the runs of a range that is being read without the pages that were given up meanwhile."""
        table = self._space.table
        if not table.counts[POISONED]:
            return [(first, count)]
        return [(start, length) for start, length, state in table.runs(first, count) if state == READING]

    def _copy_in(self, first: int, count: int, source: int, keep: memoryview) -> None:
        """Copy a run into the client: what a write waits for unprotected and dirty, the others clean."""
        while count:
            wanted = self._write_wanted
            dirty = first in wanted
            length = 1
            if not wanted:
                length = count
            else:
                while length < count and ((first + length) in wanted) == dirty:
                    length += 1
            try:
                done = self._space.memory.copy_in(first, source, length, protect=not dirty)
            except FileExistsError:
                # Somebody other than the client and us filled the hole; the volume's content counts.
                self._space.memory.release(first, 1)
                continue
            if not done:
                content = bytes(keep)  # the payload is valid only now
                at = source - address_of(keep)
                self._loop.call_later(RETRY_SECONDS, self._copy_again, first, count, content, at)
                return
            self._came_in(first, done, DIRTY if dirty else CLEAN)
            first += done
            count -= done
            source += done * PAGE_BYTES

    @ends_with_client
    def _copy_again(self, first: int, count: int, content: bytes, at: int) -> None:
        source = address_of(content) + at
        for start, length in self._still_reading(first, count):
            self._copy_in(start, length, source + (start - first) * PAGE_BYTES, memoryview(content))
        # Pages that are on their way in hold others up, as those do that are in memory.
        self._admit_more()

    def _came_in(self, first: int, count: int, state: int) -> None:
        self._space.table.move(first, count, READING, state)
        waiting = self._waiting
        if count == 1 or len(waiting) >= count:
            came = [page for page in range(first, first + count) if page in waiting]
        else:
            came = [page for page in waiting if first <= page < first + count]
        if came:
            now = self._loop.time()
            self._waits += [(waiting.pop(page), now) for page in came]
        if state == DIRTY:
            self._write_wanted.difference_update(range(first, first + count))
        self._came.append((first, count))
        if len(self._came) == 1:
            eventloop.later(self._loop, self._settle)

    @ends_with_client
    def _settle(self) -> None:
        """Put what came in into the order of replacement, count who waited, and see to the limit.

        No access waits for any of that: the next one is answered first.
        """
        space = self._space
        came, self._came = self._came, []
        waits, self._waits = self._waits, []
        for first, count in came:
            space.replacement.returned(first, count)
        for began, ended in waits:
            space.waited(began, ended)
        self.on_pressure()

    # Content that is not what was paged out

    def _mismatched(self, pages: list[int]) -> None:
        """Find the content of pages that came with a wrong checksum elsewhere; what came is never used."""
        self._space.counters.checksum_errors += len(pages)
        task = self._loop.create_task(self._bring_in_salvaged(pages))
        self._salvaging.add(task)
        task.add_done_callback(self._salvage_ended)

    def _salvage_ended(self, task: asyncio.Task[None]) -> None:
        self._salvaging.discard(task)
        if not task.cancelled():
            task.result()

    async def _bring_in_salvaged(self, pages: list[int]) -> None:
        began = self._loop.time()
        self._salvaged(await self.salvage.search(pages), began)

    @ends_with_client
    def _salvaged(self, result: Salvaged, began: float) -> None:
        for page, content in result.found.items():
            if self._space.table.state[page] == READING:
                self._copy_in(page, 1, address_of(content), memoryview(content))
        for page in result.lost:
            if self._space.table.state[page] == READING:
                self._lost(page, began)
        self._space.volume.push()
        self._admit_more()

    def _lost(self, page: int, began: float) -> None:
        """Give up a page that no replica has, if an access waits for it, or the client is detached.

        One that was read ahead stays on the device, which may be right again when the page is wanted. What
        was read since `began`, when nobody wanted it yet, does not speak for the device now: it is read anew.
        """
        waits_since = self._waiting.get(page)
        if self.stopped or (waits_since is not None and waits_since <= began):
            self._give_up(page, "no replica has what was paged out")
            return
        self._space.table.put(page, ON_DEVICE)
        if waits_since is not None:
            self.fetch(page, 1)

    def give_up_waiting(self, before_seconds: float, why: str) -> None:
        """Poison the pages of the accesses that have waited since `before_seconds` of the loop's clock."""
        for page in [page for page, began in self._waiting.items() if began <= before_seconds]:
            self._give_up(page, why)
        deferred, self._deferred = self._deferred, deque()
        states = self._space.table.state
        for fault in deferred:
            if fault.began_seconds > before_seconds:
                self._deferred.append(fault)
            elif states[fault.page] in (ZERO, ON_DEVICE):
                self._give_up(fault.page, why)
            else:  # another access brought it in, or it was given up already
                self._answer(fault)
        self.admit()

    def _give_up(self, page: int, why: str) -> None:
        space = self._space
        space.table.put(page, POISONED)
        space.tier.forget(page)
        space.counters.poisoned_pages += 1
        self._waiting.pop(page, None)
        self._write_wanted.discard(page)
        then = (
            "fail"
            if self._poison(page)
            else "wait for good, as this kernel cannot make them fail (Linux 6.6)"
        )
        space.alarm("poisoned", f"page {page} is lost: {why}; accesses to it {then}")

    def _poison(self, page: int) -> bool:
        """Have accesses to a page that was given up fail, now or soon; False where they wait for good."""
        try:
            if not self.mark_lost(page):
                self._loop.call_later(RETRY_SECONDS, self._again, Fault(page, 0, self._loop.time()))
        except CannotPoison:
            return False
        return True

    def mark_lost(self, page: int) -> bool:
        """Have accesses to a page that was given up fail; False when that is to be tried again.

        :raise CannotPoison: the kernel is too old for that.
        """
        try:
            return bool(self._space.memory.poison(page))
        except FileExistsError:
            self._space.memory.wake(page, 1)
            return True
