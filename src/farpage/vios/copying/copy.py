"""What all who have a volume open share while it is copied: presence, who changes which page, the copying.

A page of the new device has one writer at a time: the client, or a *fill*, which brings a page over from the
old device and is applied to pages alone that are neither present nor being changed. So an older content never
comes over a newer one.

Changes that begin while nothing is recorded go to the old device alone, and their pages stay absent. A fill
that was read before such a change has landed would be older than it: so nobody may begin to fill, that is to
read what is to be filled, before the last of them has ended.

Presence is stored behind its time: first the device's data (flush), then the bits. What was not stored when
the process ends is absent for the next one, which is safe as the old device has every change that was
acknowledged. It is not safe to fill such a page with what was read from the old device *before* that: whoever
fills reads anew after its connection was lost.
"""

from __future__ import annotations

import asyncio
import errno
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, Protocol, TypeAlias

from farpage.blockio import BlockIO, Done, Feature, wait_done
from farpage.definition.model import PAGE_BYTES
from farpage.log import get_logger
from farpage.vios.copying.presence import Presence, PresenceKey, runs

log = get_logger()

PAGE_SHIFT: Final = PAGE_BYTES.bit_length() - 1
FILLS_MAX: Final = 4
"""Fills under way at the device while the client does nothing; each may be a long run."""
FILLS_BESIDE_CLIENT: Final = 1
KEEPS_MAX: Final = 32
"""Relayed pages that are being written at a time; others are not kept, but fetched again."""
STORE_SECONDS: Final = 1.0
"""So long after it has changed is presence stored."""
STORE_SHARE: Final = 10.0
"""Times as long as it took to store presence, it is not stored again."""
_ZEROS: Final = memoryview(bytes(1 << 20))

Change: TypeAlias = Callable[[bool, Done], None]
"""`change(recording, ended)` begins a client's change, on both devices; if not recording on the old one."""
FillRun: TypeAlias = Callable[[int, int, Done], None]
"""`fill(start_page, end_page, done)` writes a run of pages to the new device."""
RunBlocking: TypeAlias = Callable[..., Awaitable[Any]]
"""Calls a function that blocks: `await run(function, *arguments)`."""


class PresenceStore(Protocol):
    """Where presence is kept; methods block."""

    def store(self, blocks: dict[int, bytes]) -> None:
        """Put blocks on stable storage.

        :raise OSError:
        """

    def close(self) -> None:
        """Let go of it."""


@dataclass(slots=True)
class CopyCounters:
    """What was done since this process has had the volume open."""

    relayed_reads: int = 0
    kept_pages: int = 0
    filled_pages: int = 0


@dataclass(slots=True, eq=False)
class _Waiting:
    """A change or fill that waits for its turn."""

    start: int
    end: int
    begin: Callable[[], None]

    def overlaps(self, start: int, end: int) -> bool:
        return self.start < end and start < self.end


class VolumeCopy:
    """One volume on its new device, which is `target`; used from one event loop.

    While `recording` is off nothing is present and nothing becomes so: the old device is used alone.
    `finished` is on when the new device is.
    """

    def __init__(
        self,
        key: PresenceKey,
        presence: Presence,
        store: PresenceStore,
        target: BlockIO,
        run: RunBlocking,
        *,
        client_in_flight: Callable[[], int] = lambda: 0,
    ) -> None:
        """Take over what is stored; `target` is for fills, and closed in the end.

        `client_in_flight` tells how many commands of the client are under way, to which fills give way.
        """
        self.key = key
        self.presence = presence
        self.counters = CopyCounters()
        self.recording = True
        self.finished = False
        self.generation = 0
        """Rises when a change fails, or ends unrecorded: what was read from the old device before is not
        kept."""
        self.stored_pages = presence.count
        """Pages that are present, and will be for the next process."""
        self._loop = asyncio.get_running_loop()
        self._target = target
        self._store = store
        self._run = run
        self._client_in_flight = client_in_flight
        self._busy = bytearray(presence.pages)
        """1 for each page that somebody changes on the new device."""
        self._unrecorded = 0
        """Changes under way that go to the old device alone."""
        self._changes: deque[_Waiting] = deque()
        self._fills: deque[_Waiting] = deque()
        self._fills_under_way = 0
        self._keeps = 0
        self._storing = asyncio.Lock()
        self._timer: asyncio.TimerHandle | None = None
        self._soonest_seconds = 0.0
        self._tasks: set[asyncio.Task[bool]] = set()
        self._closed = False

    @property
    def fillable(self) -> bool:
        """Whether what is read from the old device from now on may be filled."""
        return self.recording and not self._unrecorded

    # The client's changes

    def change(self, start: int, end: int, change: Change, done: Done) -> None:
        """Have the client change pages, when nobody else changes them; then they are present."""

        def begin() -> None:
            self._busy[start:end] = b"\1" * (end - start)
            recording = self.recording
            self._unrecorded += not recording
            change(recording, partial(self._changed, start, end, recording, done))

        waits = self._busy.find(1, start, end) >= 0
        if waits or any(waiting.overlaps(start, end) for waiting in self._changes):
            self._changes.append(_Waiting(start, end, begin))
        else:
            begin()

    def _changed(self, start: int, end: int, recorded: bool, done: Done, error: int) -> None:
        self._busy[start:end] = bytes(end - start)
        self._unrecorded -= not recorded
        if error or not recorded:
            # What the old device has now is not known before it is read again.
            self.generation += 1
        else:
            self._add(start, end)
        done(error)
        if self._changes:
            self._admit()

    def _admit(self) -> None:
        """Begin the changes that nothing stands in the way of any more, in their order."""
        waiting, self._changes = self._changes, deque()
        for change in waiting:
            held = self._busy.find(1, change.start, change.end) >= 0
            if held or any(earlier.overlaps(change.start, change.end) for earlier in self._changes):
                self._changes.append(change)
            else:
                change.begin()

    # Fills

    def fill(self, offset: int, data: memoryview, done: Done) -> None:
        """Write the pages that are absent and that nobody changes; the others stay as they are."""

        def write(start: int, end: int, ended: Done) -> None:
            part = data[(start << PAGE_SHIFT) - offset : (end << PAGE_SHIFT) - offset]
            self._target.write(start << PAGE_SHIFT, part, ended)

        self._fill(offset >> PAGE_SHIFT, (offset + len(data)) >> PAGE_SHIFT, write, done)

    def fill_zeros(self, offset: int, length: int, done: Done) -> None:
        """As `fill`, with zeros."""
        self._fill(offset >> PAGE_SHIFT, (offset + length) >> PAGE_SHIFT, self._zero, done)

    def _fill(self, start: int, end: int, fill: FillRun, done: Done) -> None:
        def filled(pages: int) -> None:
            self.counters.filled_pages += pages

        def ended(error: int) -> None:
            self._fills_under_way -= 1
            done(error)
            self._next_fills()

        def begin() -> None:
            self._fills_under_way += 1
            if self._closed or not self.recording:
                ended(errno.ESHUTDOWN)
            else:
                self._fill_runs(start, end, fill, filled, ended)

        self._fills.append(_Waiting(start, end, begin))
        self._next_fills()

    def _next_fills(self) -> None:
        while self._fills:
            most = FILLS_BESIDE_CLIENT if self._client_in_flight() else FILLS_MAX
            if self._fills_under_way >= most:
                return
            self._fills.popleft().begin()

    def _fill_runs(
        self, start: int, end: int, fill: FillRun, filled: Callable[[int], None], done: Done
    ) -> None:
        """Fill every run of pages that are absent and idle, then call `done`."""
        left, problem = 1, 0

        def ended(first: int, last: int, error: int) -> None:
            nonlocal left, problem
            if last > first:
                self._busy[first:last] = bytes(last - first)
                if error:
                    problem = problem or error
                else:
                    self._add(first, last)
                    filled(last - first)
                if self._changes:
                    self._admit()
            left -= 1
            if not left:
                done(problem)

        idle = [
            (first, last)
            for absent, absent_end, present in self.presence.runs(start, end)
            if not present
            for first, last, busy in runs(self._busy, absent, absent_end)
            if not busy
        ]
        for first, last in idle:
            self._busy[first:last] = b"\1" * (last - first)
        left += len(idle)
        for first, last in idle:
            fill(first, last, partial(ended, first, last))
        ended(0, 0, 0)

    def _zero(self, start: int, end: int, done: Done) -> None:
        if Feature.ZERO in self._target.features:
            self._target.zero(start << PAGE_SHIFT, (end - start) << PAGE_SHIFT, done)
        else:
            write_zeros(self._target, start << PAGE_SHIFT, (end - start) << PAGE_SHIFT, done)

    def keep(self, offset: int, payload: memoryview, generation: int) -> None:
        """Keep what was relayed, where it is still absent; `generation` is that of when it was asked for."""
        if generation != self.generation or not self.recording or self._keeps >= KEEPS_MAX or self._closed:
            return
        copied = bytes(payload)
        zeros = not copied[0] and not copied.strip(b"\0")
        data = memoryview(copied)
        self._keeps += 1

        def write(start: int, end: int, ended: Done) -> None:
            if zeros:
                self._zero(start, end, ended)
            else:
                part = data[(start << PAGE_SHIFT) - offset : (end << PAGE_SHIFT) - offset]
                self._target.write(start << PAGE_SHIFT, part, ended)

        def kept(pages: int) -> None:
            self.counters.kept_pages += pages

        def ended(_error: int) -> None:
            self._keeps -= 1

        self._fill_runs(offset >> PAGE_SHIFT, (offset + len(payload)) >> PAGE_SHIFT, write, kept, ended)

    # Presence

    def _add(self, start: int, end: int) -> None:
        presence = self.presence
        presence.add(start, end)
        if self._timer is None and presence.changed and not self._closed:
            now = self._loop.time()
            soon = now if presence.complete else now + STORE_SECONDS
            self._timer = self._loop.call_at(max(soon, self._soonest_seconds), self._store_due)

    def _store_due(self) -> None:
        self._timer = None
        task = self._loop.create_task(self.store())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def store(self) -> bool:
        """Store what is present: the data first, then the bits; False if that did not work."""
        async with self._storing:
            if not self.presence.changed:
                return True
            began = self._loop.time()
            count = self.presence.count
            blocks = self.presence.take_changed(self.key)
            try:
                error = await wait_done(self._target.flush) if Feature.FLUSH in self._target.features else 0
                if error:
                    raise OSError(error, "the device could not be flushed")
                await self._run(self._store.store, blocks)
            except OSError as error:
                log.error("presence_not_stored", volume_id=self.key.volume_id, problem=str(error))
                self.presence.put_back(blocks)
                stored = False
            except BaseException:
                self.presence.put_back(blocks)
                raise
            else:
                self.stored_pages = count
                stored = True
            now = self._loop.time()
            self._soonest_seconds = now + (now - began) * STORE_SHARE
            if self.presence.changed and self._timer is None and not self._closed:
                self._timer = self._loop.call_at(
                    max(now + STORE_SECONDS, self._soonest_seconds), self._store_due
                )
            return stored

    async def close(self, *, store: bool = True) -> None:
        """Let go of the device, after storing presence unless that is of no use any more."""
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._tasks:
            await asyncio.wait(self._tasks)
        if store:
            await self.store()
        await self._target.close()
        self._store.close()


def write_zeros(io: BlockIO, offset: int, length: int, done: Done) -> None:
    """Write zeros piece by piece, for storage that cannot zero."""

    def step(error: int) -> None:
        nonlocal offset, length
        if error or not length:
            done(error)
            return
        size = min(length, len(_ZEROS))
        at, offset, length = offset, offset + size, length - size
        io.write(at, _ZEROS[:size], step)

    step(0)
