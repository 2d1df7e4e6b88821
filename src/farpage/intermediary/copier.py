"""Copies what a volume lacks from another one, beside whoever uses both. Runs on the loop's clock alone.

A pass asks the target what is absent and the source what of that is data, then reads data and writes it, in
long requests with many under way, and makes each hole with one command that moves no data. Passes follow
each other until one finds nothing absent; then the target is flushed, and the copy is complete. Nothing has
to be remembered from one process to the next: what is present is the target's knowledge.

The target applies what it is given to absent pages only, so a copy that comes late does no harm.
"""

from __future__ import annotations

import asyncio
import errno
import math
import os
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Final, TypeAlias

from farpage.blockio import CONNECTION_LOST, BlockIO, Done, Extent, Feature, Joined
from farpage.definition.model import PAGE_BYTES
from farpage.intermediary.plan import Run, absent, runs
from farpage.intermediary.window import PACED_SECONDS, STEPS, Window
from farpage.kernel.buffers import AlignedPool
from farpage.kernel.memory import AlignedBuffer
from farpage.volume.pace import Pace

READ_BYTES: Final = 256 << 10
"""A run is read in pieces of this, which servers answer from their page cache at once, and written whole."""
COMMANDS_MAX: Final = 64
"""Requests under way, however short they are."""
AHEAD_RUNS: Final = 64
"""The next part of the maps is asked for when fewer runs are left."""
MAP_BYTES: Final = 1 << 30
"""So much of the target's map is asked for at once: a map must not be old when it is followed."""
FAILURES_MAX: Final = 8
"""After so many in a row a pass is given up."""
PASS_SECONDS: Final = 0.02
"""Between the first two passes; it doubles up to `RETRY_SECONDS`."""
RETRY_SECONDS: Final = 0.5
"""Before the next pass when something has failed in this one; it doubles up to `RETRY_MAX_SECONDS`."""
RETRY_MAX_SECONDS: Final = 10.0
_SMALLEST_RUN_BYTES: Final = STEPS[0].run_bytes

ReadInto: TypeAlias = Callable[[int, memoryview, Done], None]
"""`read(offset, into, done)`: fill `into` from the source."""


def reading_into(source: BlockIO) -> ReadInto:
    """Return how to read into a buffer from any `BlockIO`; a `Connection` does it without a copy."""

    def read_into(offset: int, into: memoryview, done: Done) -> None:
        def arrived(error: int, payload: memoryview | None) -> None:
            if payload is not None:
                into[:] = payload
            done(error)

        source.read(offset, len(into), arrived)

    return read_into


class Copier:
    """One copy, from `start` until it is complete, its connections are lost, or `stop`."""

    def __init__(
        self,
        source: BlockIO,
        target: BlockIO,
        *,
        read: ReadInto,
        client_commands: Callable[[], int] = lambda: 0,
        bandwidth_bytes: int | None = None,
        on_complete: Callable[[], None] = lambda: None,
        on_lost: Callable[[], None] = lambda: None,
    ) -> None:
        """Prepare.

        `read` reads the source; `client_commands` counts what the client has sent so far. `on_complete`
        is called once, when everything is present and on stable storage; `on_lost` once, instead, when the
        source or the target does not answer any more (CONNECTION_LOST).
        """
        self._source = source
        self._target = target
        self._read = read
        self._client_commands = client_commands
        self._on_complete = on_complete
        self._on_lost = on_lost
        self._loop = asyncio.get_running_loop()
        self._pool = AlignedPool(STEPS[-1].in_flight_bytes)
        self._window = Window()
        self._pace = Pace(math.inf)
        self._fast_zero = Feature.FAST_ZERO in target.features
        self._size_bytes = min(source.size_bytes, target.size_bytes)

        self._cursor = 0
        """Up to here the maps of this pass are known."""
        self._mapping = False
        self._found = False
        """Whether this pass has found anything absent."""
        self._runs: deque[Run] = deque()
        self._commands = 0
        self._in_flight_bytes = 0
        self._pumping = False
        self._timer: asyncio.TimerHandle | None = None
        self._retry_seconds = RETRY_SECONDS
        self._pass_seconds = PASS_SECONDS
        self._failures = 0
        """Of this pass, one after the other."""
        self._failed = False
        """Whether anything failed in this pass; the next one begins a little later then."""
        self._flushing = False
        self._ended = False
        self.complete = False
        self.paused = False
        self.problem = ""
        """What keeps it from going on at the moment; it tries again."""
        self.read_bytes = 0
        self.written_bytes = 0
        self.zeroed_bytes = 0
        """Bytes of holes; nothing was transferred for them."""
        self.set_bandwidth(bandwidth_bytes)

    # Control

    def start(self) -> None:
        """Begin; returns at once."""
        self._wake()

    def set_bandwidth(self, bytes_per_second: int | None) -> None:
        """Keep to a bandwidth from now on; None for none."""
        wanted = math.inf if bytes_per_second is None else float(bytes_per_second)
        if wanted != self._pace.bytes_per_second:
            self._pace.bytes_per_second = wanted
            self._wake()

    def set_paused(self, paused: bool) -> None:
        """Begin nothing new, or go on; what is under way finishes."""
        if paused != self.paused:
            self.paused = paused
            self._wake()

    def give_way(self, seconds: float) -> None:
        """Make small requests for so long: the client is at work."""
        self._window.disturbed(self._loop.time() + seconds)

    def stop(self) -> None:
        """Begin nothing new, for good; neither callback is called any more."""
        self._ended = True
        self._runs.clear()
        if self._timer is not None:
            self._timer.cancel()

    def rate(self) -> float:
        """Return the bytes a second of the last seconds."""
        return 0.0 if self.complete else self._pace.rate(self._loop.time())

    @property
    def commands(self) -> int:
        """Requests that are under way."""
        return self._commands

    # From request to request

    def _wake(self) -> None:
        """Go on in this very turn; a timer that was waited for is for nothing then."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._pump()

    def _pump(self) -> None:
        if self._pumping:  # a request that finished within its start
            return
        self._pumping = True
        try:
            while self._next():
                pass
        finally:
            self._pumping = False

    def _next(self) -> bool:
        """Begin one request; return whether to try for another one."""
        if self._ended or self.complete or self.paused or self._timer is not None:
            return False
        if len(self._runs) < AHEAD_RUNS and not self._mapping and self._cursor < self._size_bytes:
            self._map()
            return True
        if not self._runs:
            return self._end_pass()
        return self._commands < COMMANDS_MAX and self._begin_run()

    def _begin_run(self) -> bool:
        """Begin the first run, or as much of it as is allowed at once; return whether it was."""
        if self._runs[0].hole:
            self._zero(self._runs.popleft())
            return True
        now = self._loop.time()
        allowance = self._window.allowance(now, self._client_commands())
        if self._in_flight_bytes >= allowance.in_flight_bytes:
            return False
        delay = self._pace.delay(now)
        if delay > 0:
            self._wait(delay, self._wake)
            return False
        run, rest = self._runs.popleft().split(self._run_bytes(allowance.run_bytes))
        if rest is not None:
            self._runs.appendleft(rest)
        self._pace.took(run.length, now)
        self._copy(run)
        return True

    def _run_bytes(self, allowed: int) -> int:
        """Return the longest request: at a low bandwidth a long one would be a burst and then nothing."""
        paced = self._pace.bytes_per_second * PACED_SECONDS
        if paced >= allowed:
            return allowed
        blocks = int(paced) // _SMALLEST_RUN_BYTES
        return max(blocks, 1) * _SMALLEST_RUN_BYTES

    def _wait(self, seconds: float, then: Callable[[], None]) -> None:
        def due() -> None:
            self._timer = None
            then()

        self._timer = self._loop.call_later(seconds, due)

    def _copy(self, run: Run) -> None:
        self._commands += 1
        self._in_flight_bytes += run.length
        buffer = self._pool.take(run.length)
        arrived = Joined(partial(self._arrived, run, buffer), -(-run.length // READ_BYTES)).part_done
        for at in range(0, run.length, READ_BYTES):
            stop = min(at + READ_BYTES, run.length)
            self._read(run.offset + at, buffer.view[at:stop], arrived)

    def _arrived(self, run: Run, buffer: AlignedBuffer, error: int) -> None:
        if not error and not self._ended:
            self.read_bytes += run.length
            data = buffer.view[: run.length]
            self._target.write(run.offset, data, partial(self._written, run, buffer))
            return
        self._let_go(run, buffer)
        if error == errno.EIO and run.length > PAGE_BYTES and not self._ended:
            # Some page of it cannot be read. The others can, and may be the ones that the client needs.
            first, rest = run.split(run.length // 2 // PAGE_BYTES * PAGE_BYTES)
            self._runs.extendleft(filter(None, (rest, first)))
        elif error:
            self._fail(f"{run.length} bytes at {run.offset} cannot be read at the source", error)
        self._pump()

    def _written(self, run: Run, buffer: AlignedBuffer, error: int) -> None:
        self._let_go(run, buffer)
        if error:
            self._fail(f"{run.length} bytes at {run.offset} cannot be written at the target", error)
        else:
            self.written_bytes += run.length
            self._pace.copied(run.length, self._loop.time())
            self._succeeded()
        self._pump()

    def _let_go(self, run: Run, buffer: AlignedBuffer) -> None:
        self._commands -= 1
        self._in_flight_bytes -= run.length
        self._pool.give(buffer)

    def _zero(self, run: Run) -> None:
        fast = self._fast_zero
        self._commands += 1

        def zeroed(error: int) -> None:
            self._commands -= 1
            if error == errno.ENOTSUP and fast:
                self._fast_zero = False
                self._zero(run)
                return
            if error:
                self._fail(f"{run.length} bytes at {run.offset} cannot be zeroed at the target", error)
            else:
                self.zeroed_bytes += run.length
                self._succeeded()
            self._pump()

        # A fast one first: the length of one that may be slow is bounded on the wire, so it would be several.
        self._target.zero(run.offset, run.length, zeroed, fast=fast)

    # From pass to pass

    def _map(self) -> None:
        """Ask the target what is absent in the next part."""
        self._mapping = True
        length = min(self._size_bytes - self._cursor, MAP_BYTES)
        start = self._cursor

        def mapped(error: int, extents: list[Extent] | None) -> None:
            if error or not extents:
                self._not_mapped(f"what is absent from {start} on is not told by the target", error)
                return
            ranges, self._cursor = absent(start, extents)
            self._ask_source(ranges)

        self._target.extents(start, length, mapped)

    def _ask_source(self, ranges: list[tuple[int, int]]) -> None:
        """Ask the source what of these ranges is data, and so on until all of them have become runs."""
        if self._ended:
            return
        if not ranges:
            self._mapping = False
            self._pump()
            return
        self._found = True
        if Feature.EXTENTS not in self._source.features:
            self._runs.extend(Run(offset, length, hole=False) for offset, length in ranges)
            self._ask_source([])
            return
        start, stop = ranges[0][0], sum(ranges[-1])

        def mapped(error: int, extents: list[Extent] | None) -> None:
            if error or not extents:
                self._not_mapped(f"what is data from {start} on is not told by the source", error)
                return
            found, rest = runs(ranges, start, extents)
            self._runs.extend(found)
            self._pump()
            # In a turn of its own: a source that answers at once must not make this a recursion.
            self._loop.call_soon(self._ask_source, rest)

        self._source.extents(start, stop - start, mapped)

    def _not_mapped(self, what: str, error: int) -> None:
        """End this pass: what is left of it is not known."""
        self._mapping = False
        self._cursor = self._size_bytes
        self._fail(what, error or errno.EIO)
        self._pump()

    def _end_pass(self) -> bool:
        """Begin the next pass, or complete the copy, when nothing of this one is under way any more."""
        if self._commands or self._mapping or self._flushing:
            return False
        if self._failed:
            self._wait(self._retry_seconds, self._try_again)
            return False
        self.problem = ""
        self._retry_seconds = RETRY_SECONDS
        if self._found:
            # Not at once, or one would follow the other while the client is busy with what is absent.
            self._wait(self._pass_seconds, self._begin_pass)
            self._pass_seconds = min(self._pass_seconds * 2, RETRY_SECONDS)
            return False
        self._flushing = True
        self._target.flush(self._flushed)
        return True

    def _begin_pass(self) -> None:
        self._cursor = 0
        self._found = False
        self._failures = 0
        self._failed = False
        self._pump()

    def _flushed(self, error: int) -> None:
        self._flushing = False
        if error:
            self._fail("what was copied cannot be put on stable storage at the target", error)
            self._pump()
        elif not self._ended:
            self.complete = True
            self._on_complete()

    # Failures

    def _succeeded(self) -> None:
        self._failures = 0

    def _fail(self, what: str, error: int) -> None:
        """Go on with the rest of this pass; what failed is tried again in the next one, a little later."""
        if self._ended:
            return
        self.problem = f"{what}: {os.strerror(error)}"
        if error == CONNECTION_LOST:
            self.stop()
            self._on_lost()
            return
        self._failed = True
        self._failures += 1
        if self._failures >= FAILURES_MAX:  # such as those of a device that is full
            self._runs.clear()
            self._cursor = self._size_bytes

    def _try_again(self) -> None:
        self._retry_seconds = min(self._retry_seconds * 2, RETRY_MAX_SECONDS)
        self._begin_pass()
