"""A volume with replicas on several devices: what one of them loses, the others have.

The rules, in the order in which they matter:

- A write is done when every replica that counts has it. A replica counts when it has every acknowledged page.
- A replica that is lost (no path left, no answer within the path timeout, an error of its device) is given
  up while another one counts and answers. What it misses is marked in its dirty map first; then it is
  recorded stale, durably; only then are writes acknowledged that it has not got.
- The last replica that counts is never given up: its commands wait.
- A replica that is back has been opened under a higher epoch, and no server can still carry out an older
  write of it, neither of this worker nor of one that was killed before it. From then on it gets every new
  write, and beside that what it has missed: see `resync.py`.
- A replica that is to be replaced is recorded retired, durably, while another one counts and is recorded in
  sync; only then is nothing sent to it any more.
- When nothing is missing any more it counts: no write is acknowledged without it, or without its being
  recorded stale anew. It is recorded in sync.
- No error of a path or a device reaches the caller: commands wait until they succeed.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from farpage.blockio import BlockIO, Done, ReadDone
from farpage.definition.model import PAGE_BYTES, ReplicaState
from farpage.errors import FarpageError
from farpage.volume.command import Command, Finished
from farpage.volume.connector import Connector, Endpoint
from farpage.volume.dirty import DirtyMap, DirtyStore, MemoryDirtyStore
from farpage.volume.errors import ClientFenced, NoPath
from farpage.volume.events import MirrorEvents, ReplicaEvents
from farpage.volume.failover import FailoverLog
from farpage.volume.lease import Leases
from farpage.volume.link import PathStatus
from farpage.volume.multipath import MultipathVolume
from farpage.volume.ownership import Ownership
from farpage.volume.pace import Pace
from farpage.volume.paged import MirrorCounts, ReplicaStatus
from farpage.volume.reading import Reads
from farpage.volume.recorder import ReplicaRecorder, States
from farpage.volume.replica import Mode, Read, Replica, Start, Write
from farpage.volume.resync import Resync

RESYNC_BYTES_PER_SECOND = 100 << 20
LOOK_SECONDS = 0.1
"""Pause between two looks whether every server of a replica has heard of a recovery."""


@dataclass(frozen=True)
class ReplicaPlace:
    """A replica: its device, the ways to it, and what the definition says of it."""

    device: str
    name: str
    state: ReplicaState
    endpoints: tuple[Endpoint, ...]


class MirrorVolume:
    """A `PagedVolume` of one or more replicas that waits out the loss of any of them."""

    def __init__(
        self,
        name: str,
        size_bytes: int,
        ownership: Ownership,
        places: Sequence[ReplicaPlace],
        *,
        connector: Connector,
        events: MirrorEvents,
        store: DirtyStore | None = None,
        recover: bool = False,
        leases: Leases | None = None,
        path_timeout_seconds: float = 1.0,
        probe_interval_seconds: float = 1.0,
        resync_bytes_per_second: float = RESYNC_BYTES_PER_SECOND,
    ) -> None:
        """With `recover` the replicas hold content: one that is recorded stale needs what its dirty map says.

        Without, nothing that was paged out before matters.
        """
        self._loop = asyncio.get_running_loop()
        self.name = name
        self.ownership = ownership
        self.failovers = FailoverLog()
        self.on_active: Callable[[], None] = lambda: None
        self.on_full: Callable[[bool], None] = lambda _full: None
        self.on_no_path: Callable[[bool], None] = lambda _none: None
        self.wanted_pages: Callable[[], NDArray[np.bool_]] | None = None
        """The pages whose content on the volume will be read before they are written again."""
        self.wrong_pages: Callable[[int, memoryview], set[int]] | None = None
        """Which pages of a run that was read are not what they should be; asked before a copy is written."""
        self._size_bytes = size_bytes
        self._connector = connector
        self._leases = leases
        self._events = events
        self._store: DirtyStore = store or MemoryDirtyStore(size_bytes // PAGE_BYTES)
        self._path_timeout = path_timeout_seconds
        self._probe_interval = probe_interval_seconds
        self._bandwidth = resync_bytes_per_second
        self._replicas: list[Replica] = []
        self._reads = Reads(self._replicas, self._read_failed)
        self._writes: dict[Write, None] = {}
        self._timers: dict[Replica, asyncio.TimerHandle] = {}
        self._recovery_epoch = ownership.epoch if recover else 0
        self._opening = True
        self._closing = False
        self._stalled = False
        self._full: set[str] = set()
        self._changed = asyncio.Event()
        self._retired: set[asyncio.Task[None]] = set()
        for place in places:
            self._enter(self._connected(place), place.state if recover else ReplicaState.IN_SYNC)
        self._recorder = ReplicaRecorder(
            {place.device: place.state for place in places},
            self._wanted_states,
            self._record,
            self._on_recorded,
        )

    def _connected(self, place: ReplicaPlace) -> Replica:
        volume = MultipathVolume(
            self.name,
            self._size_bytes,
            self.ownership,
            list(place.endpoints),
            connector=self._connector,
            events=ReplicaEvents(self._events, lambda: self._is_last(replica)),
            device=place.device,
            device_name=place.name,
            leases=self._leases,
            path_timeout_seconds=self._path_timeout,
            probe_interval_seconds=self._probe_interval,
        )
        replica = Replica(
            place.device, place.name, volume, Pace(self._bandwidth), Mode.AWAY, self._loop.time()
        )
        return replica

    # Replicas that come and go

    def adopt(self, volume: MultipathVolume) -> None:
        """Go on with an open volume as the first replica, in sync.

        Its commands go on and count as this mirror's; who owns it has to use the mirror from now on. It must
        not have a repair under way.
        """
        now = self._loop.time()
        replica = Replica(volume.device, volume.device_name, volume, Pace(self._bandwidth), Mode.COUNTS, now)
        replica.well = volume.answers
        self.failovers = volume.failovers
        self.on_active = volume.on_active
        self.on_no_path = volume.on_no_path
        self.on_full = volume.on_full
        self.wanted_pages = volume.wanted_pages
        self.wrong_pages = volume.wrong_pages
        self._stalled = not replica.well
        if volume.full:
            self._full.add(volume.device)
        volume.report_to(ReplicaEvents(self._events, lambda: self._is_last(replica)))
        self._enter(replica, ReplicaState.IN_SYNC)
        self._recorder.enter(volume.device, ReplicaState.IN_SYNC)
        for command in volume.outstanding():
            if command.mutates:
                self._take_over(replica, command)
        self._opening = False

    def _take_over(self, replica: Replica, command: Command) -> None:
        """Count a command that was sent before as a write of this mirror."""
        finished = command.finished
        write = Write(
            command.start, command.offset, command.length_bytes, lambda error: finished(error, None), 1
        )
        self._writes[write] = None
        command.finished = partial(self._written, replica, write)

    def add(self, place: ReplicaPlace) -> None:
        """Take in a replica that is recorded stale: everything is copied to it, and new data goes to it too.

        Nothing happens when there is one on that device already.
        """
        if self._closing or any(replica.device == place.device for replica in self._replicas):
            return
        replica = self._connected(place)
        self._store.drop_dirty_map(place.device)
        self._recorder.enter(place.device, ReplicaState.STALE)
        self._enter(replica, ReplicaState.STALE)
        replica.reason = "new: everything is copied to it"
        for write in self._writes:
            replica.missed(write, self._dirty(replica))
        replica.volume.start()

    async def retire(self, device: str) -> None:
        """Take a replica out; returns when it is recorded retired and nothing is sent to it any more.

        That waits until another one answers that is recorded in sync. Nothing happens when there is none on
        that device.
        """
        replica = next((replica for replica in self._replicas if replica.device == device), None)
        if replica is None:
            return
        replica.retiring = True
        self._recorder.wake()
        while replica in self._replicas and not self._closing:
            self._changed.clear()
            await self._changed.wait()

    def _can_retire(self, replica: Replica) -> bool:
        return replica.retiring and any(
            other is not replica
            and not other.retiring
            and other.readable
            and self._recorder.of(other.device) is ReplicaState.IN_SYNC
            for other in self._replicas
        )

    def _remove(self, replica: Replica) -> None:
        """Forget a replica that is recorded retired: what was on its way to it counts without it."""
        reason = "it was replaced"
        self._replicas.remove(replica)
        self._recorder.leave(replica.device)
        replica.gone = True
        self._become(replica, Mode.AWAY, reason)
        if timer := self._timers.pop(replica, None):
            timer.cancel()
        resync, replica.resync = replica.resync, None
        if resync:
            resync.stop()
        replica.volume.drop(reason)
        waiting, replica.unrecorded = replica.unrecorded, []
        for write in waiting:
            self._heard(write)
        if replica.dirty:
            replica.dirty.release()
            replica.dirty = None
        self._store.drop_dirty_map(replica.device)
        task = self._loop.create_task(replica.volume.abandon())
        self._retired.add(task)
        task.add_done_callback(self._retired.discard)
        self._changed.set()
        self.push()

    def _enter(self, replica: Replica, state: ReplicaState) -> None:
        """Take a replica in, with what it has missed."""
        volume = replica.volume
        volume.failovers = self.failovers
        volume.on_active = partial(self._answers, replica)
        volume.on_no_path = partial(self._no_path, replica)
        volume.on_full = partial(self._told_full, replica)
        volume.on_fenced_server = partial(self._consider, replica)
        volume.gives_up = partial(self._gives_up, replica)
        self._replicas.append(replica)
        if state is ReplicaState.IN_SYNC:
            replica.mode = Mode.COUNTS
            self._store.drop_dirty_map(replica.device)
            return
        replica.reason = "not in sync before"
        replica.was_lost = True
        # A map that is not there is made with everything missed, at once: the process may end at any moment.
        self._dirty(replica, missed=True)

    def _dirty(self, replica: Replica, *, missed: bool = False) -> DirtyMap:
        if replica.dirty is None:
            try:
                storage = self._store.dirty_map(replica.device, missed=missed)
            except FarpageError:
                # No room for it where it outlives the process: should that end, all pages count as missed.
                storage = memoryview(bytearray(bytes([missed]) * (self._size_bytes // PAGE_BYTES)))
            replica.dirty = DirtyMap(storage)
        return replica.dirty

    # What it looks like

    @property
    def epoch(self) -> int:
        """The highest epoch that a replica was opened with."""
        return max(replica.volume.epoch for replica in self._replicas)

    @property
    def held_bytes(self) -> int:
        """Bytes of writes that wait until a failed server is fenced."""
        return sum(r.volume.held_bytes for r in self._replicas if r.mode is Mode.COUNTS)

    @property
    def replicas(self) -> tuple[str, ...]:
        """The replicas that have every acknowledged page."""
        return tuple(replica.device for replica in self._replicas if replica.mode is Mode.COUNTS)

    def status(self) -> list[PathStatus]:
        """Every path of every replica."""
        return [path for replica in self._replicas for path in replica.volume.status()]

    def replica_status(self) -> list[ReplicaStatus]:
        """Every replica."""
        now = self._loop.time()
        return [replica.status(self._recorder.of(replica.device), now) for replica in self._replicas]

    @property
    def counts(self) -> MirrorCounts:
        """What was read twice."""
        return MirrorCounts(self._reads.hedged, self._reads.won)

    # Opening and closing

    async def open(self, timeout_seconds: float) -> None:
        """Connect all replicas and wait until one that has everything answers, the others a moment longer.

        :raise NoPath: when none does after `timeout_seconds`; the volume is closed then.
        :raise ClientFenced: another owner has it; the volume is closed then.
        """
        for replica in self._replicas:
            replica.volume.start()
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._until(lambda: any(r.readable for r in self._replicas))
        except TimeoutError:
            reasons = "; ".join(f"{r.name}: {r.volume.reasons()}" for r in self._replicas)
            await self.abandon()
            raise NoPath(self.name, reasons) from None
        try:
            async with asyncio.timeout(min(self._path_timeout, timeout_seconds)):
                await self._until(lambda: all(r.well for r in self._replicas if r.mode is Mode.COUNTS))
        except TimeoutError:
            pass
        if self.ownership.fenced:
            await self.abandon()
            raise ClientFenced(self.name, self.ownership.fenced)
        self._opening = False
        for replica in self._replicas:
            if not replica.well:
                replica.reason = replica.volume.reasons()
            self._consider(replica)
        self._decide()

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition() and not self.ownership.fenced:
            self._changed.clear()
            await self._changed.wait()

    async def close(self) -> None:
        """Wait for the commands in flight, then let go of the paths."""
        while self._writes or self._reads.in_flight:  # noqa: ASYNC110 - an event would cost every command
            await asyncio.sleep(0.001)
        await self.abandon()

    async def abandon(self) -> None:
        """Let go of the paths at once; commands not finished end with ESHUTDOWN."""
        self._closing = True
        self._reads.close()
        self._changed.set()
        await self._recorder.stop()
        for timer in self._timers.values():
            timer.cancel()
        for replica in self._replicas:
            if replica.resync:
                replica.resync.stop()
        for replica in self._replicas:
            await replica.volume.abandon()
            if replica.dirty:
                replica.dirty.release()
                replica.dirty = None
        await asyncio.gather(*self._retired)
        for write in list(self._writes):
            write.error = write.error or errno.ESHUTDOWN
            self._end(write)

    # Commands: the hot path

    def read(self, offset: int, length: int, done: ReadDone) -> None:
        """Read from the fastest replica; waits out every failure."""
        self._reads.read(offset, length, done)

    def write(self, offset: int, data: memoryview, done: Done) -> None:
        """Write to every replica; waits out every failure."""

        def start(io: BlockIO, end: Finished) -> None:
            io.write(offset, data, lambda error: end(error, None))

        self._submit(start, offset, len(data), done)

    def zero(self, offset: int, length: int, done: Done) -> None:
        """Zero on every replica; waits out every failure."""

        def start(io: BlockIO, end: Finished) -> None:
            io.zero(offset, length, lambda error: end(error, None))

        self._submit(start, offset, length, done)

    def _submit(self, start: Start, offset: int, length: int, done: Done) -> None:
        write = Write(start, offset, length, done, len(self._replicas))
        self._writes[write] = None
        for replica in self._replicas:
            self._send(replica, write)

    def _send(self, replica: Replica, write: Write) -> None:
        if replica.mode is Mode.COUNTS:
            replica.volume.carry_out(
                write.start, write.offset, write.length, partial(self._written, replica, write)
            )
        elif replica.mode is Mode.RESYNCING and replica.resync:
            replica.missed(write, self._dirty(replica))
            replica.resync.admit(write.first, write.count, partial(self._send_resyncing, replica, write))
        else:
            self._missed(replica, write)

    def _send_resyncing(self, replica: Replica, write: Write) -> None:
        """Send a write to a replica that no copy of the same pages is on its way to."""
        if replica.mode is not Mode.RESYNCING:
            self._send(replica, write)
            return
        replica.missed(write, self._dirty(replica))
        replica.volume.carry_out(
            write.start, write.offset, write.length, partial(self._written, replica, write)
        )

    def _written(self, replica: Replica, write: Write, error: int, _result: Any) -> None:
        if error == 0:
            if replica.mode is not Mode.COUNTS and replica.dirty:
                replica.dirty.clear(write.first, write.count)
                self._copied(replica)
            self._heard(write)
        elif self._closing:
            write.error = error
            self._heard(write)
        else:
            if error != errno.ECANCELED:
                self._lose(replica, f"its device answers {_name(error)}", pause=True)
            self._missed(replica, write)

    def _missed(self, replica: Replica, write: Write) -> None:
        """Mark what a replica has not got, and let the write go on without it as soon as that is recorded."""
        if replica.gone:
            self._heard(write)
            return
        replica.missed(write, self._dirty(replica))
        if self._recorder.is_stale(replica.device):
            self._heard(write)
        else:
            replica.unrecorded.append(write)

    def _heard(self, write: Write) -> None:
        """One replica has the write, or is known to lack it."""
        write.pending -= 1
        if write.pending <= 0:
            self._end(write)

    def _end(self, write: Write) -> None:
        if write not in self._writes:
            return
        del self._writes[write]
        if write.missed_by:
            pages = range(write.first, write.first + write.count)
            for replica in write.missed_by:
                replica.busy.difference_update(pages)
                if replica.resync and not self._closing:
                    self._copied(replica)
                    if replica.resync:
                        replica.resync.wake()
        write.done(write.error)

    def push(self) -> None:
        """Send what was submitted in this turn now."""
        for replica in self._replicas:
            replica.volume.push()

    # Leaving a VIOS on purpose

    async def leave(self, vios: str) -> None:
        """Move off a VIOS that is about to stop: to other paths, or on without replicas that only it serves.

        :raise NoPath: the last replica that has everything would be lost; the VIOS goes on being used then.
        """
        for replica in list(self._replicas):
            if all(path.endpoint.vios != vios for path in replica.volume.status()):
                continue
            try:
                await replica.volume.leave(vios)
            except NoPath:
                if self._is_last(replica):
                    self.rejoin(vios)
                    raise
                replica.volume.shun(vios)
                self._lose(replica, f"VIOS {vios} is being stopped")
                replica.volume.drop(f"VIOS {vios} is being stopped")

    def rejoin(self, vios: str, reason: str = "") -> None:
        """Try the paths over a VIOS again from now on; until one is back its reason is `reason`."""
        for replica in self._replicas:
            replica.volume.rejoin(vios, reason)

    # One replica, for comparing and repairing

    def read_replica(
        self, device: str, offset: int, length: int, done: ReadDone, *, other_path: bool = False
    ) -> None:
        """Read what one replica holds."""
        replica = self._counting(device)
        if replica is None or not replica.well:
            done(errno.ESTALE, None)
            return

        def finished(error: int, payload: memoryview | None) -> None:
            done(errno.ESTALE if error == errno.ECANCELED else error, payload)

        replica.volume.read_replica(device, offset, length, finished, other_path=other_path)

    def rewrite_replica(self, device: str, offset: int, data: memoryview, done: Done) -> None:
        """Put one replica right."""
        replica = self._counting(device)
        if replica is None or not replica.well:
            done(errno.ESTALE)
            return
        first, count = offset // PAGE_BYTES, -(-len(data) // PAGE_BYTES)

        def finished(error: int) -> None:
            if replica.gone:
                error = errno.ESTALE
            elif error and not self._closing:
                self._dirty(replica).mark(first, count)
                self._lose(replica, f"its device answers {_name(error)} to a repair", pause=True)
                error = errno.ESTALE
            done(error)

        replica.volume.rewrite_replica(device, offset, data, finished)

    def _counting(self, device: str) -> Replica | None:
        return next((r for r in self._replicas if r.device == device and r.mode is Mode.COUNTS), None)

    # Losing a replica

    def _survives_without(self, replica: Replica) -> bool:
        return any(other is not replica and other.readable for other in self._replicas)

    def _is_last(self, replica: Replica) -> bool:
        return replica.mode is Mode.COUNTS and not self._survives_without(replica)

    def _gives_up(self, replica: Replica, _error: int) -> bool:
        return replica.mode is not Mode.COUNTS or self._survives_without(replica)

    def _no_path(self, replica: Replica, none: bool) -> None:
        if not none:
            self._answers(replica)
            return
        replica.well = False
        if replica.mode is not Mode.AWAY:
            replica.reason = replica.volume.reasons()
        self._decide()

    def _told_full(self, replica: Replica, full: bool) -> None:
        """Only the last replica that counts waits for room; any other one is given up."""
        before = bool(self._full)
        (self._full.add if full else self._full.discard)(replica.device)
        if bool(self._full) is not before:
            self.on_full(bool(self._full))

    def _read_failed(self, replica: Replica, read: Read, error: int) -> None:
        """A replica that cannot give a page back has not got it: the others' content is put there."""
        if error != errno.ECANCELED and replica.mode is not Mode.AWAY:
            self._dirty(replica).mark(read.offset // PAGE_BYTES, -(-read.length // PAGE_BYTES))
            self._lose(replica, f"its device answers {_name(error)} to a read", pause=True)

    def _decide(self) -> None:
        """Give up what is lost while something else is left, and tell whether anything is."""
        self._changed.set()
        if self._opening or self._closing or self.ownership.fenced:
            if self.ownership.fenced:
                self._stalls(True)
            return
        for replica in list(self._replicas):
            lost = not replica.well or replica.device in self._full
            if lost and (
                replica.mode is Mode.RESYNCING
                or (replica.mode is Mode.COUNTS and self._survives_without(replica))
            ):
                self._lose(replica, replica.reason or "its device is full")
        self._stalls(not any(replica.readable for replica in self._replicas))
        if self._stalled:
            for replica in self._replicas:
                self._reads.repeat(replica)
        for replica in self._replicas:
            if replica.resync:
                replica.resync.wake()
        self._recorder.wake()

    def _stalls(self, stalled: bool) -> None:
        if stalled is not self._stalled:
            self._stalled = stalled
            self.on_no_path(stalled)

    def _lose(self, replica: Replica, reason: str, *, pause: bool = False) -> None:
        """Give a replica up: it misses what is on its way to it, which goes on once that is recorded."""
        if replica.mode is Mode.AWAY or self._closing:
            return
        counted = replica.mode is Mode.COUNTS
        self._dirty(replica)
        self._become(replica, Mode.AWAY, reason)
        replica.was_lost = True
        if pause:
            replica.pause(self._loop.time())
        resync, replica.resync = replica.resync, None
        if resync:
            replica.resynced_pages = resync.copied_pages
            resync.stop()
        replica.volume.drop(reason)
        replica.well = False
        survivor = next((other for other in self._replicas if other.readable), None)
        if survivor and survivor.volume.active_vios:
            now = self._loop.time()
            self.failovers.taken_over(replica.name, survivor.volume.active_vios, now)
        if counted:
            self._events.alarm(
                "replica_stale",
                f"volume {self.name}: the replica on device {replica.name} is lost: {reason}; "
                "what it misses is marked and copied to it when it is back",
            )
            self.on_active()
        self._recorder.wake()
        self.push()

    def _become(self, replica: Replica, mode: Mode, reason: str = "") -> None:
        replica.mode = mode
        replica.reason = reason
        replica.since_seconds = self._loop.time()

    # Its return

    def _answers(self, replica: Replica) -> None:
        """A path of a replica carries commands."""
        replica.well = True
        self._consider(replica)
        self._decide()
        if replica.mode is not Mode.AWAY:
            self.on_active()

    def _consider(self, replica: Replica) -> None:
        """Begin to resync a replica, if it is back and no server can still carry out an older write of it."""
        if replica.mode is not Mode.AWAY or self._opening or self._closing or replica.retiring:
            return
        if not replica.volume.ready:
            return
        if any(path.epoch < self._recovery_epoch for path in replica.volume.status()):
            # A server that has not been opened since the recovery may still carry out what the dead worker
            # sent, over a copy of the same pages.
            if replica not in self._timers:
                self._timers[replica] = self._loop.call_later(LOOK_SECONDS, self._consider_again, replica)
            return
        if self._loop.time() < replica.not_before_seconds:
            if replica not in self._timers:
                self._timers[replica] = self._loop.call_at(
                    replica.not_before_seconds, self._consider_again, replica
                )
            return
        replica.well = True
        dirty = self._dirty(replica)
        if self.wanted_pages is not None:
            wanted = self.wanted_pages()
            for write in self._writes:
                wanted[write.first : write.first + write.count] = True
            dirty.keep(wanted)
        self._become(replica, Mode.RESYNCING, "what it has missed is copied to it")
        replica.resync = Resync(
            dirty,
            replica.busy,
            replica.pace,
            read=partial(self._read_for, replica),
            write=partial(self._write_copy, replica),
            wrong=self.wrong_pages,
            on_copied=partial(self._copied, replica),
        )
        again, replica.unrecorded = replica.unrecorded, []
        for write in again:
            self._send(replica, write)
        if self._full:
            # What no other replica has room for may be done as soon as this one has everything.
            for write in [w for w in self._writes if replica in w.missed_by and w not in again]:
                write.pending += 1
                self._send(replica, write)
        replica.volume.push()
        self._copied(replica)
        if replica.resync:
            replica.resync.wake()

    def _consider_again(self, replica: Replica) -> None:
        del self._timers[replica]
        self._consider(replica)

    def _read_for(self, replica: Replica, offset: int, length: int, done: ReadDone) -> bool:
        """Read what a replica has missed from another one that has everything."""
        sources = [other for other in self._replicas if other is not replica and other.readable]
        if not sources:
            return False
        source = min(sources, key=lambda other: other.latency.mean_seconds)

        def finished(error: int, payload: memoryview | None) -> None:
            if error and error not in (errno.ECANCELED, errno.ESHUTDOWN):
                self._read_failed(source, Read(offset, length, done), error)
            done(error, payload)

        source.volume.read(offset, length, finished)
        return True

    def _write_copy(self, replica: Replica, offset: int, data: memoryview, done: Done) -> None:
        def finished(error: int) -> None:
            if error and error != errno.ECANCELED and not self._closing:
                self._lose(replica, f"its device answers {_name(error)}", pause=True)
            done(error)

        replica.volume.write(offset, data, finished)

    def _copied(self, replica: Replica) -> None:
        """Let a replica count when it has everything."""
        if replica.mode is not Mode.RESYNCING or replica.dirty is None or replica.dirty.count:
            return
        if replica.resync:
            replica.resynced_pages = replica.resync.copied_pages
            replica.resync.stop()
            replica.resync = None
        self._become(replica, Mode.COUNTS)
        self._decide()
        self._announce(replica)

    # What the definition says

    def _wanted_states(self) -> States:
        """Say what the definition should say.

        Of a replica that is away it goes on to say "in sync" while nobody could acknowledge a write without
        it: it may yet come back with everything, as the only one.
        """
        states: States = {}
        survivor = any(replica.readable for replica in self._replicas)
        for replica in self._replicas:
            recorded = self._recorder.of(replica.device)
            if self._can_retire(replica):
                states[replica.device] = ReplicaState.RETIRED
                continue
            stale = replica.mode is not Mode.COUNTS and (survivor or recorded is ReplicaState.STALE)
            states[replica.device] = ReplicaState.STALE if stale else ReplicaState.IN_SYNC
            if replica.mode is not Mode.COUNTS and recorded is None and not survivor:
                return {}
        return states

    async def _record(self, states: States) -> None:
        if self.ownership.fenced:
            raise ClientFenced(self.name, self.ownership.fenced)
        await self._events.record_replicas(self.ownership.epoch, states)

    def _on_recorded(self) -> None:
        for replica in list(self._replicas):
            retired = self._recorder.of(replica.device) is ReplicaState.RETIRED
            if retired and replica.retiring and self._survives_without(replica):
                self._remove(replica)
                continue
            if self._recorder.is_stale(replica.device):
                waiting, replica.unrecorded = replica.unrecorded, []
                for write in waiting:
                    self._heard(write)
            self._announce(replica)

    def _announce(self, replica: Replica) -> None:
        """Let go of the dirty map of a replica that is recorded in sync, and tell of its return."""
        if (
            replica.mode is Mode.COUNTS
            and replica.was_lost
            and self._recorder.of(replica.device) is ReplicaState.IN_SYNC
        ):
            replica.was_lost = False
            if replica.dirty:
                replica.dirty.release()
                replica.dirty = None
            self._store.drop_dirty_map(replica.device)
            self._events.alarm(
                "replica_resynced",
                f"volume {self.name}: the replica on device {replica.name} has everything again",
            )


def _name(error: int) -> str:
    return errno.errorcode.get(error, str(error))
