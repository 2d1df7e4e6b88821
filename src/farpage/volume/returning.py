"""When a replica of a mirror comes back: it gets new writes and what it has missed, until it counts again.

It comes back when it has been opened under a higher epoch, and no server can still carry out an older write
of it, neither of this worker nor of one that was killed before it.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from farpage.blockio import Done, ReadDone
from farpage.volume.losing import Losing
from farpage.volume.replica import Mode, Read, Replica
from farpage.volume.replicas import Replicas
from farpage.volume.resync import Resync
from farpage.volume.writing import Writes

LOOK_SECONDS = 0.1
"""Pause between two looks whether a server may still carry out something older."""


class ReturnOwner(Protocol):
    """What a mirror tells of its pages, and is told of its replicas."""

    @property
    def wanted_pages(self) -> Callable[[], NDArray[np.bool_]] | None:
        """Tells which pages anybody will read; None for all."""

    @property
    def wrong_pages(self) -> Callable[[int, memoryview], set[int]] | None:
        """Tells which pages of a run that was read are not what they should be; None where nobody knows."""

    def active(self) -> None:
        """What was held up can go on."""


class Returning:
    """Brings the replicas of one mirror back."""

    def __init__(
        self,
        replicas: Replicas,
        losing: Losing,
        writes: Writes,
        owner: ReturnOwner,
        *,
        announce: Callable[[Replica], None],
        had_predecessors: bool,
    ) -> None:
        """`announce` is told of a replica that counts again.

        With `had_predecessors` a server may still carry out what a dead worker, or an older owner, has sent.
        """
        self._replicas = replicas
        self._losing = losing
        self._writes = writes
        self._owner = owner
        self._announce = announce
        self._had_predecessors = had_predecessors
        self._loop = asyncio.get_running_loop()
        self._timers: dict[Replica, asyncio.TimerHandle] = {}

    def answers(self, replica: Replica) -> None:
        """A path of a replica carries commands."""
        replica.well = True
        self.consider(replica)
        self._losing.decide()
        if replica.mode is not Mode.AWAY:
            self._owner.active()

    def consider(self, replica: Replica) -> None:
        """Begin to resync a replica, if it is back and no server can still carry out an older write of it."""
        if replica.mode is not Mode.AWAY or replica.retiring:
            return
        if self._replicas.opening or self._replicas.closing or not replica.volume.ready:
            return
        if self._had_predecessors and not replica.volume.predecessors_gone:
            # Their writes may yet come over a copy of the same pages.
            self._consider_at(replica, self._loop.time() + LOOK_SECONDS)
        elif self._loop.time() < replica.not_before_seconds:
            self._consider_at(replica, replica.not_before_seconds)
        else:
            self._begin(replica)

    def _consider_at(self, replica: Replica, when_seconds: float) -> None:
        if replica not in self._timers:
            self._timers[replica] = self._loop.call_at(when_seconds, self._consider_again, replica)

    def _consider_again(self, replica: Replica) -> None:
        del self._timers[replica]
        self.consider(replica)

    def forget(self, replica: Replica) -> None:
        """Consider a replica no more: it was taken out."""
        if timer := self._timers.pop(replica, None):
            timer.cancel()

    def stop(self) -> None:
        """Let none come back any more."""
        for timer in self._timers.values():
            timer.cancel()
        for replica in self._replicas:
            if replica.resync:
                replica.resync.stop()

    # Its resync

    def _begin(self, replica: Replica) -> None:
        replica.well = True
        dirty = self._replicas.dirty(replica)
        if self._owner.wanted_pages is not None:
            wanted = self._owner.wanted_pages()
            self._writes.mark(wanted)
            dirty.keep(wanted)
        replica.become(Mode.RESYNCING, self._loop.time(), "what it has missed is copied to it")
        replica.resync = Resync(
            dirty,
            replica.busy,
            replica.pace,
            read=partial(self._read_for, replica),
            write=partial(self._write_copy, replica),
            wrong=self._owner.wrong_pages,
            on_copied=partial(self.copied, replica),
        )
        # What no other replica has room for may be done as soon as this one has everything.
        self._writes.send_missed(replica, recorded=self._losing.full)
        replica.volume.push()
        self.copied(replica)
        if replica.resync:
            replica.resync.wake()

    def _read_for(self, replica: Replica, offset: int, length: int, done: ReadDone) -> bool:
        """Read what a replica has missed from another one that has everything."""
        sources = [other for other in self._replicas if other is not replica and other.readable]
        if not sources:
            return False
        source = min(sources, key=lambda other: other.latency.mean_seconds)

        def finished(error: int, payload: memoryview | None) -> None:
            if error and error not in (errno.ECANCELED, errno.ESHUTDOWN):
                self._losing.read_failed(source, Read(offset, length, done), error)
            done(error, payload)

        source.volume.read(offset, length, finished)
        return True

    def _write_copy(self, replica: Replica, offset: int, data: memoryview, done: Done) -> None:
        def finished(error: int) -> None:
            if error and error != errno.ECANCELED and not self._replicas.closing:
                reason = f"its device answers {errno.errorcode.get(error, error)}"
                self._losing.lose(replica, reason, pause=True)
            done(error)

        replica.volume.write(offset, data, finished)

    def copied(self, replica: Replica) -> None:
        """Let a replica count when it has everything."""
        if replica.mode is not Mode.RESYNCING or replica.dirty is None or replica.dirty.count:
            return
        if replica.resync:
            replica.resynced_pages = replica.resync.copied_pages
            replica.resync.stop()
            replica.resync = None
        replica.become(Mode.COUNTS, self._loop.time())
        self._losing.decide()
        self._announce(replica)
