"""Reads of a mirror: from the fastest replica that has everything, again from another one when it is late.

- One replica is preferred until another is clearly faster, so that reads of one batch leave together.
- A read that is older than its replica's own p99 is repeated on another one: of all reads at most
  `EXTRA_READS`. The first answer wins; the other one is dropped when it comes.
- A read whose replica is lost, or has lost its last path, is repeated at once, beside that budget.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Final

from farpage.blockio import ReadDone
from farpage.volume.hedge import HedgeBudget
from farpage.volume.replica import Mode, Read, Replica

TICK_SECONDS: Final = 0.002
"""One timer for all reads, while there are any: at most so often."""
LONGEST_TICK_SECONDS: Final = 0.064
"""At least so often, however late the next read will be."""
AGAIN_SHARE: Final = 0.125
"""A late read that cannot be repeated is looked at again when it has waited so much longer."""
CLEARLY: Final = 0.8
"""A replica is preferred to the present one when it takes less than this share of its time."""
REST_FACTOR: Final = 0.998
"""In the shortest tick: what was ten times slower is asked again after two seconds of reads."""


class Reads:
    """The reads in flight on the replicas of one mirror."""

    def __init__(self, replicas: list[Replica], failed: Callable[[Replica, Read, int], None]) -> None:
        """`failed` is told of a read that a replica has refused, before the read goes to another one."""
        self._replicas = replicas
        self._failed = failed
        self._loop = asyncio.get_running_loop()
        self._budget = HedgeBudget()
        self.preferred: Replica | None = None
        """The replica that reads are sent to while it is readable."""
        self.on_preferred: Callable[[], None] = lambda: None
        """Called when that is another one."""
        self._timer: asyncio.TimerHandle | None = None
        self._tick_seconds = TICK_SECONDS
        """How far ahead the timer was set."""
        self._closed = False
        self.in_flight = 0
        """Reads that are not answered yet."""
        self.waiting: list[Read] = []
        """Those that no replica can be asked for."""
        self.hedged = 0
        self.won = 0

    # Hot path

    def read(self, offset: int, length: int, done: ReadDone) -> None:
        """Read; waits out every failure."""
        self.in_flight += 1
        self._budget.read()
        read = Read(offset, length, done)
        preferred = self.preferred
        if preferred is None or not preferred.readable:
            preferred = self.choose(read)
        self._start(read, preferred)
        self._tick_soon()

    def adopt(self, replica: Replica, offset: int, length: int, done: ReadDone) -> ReadDone:
        """Count a read that a replica was asked for before as one of these; returns who is to be told."""
        self.in_flight += 1
        read = Read(offset, length, done)
        read.on = 1
        replica.reads[read] = self._loop.time()
        self._tick_soon()
        return partial(self._answered, read, replica)

    def _start(self, read: Read, replica: Replica) -> None:
        read.on += 1
        replica.reads[read] = self._loop.time()
        replica.volume.read(read.offset, read.length, partial(self._answered, read, replica))

    def _answered(self, read: Read, replica: Replica, error: int, payload: memoryview | None) -> None:
        started = replica.reads.pop(read, None)
        read.on -= 1
        if error:
            self._refused(read, replica, error)
            return
        if started is not None:
            replica.latency.answered(self._loop.time() - started)
        done, read.done = read.done, None
        if done is None:
            return  # another replica was faster
        if replica is read.hedged_to:
            self.won += 1
        self.in_flight -= 1
        done(0, payload)

    def _refused(self, read: Read, replica: Replica, error: int) -> None:
        if read.done is None:
            return
        if self._closed:
            if not read.on:
                done, read.done = read.done, None
                self.in_flight -= 1
                done(error, None)
            return
        self._failed(replica, read, error)
        # The failure of a replica may have started it elsewhere already.
        if read.done is not None and not read.on:
            self._start(read, self.choose(read))

    # Which replica

    def choose(self, read: Read) -> Replica:
        """Return the best replica for a read; one that is waited for when none answers."""
        best = min(
            (replica for replica in self._replicas if replica.readable),
            key=lambda replica: replica.latency.mean_seconds,
            default=None,
        )
        if best is not None:
            self._prefer(best)
            return best
        for replica in self._replicas:
            if replica.has(read):
                return replica
        return next(replica for replica in self._replicas if replica.mode is Mode.COUNTS)

    def _other(self, read: Read, than: Replica) -> Replica | None:
        """Return another replica that answers and has the pages, the fastest one."""
        others = [replica for replica in self._replicas if replica is not than and replica.readable]
        others.sort(key=lambda replica: replica.latency.mean_seconds)
        others += [replica for replica in self._replicas if replica is not than and replica.has(read)]
        return others[0] if others else None

    # Lateness

    def _tick_soon(self) -> None:
        """Look soon whether the read that was begun now is late."""
        if self._timer is None or self._tick_seconds > TICK_SECONDS:
            self._tick_in(TICK_SECONDS)

    def _tick_in(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._tick_seconds = seconds
        self._timer = self._loop.call_later(seconds, self._tick)

    def _tick(self) -> None:
        self._timer = None
        now = self._loop.time()
        rested = REST_FACTOR ** (self._tick_seconds / TICK_SECONDS)
        next_seconds = LONGEST_TICK_SECONDS
        for replica in self._replicas:
            if replica.reads:
                next_seconds = min(next_seconds, self._hedge(replica, now))
            elif replica is not self.preferred:
                replica.latency.rested(rested)
        if self.in_flight:
            self._tick_in(max(next_seconds, TICK_SECONDS))
        readable = [replica for replica in self._replicas if replica.readable]
        if len(readable) < 2:
            return
        best = min(readable, key=lambda replica: replica.latency.mean_seconds)
        preferred = self.preferred
        if preferred is None or best.latency.mean_seconds < preferred.latency.mean_seconds * CLEARLY:
            self._prefer(best)

    def _prefer(self, replica: Replica) -> None:
        if replica is not self.preferred:
            self.preferred = replica
            self.on_preferred()

    def compare_soon(self) -> None:
        """Look soon whether another replica is faster by now: some was read past this."""
        self._tick_soon()

    def _hedge(self, replica: Replica, now: float) -> float:
        """Repeat what is late on a replica; returns in how many seconds there may be more to repeat."""
        late_seconds = max(replica.latency.p99_seconds(), TICK_SECONDS)
        for read, started in list(replica.reads.items()):
            waited_seconds = now - started
            if waited_seconds < late_seconds:
                return late_seconds - waited_seconds
            replica.latency.waited(waited_seconds)
            if read.hedged_to is not None or read.done is None:
                continue
            other = self._other(read, replica)
            if other is None or not self._budget.spend():
                return waited_seconds * AGAIN_SHARE
            self.hedged += 1
            read.hedged_to = other
            self._start(read, other)
            other.volume.push()
        return LONGEST_TICK_SECONDS

    def repeat(self, replica: Replica) -> None:
        """Ask others for what a replica that has stopped to answer was asked."""
        for read in list(replica.reads):
            if read.done is None or read.on > 1:
                continue
            other = self._other(read, replica)
            if other is not None:
                self._start(read, other)
                other.volume.push()

    def close(self) -> None:
        """Repeat nothing any more: what is in flight ends with its error."""
        self._closed = True
        if self._timer:
            self._timer.cancel()
