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

import numpy as np
from numpy.typing import NDArray

from farpage.blockio import BlockIO, Done, ReadDone, Run, write_each
from farpage.definition.states import PAGE_BYTES, ReplicaState
from farpage.volume.command import Finished
from farpage.volume.connector import Connector, Endpoint
from farpage.volume.dirty import DirtyStore
from farpage.volume.errors import ClientFenced, NoPath
from farpage.volume.events import MirrorEvents
from farpage.volume.failover import FailoverLog
from farpage.volume.lease import Leases
from farpage.volume.link import PathStatus
from farpage.volume.losing import Losing
from farpage.volume.members import Members, Wiring, wanted_states
from farpage.volume.mirrorshortcut import MirrorShortcut
from farpage.volume.multipath import MultipathVolume
from farpage.volume.ownership import Ownership
from farpage.volume.paged import MirrorCounts, ReplicaStatus
from farpage.volume.reading import Reads
from farpage.volume.recorder import ReplicaRecorder, States
from farpage.volume.replica import Mode, Read, Replica, ReplicaPlace
from farpage.volume.replicas import Replicas
from farpage.volume.returning import Returning
from farpage.volume.shortcut import Shortcut
from farpage.volume.writing import Writes

RESYNC_BYTES_PER_SECOND = 100 << 20


class _Owner:
    """The mirror as its parts see it: what they tell goes to whom it concerns by then."""

    def __init__(self, mirror: MirrorVolume, events: MirrorEvents) -> None:
        self._mirror = mirror
        self._events = events
        self._loop = asyncio.get_running_loop()

    @property
    def wanted_pages(self) -> Callable[[], NDArray[np.bool_]] | None:
        return self._mirror.wanted_pages

    @property
    def wrong_pages(self) -> Callable[[int, memoryview], set[int]] | None:
        return self._mirror.wrong_pages

    def active(self) -> None:
        self._mirror.on_active()

    def no_path(self, none: bool) -> None:
        self._mirror.on_no_path(none)

    def full(self, full: bool) -> None:
        self._mirror.on_full(full)

    def taken_over(self, device_name: str, vios: str) -> None:
        self._mirror.failovers.taken_over(device_name, vios, self._loop.time())

    def alarm(self, kind: str, message: str) -> None:
        self._events.alarm(kind, f"volume {self._mirror.name}: {message}")


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
        had_owner: bool = False,
        leases: Leases | None = None,
        path_timeout_seconds: float = 1.0,
        probe_interval_seconds: float = 1.0,
        resync_bytes_per_second: float = RESYNC_BYTES_PER_SECOND,
    ) -> None:
        """With `recover` the replicas hold content: one that is recorded stale needs what its dirty map says.

        Without, nothing that was paged out before matters; with `had_owner` it may yet arrive.
        """
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
        self._events = events
        self._path_timeout = path_timeout_seconds
        self._replicas = Replicas(size_bytes, store)
        self._recorder = ReplicaRecorder(
            {place.device: None if place.unsure else place.state for place in places},
            self._wanted_states,
            self._record,
            self._recorded,
        )
        self._reads = Reads(self._replicas.all, self._read_failed)
        self._shortcut = MirrorShortcut(self._replicas, self._reads)
        owner = _Owner(self, events)
        self._losing = Losing(
            self._replicas, ownership, owner, repeat_reads=self._reads.repeat, record=self._recorder.wake
        )
        self._writes = Writes(self._replicas, self._losing.lose, self._copied, self._recorder.is_stale)
        self._returning = Returning(
            self._replicas,
            self._losing,
            self._writes,
            owner,
            announce=self._announce,
            had_predecessors=recover or had_owner,
        )
        wiring = Wiring(
            name,
            size_bytes,
            ownership,
            connector,
            events,
            leases,
            had_owner,
            path_timeout_seconds,
            probe_interval_seconds,
            resync_bytes_per_second,
        )
        self._members = Members(
            self._replicas,
            wiring,
            recorder=self._recorder,
            losing=self._losing,
            writes=self._writes,
            returning=self._returning,
        )
        for place in places:
            state = place.state if recover else ReplicaState.IN_SYNC
            self._members.enter(place, state, self.failovers)

    # What its parts ask of each other

    def _wanted_states(self) -> States:
        return wanted_states(self._replicas, self._recorder.of)

    async def _record(self, states: States) -> None:
        if self.ownership.fenced:
            raise ClientFenced(self.name, self.ownership.fenced)
        await self._events.record_replicas(self.ownership.epoch, states)

    def _recorded(self) -> None:
        self._members.recorded()

    def _read_failed(self, replica: Replica, read: Read, error: int) -> None:
        self._losing.read_failed(replica, read, error)

    def _copied(self, replica: Replica) -> None:
        self._returning.copied(replica)

    def _announce(self, replica: Replica) -> None:
        self._members.announce(replica)

    # Replicas that come and go

    def adopt(self, volume: MultipathVolume) -> None:
        """Go on with an open volume as the first replica, in sync.

        Its commands go on and count as this mirror's; who owns it has to use the mirror from now on. It must
        not have a repair under way.
        """
        self.failovers = volume.failovers
        self.on_active = volume.on_active
        self.on_no_path = volume.on_no_path
        self.on_full = volume.on_full
        self.wanted_pages = volume.wanted_pages
        self.wrong_pages = volume.wrong_pages
        self._members.adopt(volume, self._reads)
        self._replicas.opening = False

    def add(self, place: ReplicaPlace) -> None:
        """Take in a replica that is recorded stale: everything is copied to it, and new data goes to it too.

        Nothing happens when there is one on that device already.
        """
        if not self._replicas.closing and self._replicas.find(place.device) is None:
            self._members.add(place, self.failovers)

    async def retire(self, device: str) -> None:
        """Take a replica out; returns when it is recorded retired and nothing is sent to it any more.

        That waits until another one answers that is recorded in sync. Nothing happens when there is none on
        that device.
        """
        await self._members.retire(device)

    async def go_over(
        self, endpoints: Sequence[Endpoint], device: str, device_name: str, fences: str = ""
    ) -> None:
        """Use the one replica at other endpoints; see `PagedVolume`."""
        await self._members.go_over(endpoints, device, device_name, fences)

    # What it looks like

    @property
    def shortcut(self) -> Shortcut:
        """What may be read past it."""
        return self._shortcut

    @property
    def epoch(self) -> int:
        """The highest epoch that a replica was opened with."""
        return max(replica.volume.epoch for replica in self._replicas)

    @property
    def predecessors_gone(self) -> bool:
        """Whether no server can still carry out what it was sent before this owner, or worker, began.

        A replica that is away gets nothing before that, also from a worker that takes this one's place, as
        soon as it is recorded as stale.
        """
        return all(
            (r.mode is Mode.AWAY and self._recorder.is_stale(r.device)) or r.volume.predecessors_gone
            for r in self._replicas
        )

    @property
    def relayed(self) -> bool:
        """Whether it is being moved; see `PagedVolume`."""
        return any(replica.volume.relayed for replica in self._replicas)

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
        now = asyncio.get_running_loop().time()
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
                await self._until(lambda: self._replicas.readable() is not None)
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
        self._replicas.opening = False
        for replica in self._replicas:
            if not replica.well:
                replica.reason = replica.volume.reasons()
            self._returning.consider(replica)
        self._losing.decide()

    async def _until(self, condition: Callable[[], bool]) -> None:
        forget = self.ownership.when_fenced(self._replicas.changed.set)
        try:
            while not condition() and not self.ownership.fenced:
                self._replicas.changed.clear()
                await self._replicas.changed.wait()
        finally:
            forget()

    async def close(self) -> None:
        """Wait for the commands in flight, then let go of the paths."""
        while self._writes or self._reads.in_flight:  # noqa: ASYNC110 - an event would cost every command
            await asyncio.sleep(0.001)
        await self.abandon()

    async def abandon(self) -> None:
        """Let go of the paths at once; commands not finished end with ESHUTDOWN."""
        self._replicas.closing = True
        self._reads.close()
        self._replicas.changed.set()
        await self._recorder.stop()
        self._returning.stop()
        await self._members.abandon()
        self._writes.abandon()

    # Commands: the hot path

    def read(self, offset: int, length: int, done: ReadDone) -> None:
        """Read from the fastest replica; waits out every failure."""
        self._reads.read(offset, length, done)

    def write(self, offset: int, data: memoryview, done: Done) -> None:
        """Write to every replica; waits out every failure."""

        def start(io: BlockIO, end: Finished) -> None:
            io.write(offset, data, lambda error: end(error, None))

        self._writes.submit(start, offset, len(data), done)

    def write_runs(self, runs: Sequence[Run], done: Done) -> None:
        """Write several runs to every replica; waits out every failure, and is done when all are written."""
        write_each(self, runs, done)

    def zero(self, offset: int, length: int, done: Done) -> None:
        """Zero on every replica; waits out every failure."""

        def start(io: BlockIO, end: Finished) -> None:
            io.zero(offset, length, lambda error: end(error, None))

        self._writes.submit(start, offset, length, done)

    def push(self) -> None:
        """Send what was submitted in this turn now."""
        self._replicas.push()

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
                if self._replicas.is_last(replica):
                    self.rejoin(vios)
                    raise
                replica.volume.shun(vios)
                self._losing.lose(replica, f"VIOS {vios} is being stopped")
                replica.volume.drop(f"VIOS {vios} is being stopped")

    def rejoin(self, vios: str, reason: str = "") -> None:
        """Try the paths over a VIOS again from now on; until one is back its reason is `reason`."""
        for replica in self._replicas:
            replica.volume.rejoin(vios, reason)

    # One replica, for comparing and repairing

    def read_replica(
        self, device: str, offset: int, length: int, done: ReadDone, *, other_path: bool = False
    ) -> None:
        """Read what one replica holds; waits for one that has everything and does not answer now."""
        replica = self._replicas.counting(device)
        if replica is None:
            done(errno.ESTALE, None)
            return

        def finished(error: int, payload: memoryview | None) -> None:
            done(errno.ESTALE if error == errno.ECANCELED else error, payload)

        replica.volume.read_replica(device, offset, length, finished, other_path=other_path)

    def rewrite_replica(self, device: str, offset: int, data: memoryview, done: Done) -> None:
        """Put one replica right."""
        replica = self._replicas.counting(device)
        if replica is None or not replica.well:
            done(errno.ESTALE)
            return
        first, count = offset // PAGE_BYTES, -(-len(data) // PAGE_BYTES)

        def finished(error: int) -> None:
            if replica.gone:
                error = errno.ESTALE
            elif error and not self._replicas.closing:
                self._replicas.dirty(replica).mark(first, count)
                reason = f"its device answers {errno.errorcode.get(error, error)} to a repair"
                self._losing.lose(replica, reason, pause=True)
                error = errno.ESTALE
            done(error)

        replica.volume.rewrite_replica(device, offset, data, finished)
