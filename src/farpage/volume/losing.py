"""When a replica of a mirror is given up: while another one has everything and answers; so never the last."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from typing import Protocol

from farpage.definition.states import PAGE_BYTES
from farpage.volume.ownership import Ownership
from farpage.volume.replica import Mode, Read, Replica
from farpage.volume.replicas import Replicas


class LossEvents(Protocol):
    """What a mirror is told of its replicas."""

    def active(self) -> None:
        """What was held up can go on."""

    def no_path(self, none: bool) -> None:
        """No replica that has everything answers; with False, one does."""

    def full(self, full: bool) -> None:
        """Writes wait because the last device has no room for them; with False, they go on."""

    def taken_over(self, device_name: str, vios: str) -> None:
        """A VIOS of another replica answers for a lost one."""

    def alarm(self, kind: str, message: str) -> None:
        """Something happened that an operator should look at."""


class Losing:
    """Decides which replicas of one mirror are lost."""

    def __init__(
        self,
        replicas: Replicas,
        ownership: Ownership,
        events: LossEvents,
        *,
        repeat_reads: Callable[[Replica], None],
        record: Callable[[], None],
    ) -> None:
        """`repeat_reads` asks others for what a replica was asked; `record` looks what is to be recorded."""
        self._replicas = replicas
        self._ownership = ownership
        self._events = events
        self._repeat_reads = repeat_reads
        self._record = record
        self._loop = asyncio.get_running_loop()
        self._stalled = False
        self._full: set[str] = set()

    @property
    def full(self) -> bool:
        """Whether writes wait for room on a device."""
        return bool(self._full)

    def adopt(self, replica: Replica, *, full: bool) -> None:
        """Go on with a replica whose volume has told somebody else so far whether it answers and has room."""
        self._stalled = not replica.well
        if full:
            self._full.add(replica.device)

    # What its paths tell

    def gives_up(self, replica: Replica, _error: int) -> bool:
        """Tell whether a command that a replica's device refuses ends with the error instead of waiting."""
        return replica.mode is not Mode.COUNTS or self._replicas.survives_without(replica)

    def no_path(self, replica: Replica) -> None:
        """A replica does not answer any more."""
        replica.well = False
        if replica.mode is not Mode.AWAY:
            replica.reason = replica.volume.reasons()
        self.decide()

    def told_full(self, replica: Replica, full: bool) -> None:
        """Only the last replica that counts waits for room; any other one is given up."""
        before = bool(self._full)
        (self._full.add if full else self._full.discard)(replica.device)
        if bool(self._full) is not before:
            self._events.full(bool(self._full))

    def read_failed(self, replica: Replica, read: Read, error: int) -> None:
        """A replica that cannot give a page back has not got it: the others' content is put there."""
        if error != errno.ECANCELED and replica.mode is not Mode.AWAY:
            self._replicas.dirty(replica).mark(read.offset // PAGE_BYTES, -(-read.length // PAGE_BYTES))
            reason = f"its device answers {errno.errorcode.get(error, error)} to a read"
            self.lose(replica, reason, pause=True)

    # Decisions

    def decide(self) -> None:
        """Give up what is lost while something else is left, and tell whether anything is."""
        replicas = self._replicas
        replicas.have_changed()
        if replicas.opening or replicas.closing or self._ownership.fenced:
            if self._ownership.fenced:
                self._stalls(True)
            return
        for replica in list(replicas):
            lost = not replica.well or replica.device in self._full
            if lost and (
                replica.mode is Mode.RESYNCING
                or (replica.mode is Mode.COUNTS and replicas.survives_without(replica))
            ):
                self.lose(replica, replica.reason or "its device is full")
        self._stalls(replicas.readable() is None)
        if self._stalled:
            for replica in replicas:
                self._repeat_reads(replica)
        for replica in replicas:
            if replica.resync:
                replica.resync.wake()
        self._record()

    def _stalls(self, stalled: bool) -> None:
        if stalled is not self._stalled:
            self._stalled = stalled
            self._events.no_path(stalled)

    def lose(self, replica: Replica, reason: str, *, pause: bool = False) -> None:
        """Give a replica up: it misses what is on its way to it, which goes on once that is recorded.

        `pause` leaves a device alone for a while that answers with errors.
        """
        if replica.mode is Mode.AWAY or self._replicas.closing:
            return
        counted = replica.mode is Mode.COUNTS
        self._replicas.dirty(replica)
        replica.become(Mode.AWAY, self._loop.time(), reason)
        replica.was_lost = True
        if pause:
            replica.pause(self._loop.time())
        resync, replica.resync = replica.resync, None
        if resync:
            replica.resynced_pages = resync.copied_pages
            resync.stop()
        replica.volume.drop(reason)
        replica.well = False
        survivor = self._replicas.readable()
        if survivor and survivor.volume.active_vios:
            self._events.taken_over(replica.name, survivor.volume.active_vios)
        if counted:
            self._events.alarm(
                "replica_stale",
                f"the replica on device {replica.name} is lost: {reason}; "
                "what it misses is marked and copied to it when it is back",
            )
            self._events.active()
        self._record()
        self._replicas.push()
