"""Writes of a mirror: to every replica, done when each of them has it or is known to lack it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from farpage.blockio import Done
from farpage.volume.command import Command
from farpage.volume.replica import Mode, Replica, Start, Write, pages_of
from farpage.volume.replicas import Replicas


class Lose(Protocol):
    """Gives a replica up."""

    def __call__(self, replica: Replica, reason: str, *, pause: bool = False) -> None:
        """`pause` leaves a device alone for a while that answers with errors."""


class Writes:
    """The writes in flight on the replicas of one mirror."""

    def __init__(
        self,
        replicas: Replicas,
        lose: Lose,
        copied: Callable[[Replica], None],
        is_stale: Callable[[str], bool],
    ) -> None:
        """`copied` looks whether a replica has everything, `is_stale(device)` if it is recorded stale."""
        self._replicas = replicas
        self._lose = lose
        self._copied = copied
        self._is_stale = is_stale
        self._in_flight: dict[Write, None] = {}

    def __bool__(self) -> bool:
        """Tell whether there are any."""
        return bool(self._in_flight)

    # Hot path

    def submit(self, start: Start, offset: int, length: int, done: Done) -> None:
        """Carry out on every replica what `start` does; waits out every failure."""
        write = Write(start, offset, length, done, len(self._replicas.all))
        self._in_flight[write] = None
        for replica in self._replicas.all:
            self._send(replica, write)

    def _send(self, replica: Replica, write: Write) -> None:
        if replica.mode is Mode.COUNTS:
            replica.volume.carry_out(
                write.start, write.offset, write.length, partial(self._written, replica, write)
            )
        elif replica.mode is Mode.RESYNCING and replica.resync:
            replica.missed(write, self._replicas.dirty(replica))
            replica.resync.admit(write.first, write.count, partial(self._send_resyncing, replica, write))
        else:
            self._missed(replica, write)

    def _send_resyncing(self, replica: Replica, write: Write) -> None:
        """Send a write to a replica that no copy of the same pages is on its way to."""
        if replica.mode is not Mode.RESYNCING:
            self._send(replica, write)
            return
        replica.missed(write, self._replicas.dirty(replica))
        replica.volume.carry_out(
            write.start, write.offset, write.length, partial(self._written, replica, write)
        )

    def _written(self, replica: Replica, write: Write, error: int, _result: Any) -> None:
        if error == 0:
            if replica.mode is not Mode.COUNTS and replica.dirty:
                for first, count in write.parts:
                    replica.dirty.clear(first, count)
                self._copied(replica)
            self._heard(write)
        elif self._replicas.closing:
            write.error = error
            self._heard(write)
        else:
            if error != errno.ECANCELED:
                self._lose(replica, f"its device answers {errno.errorcode.get(error, error)}", pause=True)
            self._missed(replica, write)

    def _missed(self, replica: Replica, write: Write) -> None:
        """Mark what a replica has not got, and let the write go on without it as soon as that is recorded."""
        if replica.gone:
            self._heard(write)
            return
        replica.missed(write, self._replicas.dirty(replica))
        if self._is_stale(replica.device):
            self._heard(write)
        else:
            replica.unrecorded.append(write)

    def _heard(self, write: Write) -> None:
        """One replica has the write, or is known to lack it."""
        write.pending -= 1
        if write.pending <= 0:
            self._end(write)

    def _end(self, write: Write) -> None:
        if write not in self._in_flight:
            return
        del self._in_flight[write]
        if write.missed_by:
            pages = [page for first, count in write.parts for page in range(first, first + count)]
            for replica in write.missed_by:
                replica.busy.difference_update(pages)
                if replica.resync and not self._replicas.closing:
                    self._copied(replica)
                    if replica.resync:
                        replica.resync.wake()
        write.done(write.error)

    # Replicas that come and go

    def adopt(self, replica: Replica, command: Command) -> None:
        """Count a command that was sent to a replica before as a write of this mirror."""
        finished = command.finished
        write = Write(
            command.start, command.offset, command.span_bytes, lambda error: finished(error, None), 1
        )
        if command.runs:
            write.parts = [pages_of(offset, len(data)) for offset, data in command.runs]
        self._in_flight[write] = None
        command.finished = partial(self._written, replica, write)

    def begun_without(self, replica: Replica) -> None:
        """Mark what is in flight already as missed by a new replica."""
        for write in self._in_flight:
            replica.missed(write, self._replicas.dirty(replica))

    def mark(self, pages: NDArray[np.bool_]) -> None:
        """Set the pages that are being written."""
        for write in self._in_flight:
            for first, count in write.parts:
                pages[first : first + count] = True

    def release(self, replica: Replica) -> None:
        """Let the writes go on that waited until a replica is recorded stale, or taken out."""
        waiting, replica.unrecorded = replica.unrecorded, []
        for write in waiting:
            self._heard(write)

    def send_missed(self, replica: Replica, *, recorded: bool) -> None:
        """Send a replica that is back what waits for it; with `recorded` also what waits for others alone."""
        again, replica.unrecorded = replica.unrecorded, []
        for write in again:
            self._send(replica, write)
        if recorded:
            for write in [w for w in self._in_flight if replica in w.missed_by and w not in again]:
                write.pending += 1
                self._send(replica, write)

    def abandon(self) -> None:
        """End them all with their error, or ESHUTDOWN."""
        for write in list(self._in_flight):
            write.error = write.error or errno.ESHUTDOWN
            self._end(write)
