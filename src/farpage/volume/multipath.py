"""A volume over its paths: failover, replay, and the quarantine of unacknowledged writes.

The rules, in the order in which they matter:

- One path is active and carries the commands; the others stand by, probed.
- A path fails when its connection ends, when a command is older than the path timeout while another
  path could take over, or when its server refuses to go on. Without another path it is only
  *suspect*: an answer that comes late is still an answer.
- Before a path takes over, the epoch rises and the volume is opened there with the new epoch.
- Reads in flight on a failed path are replayed at once. Writes in flight are held back, with
  their data, until the failed server is fenced: its process is gone, or it has accepted a connection of
  a newer epoch, which it does only after its older I/O has drained, or the lease that they were sent under is
  over. So a late write of a half-dead server is never the last one.
- No error of a path or a device reaches the caller: commands wait until they succeed.
"""

from __future__ import annotations

import asyncio
import errno
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from farpage.blockio import CONNECTION_LOST, BlockIO, Done, ReadDone
from farpage.errors import ExitStatus, FarpageError
from farpage.volume.command import Command, Finished
from farpage.volume.connector import Connector, Endpoint
from farpage.volume.failover import Failover, FailoverLog
from farpage.volume.full import FullDevice
from farpage.volume.lease import Leases
from farpage.volume.link import Held, PathLink, PathStatus
from farpage.volume.ownership import Ownership
from farpage.volume.paged import MirrorCounts, ReplicaStatus
from farpage.volume.path import PathEvent
from farpage.volume.refusal import RefusalKind, refusal_of
from farpage.volume.rewrite import RewriteGate
from farpage.volume.state import PathState, ReplicaHealth
from farpage.volume.watch import AgeWatch

FIRST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 1.0
DRAIN_POLL_SECONDS = 0.001
AWAY_SECONDS = 30.0
"""A path that was left is tried again by itself after this, should nobody say that its VIOS has stopped."""

BEING_STOPPED = "being stopped"


class VolumeEvents(Protocol):
    """What a volume tells its owner."""

    def epoch_raised(self, epoch: int) -> None:
        """Writes go out under a new epoch from now on."""

    def alarm(self, kind: str, message: str) -> None:
        """Something happened that an operator should look at."""


@dataclass(eq=False)
class NoPath(FarpageError):
    """No path to a volume became active in time."""

    code = "no_path"
    template = "no path to volume {volume!r} works: {reasons}"
    remedy = "start one of its VIOS; 'farpage vios list' shows what is reachable"
    exit_status = ExitStatus.UNREACHABLE
    volume: str
    reasons: str


@dataclass(eq=False)
class ClientFenced(FarpageError):
    """Another owner has claimed the volume."""

    code = "fenced"
    template = "client {volume!r} is fenced: {reason}"
    remedy = "end the client here if it runs elsewhere now; attach it anew to claim it back"
    exit_status = ExitStatus.CONFLICT
    volume: str
    reason: str


class MultipathVolume:
    """A `PagedVolume` of one replica that waits out the loss of servers and paths."""

    def __init__(
        self,
        name: str,
        size_bytes: int,
        ownership: Ownership,
        endpoints: list[Endpoint],
        *,
        connector: Connector,
        events: VolumeEvents,
        device: str = "",
        device_name: str = "",
        leases: Leases | None = None,
        path_timeout_seconds: float = 1.0,
        probe_interval_seconds: float = 1.0,
    ) -> None:
        loop = asyncio.get_running_loop()
        self.name = name
        self.device = device
        """Identifier of the device that all paths lead to."""
        self.ownership = ownership
        self.epoch = ownership.epoch
        """What this volume is opened with; the ownership's may be higher, by another replica's takeover."""
        self.failovers = FailoverLog()
        self.on_active: Callable[[], None] = lambda: None
        """Called when a path has taken over: what was held up can go on."""
        self.on_full: Callable[[bool], None] = lambda _full: None
        self.on_no_path: Callable[[bool], None] = lambda _none: None
        self.wanted_pages: Callable[[], NDArray[np.bool_]] | None = None
        self.wrong_pages: Callable[[int, memoryview], set[int]] | None = None
        self.on_fenced_server: Callable[[], None] = lambda: None
        """Called when no server can any more carry out a write that was given up."""
        self.gives_up: Callable[[int], bool] = lambda _error: False
        """Asked when the device refuses a command: whether that ends with the error instead of waiting."""
        self.held_bytes = 0
        """Bytes of writes that wait until a failed server is fenced."""
        self._loop = loop
        self.device_name = device_name
        self._opened_seconds = loop.time()
        self._rewrites = RewriteGate()
        self._full = FullDevice(self._again, self._told_full)
        self._stalled = False
        self._size_bytes = size_bytes
        self._events = events
        self._path_timeout = path_timeout_seconds
        self._probe_interval = probe_interval_seconds
        self._paths = [
            PathLink(endpoint, ownership, connector, leases, loop.time(), device=device)
            for endpoint in endpoints
        ]
        self._active: PathLink | None = None
        self._was_active = False
        self._written_epoch = 0
        self._waiting: deque[Command] = deque()
        self._retrying: dict[Command, asyncio.TimerHandle] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._takeover: asyncio.Task[None] | None = None
        self._watch = AgeWatch(path_timeout_seconds, self._oldest_seconds, self._active_overdue)
        self._alarmed: set[tuple[str, int]] = set()
        self._activated = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._unfinished = 0
        self._closing = False
        self._forget_fenced = ownership.when_fenced(self._fenced)

    # What it looks like

    def status(self) -> list[PathStatus]:
        """Every path, in the order of preference."""
        return [path.status() for path in self._paths]

    @property
    def replicas(self) -> tuple[str, ...]:
        """The one replica."""
        return (self.device,)

    def replica_status(self) -> list[ReplicaStatus]:
        """The one replica, which is always in sync."""
        return [
            ReplicaStatus(
                device=self.device,
                name=self.device_name,
                health=ReplicaHealth.IN_SYNC,
                reason="",
                dirty_pages=0,
                resynced_pages=0,
                rate_bytes=0.0,
                eta_seconds=None,
                since_seconds=self._opened_seconds,
            )
        ]

    @property
    def counts(self) -> MirrorCounts:
        """Nothing is read twice from one replica."""
        return MirrorCounts()

    # Opening and closing

    async def open(self, timeout_seconds: float) -> None:
        """Connect all paths and wait until one is active.

        :raise NoPath: when none is after `timeout_seconds`; the volume is closed then.
        :raise ClientFenced: another owner has it; the volume is closed then.
        """
        self.start()
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._activated.wait()
        except TimeoutError:
            reasons = self.reasons()
            await self.abandon()
            raise NoPath(self.name, reasons) from None
        if self.ownership.fenced:
            await self.abandon()
            raise ClientFenced(self.name, self.ownership.fenced)

    def start(self) -> None:
        """Begin to connect the paths."""
        self._tasks = [self._loop.create_task(self._maintain(path)) for path in self._paths]

    def reasons(self) -> str:
        """Say for each path why it does not carry the commands, in one line."""
        return "; ".join(f"{p.endpoint.vios}: {p.machine.reason}" for p in self._paths) or "it has none"

    @property
    def ready(self) -> bool:
        """Whether commands are carried out now, and no server can still carry out one that was given up."""
        active = self._active
        return (
            active is not None
            and self._takeover is None
            and active.machine.state is PathState.ACTIVE
            and not any(path.held for path in self._paths)
        )

    @property
    def answers(self) -> bool:
        """Whether a path carries commands, as far as `on_no_path` has told."""
        return self._active is not None and not self._stalled

    @property
    def full(self) -> bool:
        """Whether writes wait for room."""
        return bool(self._full)

    @property
    def repairing(self) -> bool:
        """Whether a `rewrite_replica` is under way."""
        return self._rewrites.active

    def report_to(self, events: VolumeEvents) -> None:
        """Tell another owner from now on."""
        self._events = events

    @property
    def active_vios(self) -> str | None:
        """The VIOS that carries the commands; None while none does."""
        return self._active.endpoint.vios if self._active else None

    def drop(self, reason: str) -> None:
        """Give up every command at once: each ends with ECANCELED, and its buffer is free then.

        The paths are connected anew; whatever a server may still carry out keeps the volume from being
        `ready` until it is fenced.
        """
        for path in self._paths:
            if path is not self._active and path.machine.state is not PathState.FAILED and path.in_flight:
                self._fail(path, reason)
        if self._active:
            self._fail(self._active, reason)
        while left := self._take_all():
            for command in left:
                self._finish(command, errno.ECANCELED, None)

    def _take_all(self) -> list[Command]:
        """Take every command that is on no path's way, without ending it."""
        left = [*self._waiting, *self._retrying, *self._full.abandon()]
        self._waiting.clear()
        for timer in self._retrying.values():
            timer.cancel()
        self._retrying.clear()
        for held in (held for path in self._paths for held in path.held):
            left += held.commands
            held.commands.clear()
        self.held_bytes = 0
        return left

    def shun(self, vios: str) -> None:
        """Connect over a VIOS no more until `rejoin`, or for a while."""
        for path in self._paths:
            if path.endpoint.vios == vios:
                path.stay_away(BEING_STOPPED, AWAY_SECONDS)

    def outstanding(self) -> list[Command]:
        """Every command that has not ended."""
        left = [*self._waiting, *self._retrying, *self._full.waiting]
        for path in self._paths:
            left += [*path.in_flight, *(command for held in path.held for command in held.commands)]
        return left

    async def close(self) -> None:
        """Wait for the commands in flight, then let go of the paths."""
        await self._idle.wait()
        await self.abandon()

    async def abandon(self) -> None:
        """Let go of the paths at once; commands not finished end with ESHUTDOWN."""
        self._closing = True
        self._forget_fenced()
        running = [*self._tasks, *([self._takeover] if self._takeover else [])]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        self._watch.cancel()
        left = self._take_all()
        for path in self._paths:
            left += path.in_flight
            path.in_flight.clear()
            path.disconnect()
            for held in list(path.held):
                path.forget(held)
        for command in left:
            self._finish(command, errno.ESHUTDOWN, None)

    # Leaving a VIOS on purpose

    async def leave(self, vios: str) -> None:
        """Move off a VIOS that is about to stop; on return it has no command of this volume any more.

        Its path stays away from it until `rejoin`. When it carries the commands, they finish first, or are
        replayed if they do not within the path timeout, while new ones wait; then another path takes over.

        :raise NoPath: no other path can take over; the VIOS goes on being used then.
        """
        leaving = [path for path in self._paths if path.endpoint.vios == vios]
        for path in leaving:
            path.stay_away(BEING_STOPPED, AWAY_SECONDS)
        await self._settled()
        if self._active in leaving:
            self._takeover = self._loop.create_task(self._hand_over(self._active))
            await self._settled()
        if self._active is None or self._active in leaving:
            self.rejoin(vios)
            raise NoPath(self.name, f"no path but the one over VIOS {vios} can carry its commands")
        for path in leaving:
            self._fail(path, BEING_STOPPED, PathEvent.LEFT)

    def rejoin(self, vios: str, reason: str = "") -> None:
        """Try the paths over a VIOS again from now on; until one is back its reason is `reason`."""
        for path in self._paths:
            if path.endpoint.vios == vios and path.left:
                path.come_back(reason)
                if path.machine.state is PathState.FAILED:
                    path.machine.apply(PathEvent.LEFT, self._loop.time(), reason)

    async def _settled(self) -> None:
        """Wait until no path is about to take over."""
        while self._takeover is not None and not self._closing:
            await asyncio.wait([self._takeover])

    async def _hand_over(self, path: PathLink) -> None:
        """Let the active path finish what it has, then another one take over; new commands wait meanwhile."""
        patience_ends = self._loop.time() + self._path_timeout
        while path is self._active and path.in_flight and self._loop.time() < patience_ends:  # noqa: ASYNC110
            # Polled: an event would cost every command something.
            await asyncio.sleep(DRAIN_POLL_SECONDS)
        self._takeover = None
        if self._active is not path:
            self._choose()  # it was lost meanwhile
        elif self._standby() is None:
            self._drain_waiting()
        else:
            self._fail(path, BEING_STOPPED, PathEvent.LEFT)

    # Commands: the hot path

    def read(self, offset: int, length: int, done: ReadDone) -> None:
        """Read; waits out every failure."""
        self._submit(
            Command(lambda io, end: io.read(offset, length, end), done, length, offset=offset, mutates=False)
        )

    def write(self, offset: int, data: memoryview, done: Done) -> None:
        """Write; waits out every failure."""

        def start(io: BlockIO, end: Finished) -> None:
            io.write(offset, data, partial(_end, end))

        self.carry_out(start, offset, len(data), lambda error, _: done(error))

    def carry_out(
        self, start: Callable[[BlockIO, Finished], None], offset: int, length: int, finished: Finished
    ) -> None:
        """Carry out what changes content, in the way that `start` does; waits out every failure."""
        command = Command(start, finished, length, offset=offset, mutates=True)
        if self._rewrites.active:
            self._rewrites.pass_or_wait(offset, length, partial(self._submit, command))
        else:
            self._submit(command)

    def zero(self, offset: int, length: int, done: Done) -> None:
        """Zero; waits out every failure."""

        def start(io: BlockIO, end: Finished) -> None:
            io.zero(offset, length, partial(_end, end))

        self.carry_out(start, offset, length, lambda error, _: done(error))

    def read_replica(
        self, device: str, offset: int, length: int, done: ReadDone, *, other_path: bool = False
    ) -> None:
        """Read what the one replica holds; with `other_path` once, over a standby path."""
        if device != self.device:
            done(errno.ESTALE, None)
        elif not other_path:
            self.read(offset, length, done)
        elif (standby := self._standby()) is not None and standby.connection is not None:
            # A server that hangs is noticed by the path's probes, and the command then ends with an error.
            standby.connection.read(offset, length, done)
            standby.connection.push()
        else:
            done(errno.ENOLINK, None)

    def rewrite_replica(self, device: str, offset: int, data: memoryview, done: Done) -> None:
        """Put the one replica right."""
        if device != self.device:
            done(errno.ESTALE)
            return
        rewrite = self._rewrites.enter(offset, len(data))

        def start(io: BlockIO, end: Finished) -> None:
            io.write(offset, data, partial(_end, end))

        def finished(error: int, _result: Any) -> None:
            done(error)
            self._rewrites.leave(rewrite)

        self._submit(Command(start, finished, len(data), offset=offset, mutates=True))

    def push(self) -> None:
        """Send what was submitted in this turn now."""
        if self._active and self._active.connection:
            self._active.connection.push()

    def _submit(self, command: Command) -> None:
        self._unfinished += 1
        self._idle.clear()
        if self._active is None or self._takeover is not None:
            self._waiting.append(command)
        else:
            self._start(self._active, command)

    def _start(self, path: PathLink, command: Command) -> None:
        connection = path.connection
        assert connection is not None
        command.path = path
        command.started_seconds = self._loop.time()
        path.in_flight[command] = None
        self._watch.started()
        command.start(connection, partial(self._ended, path, command))

    def _ended(self, path: PathLink, command: Command, error: int, result: Any) -> None:
        if command not in path.in_flight or error == CONNECTION_LOST:
            return  # the loss of the path decides for all of its commands
        if error:
            self._refused(path, command, error)
            return
        del path.in_flight[command]
        if path.machine.state is PathState.SUSPECT:
            path.machine.apply(PathEvent.ANSWERED, self._loop.time())
            self._stalls(False)
        if command.mutates and self._full:
            self._full.carried_out(command)
        if self._watch.repeated and command in self._watch.repeated:
            self._watch.answered(command)
        self._finish(command, 0, result)

    def _finish(self, command: Command, error: int, result: Any) -> None:
        self._unfinished -= 1
        if self._unfinished == 0:
            self._idle.set()
        command.finished(error, result)

    # Refusals

    def _refused(self, path: PathLink, command: Command, error: int) -> None:
        """Decide on a command that the server answered with an error."""
        name = errno.errorcode.get(error, str(error))
        command.attempts += 1
        if error in (errno.ESHUTDOWN, errno.EPERM) or (
            error != errno.ENOSPC and command.attempts < len(self._paths) and self._standby() is not None
        ):
            self._fail(path, f"the server answered {name}")
            return
        del path.in_flight[command]
        if self.gives_up(error):
            self._finish(command, error, None)
            return
        if error == errno.ENOSPC:
            self._full.refused(command)
            return
        if (path.endpoint.vios, error) not in self._alarmed:
            self._alarmed.add((path.endpoint.vios, error))
            self._alarm(
                "device_error",
                f"VIOS {path.endpoint.vios} answers {name}: pages stay in memory and accesses wait; "
                "commands are repeated",
            )
        pause = min(FIRST_PAUSE_SECONDS * 2**command.attempts, LONGEST_PAUSE_SECONDS)
        self._retrying[command] = self._loop.call_later(pause, self._retry, command)

    def _retry(self, command: Command) -> None:
        del self._retrying[command]
        self._again(command)

    def _again(self, command: Command) -> None:
        self._unfinished -= 1
        self._submit(command)

    def _told_full(self, full: bool) -> None:
        self.on_full(full)

    # Time-outs

    def _oldest_seconds(self) -> float | None:
        in_flight = self._active.in_flight if self._active else None
        return next(iter(in_flight)).started_seconds if in_flight else None

    def _active_overdue(self, reason: str) -> None:
        if self._active:
            self._overdue(self._active, reason)

    def _overdue(self, path: PathLink, reason: str) -> None:
        """Give the path up if another can take over; else only suspect it: a late answer is still one."""
        if self._standby() is None:
            if path.machine.apply(PathEvent.OVERDUE, self._loop.time(), f"{reason}, and no other path"):
                self._alarm("path_suspect", f"VIOS {path.endpoint.vios}: {path.machine.reason}")
                self._stalls(True)
            return
        self._watch.timed_out(path.in_flight)
        self._fail(path, reason)

    def _alarm(self, kind: str, message: str) -> None:
        self._events.alarm(kind, f"volume {self.name}: {message}")

    # Failing and taking over

    def _standby(self) -> PathLink | None:
        return next(
            (p for p in self._paths if p.machine.state is PathState.STANDBY and p.wanted.is_set()), None
        )

    def _lost(self, path: PathLink, error: Exception) -> None:
        self._fail(path, f"connection lost: {_cause(error)}")

    def _fail(self, path: PathLink, reason: str, event: PathEvent = PathEvent.LOST) -> None:
        """Give a path up: replay its reads, hold its writes, let another take over."""
        carried = path.machine.carries
        path.machine.apply(event, self._loop.time(), reason)
        commands = list(path.in_flight)
        path.in_flight.clear()
        reads = [command for command in commands if not command.mutates]
        writes = [command for command in commands if command.mutates]
        self._waiting.extendleft(reversed(reads))
        repeated = path.hold(writes, self._release)
        self._waiting.extend(repeated)
        if not repeated:
            self.held_bytes += sum(command.length_bytes for command in writes)
        path.disconnect()
        path.failed.set()
        if not carried or self._closing:
            return
        self._active = None
        self.failovers.records.append(
            Failover(
                from_vios=path.endpoint.vios,
                device=self.device_name,
                reason=reason,
                detected_at_seconds=self._loop.time(),
                replayed_commands=len(reads),
                quarantined_bytes=sum(command.length_bytes for command in writes),
            )
        )
        if event is PathEvent.LOST:
            self._alarm("path_failed", f"VIOS {path.endpoint.vios}: {reason}")
        self._choose()

    def _release(self, path: PathLink, held: Held) -> None:
        """Replay held writes: the server that had them is fenced."""
        if held in path.held:
            path.forget(held)
            self.held_bytes -= sum(command.length_bytes for command in held.commands)
            self._waiting.extend(held.commands)
            self._drain_waiting()
            if not any(other.held for other in self._paths):
                self.on_fenced_server()

    def _drain_waiting(self) -> None:
        while self._waiting and self._active and self._takeover is None:
            self._start(self._active, self._waiting.popleft())

    def _choose(self) -> None:
        """Let the first standby path take over, unless a path carries the commands or is about to."""
        if self._active is not None or self._takeover is not None or self._closing or self.ownership.fenced:
            return
        path = self._standby()
        if path is not None:
            self._takeover = self._loop.create_task(self._take_over(path))
        elif self._activated.is_set():
            self._activated.clear()
            self._alarm("no_path", "no path is left; accesses to paged-out memory wait until one is back")
            self._stalls(True)

    def _stalls(self, stalled: bool) -> None:
        """Tell whether accesses wait for want of a path that answers."""
        if stalled is not self._stalled:
            self._stalled = stalled
            self.on_no_path(stalled)

    async def _take_over(self, path: PathLink) -> None:
        problem = ""
        if self._was_active:
            # The epoch rises above any that was written under, so that opening fences whoever wrote.
            self.epoch = self.ownership.raise_above(self._written_epoch)
            path.disconnect()
            try:
                await self._open(path)
            except (FarpageError, OSError) as error:
                problem = _cause(error)
        self._takeover = None
        if problem or path.connection is None:
            if path.machine.state is not PathState.FAILED:
                self._fail(path, problem or "connection lost while it took over")
            self._choose()
            return
        if self._was_active:
            self._events.epoch_raised(self.epoch)
        self._was_active = True
        self._written_epoch = path.epoch
        now = self._loop.time()
        path.machine.apply(PathEvent.ACTIVATED, now)
        self._active = path
        self._activated.set()
        self._stalls(False)
        self.failovers.taken_over(self.device_name, path.endpoint.vios, now)
        for other in self._paths:
            if other.held and other.machine.state is PathState.STANDBY:
                self._fail(other, "to be opened under the newer epoch, which fences it")
        self._drain_waiting()
        self.push()
        self.on_active()

    def _fenced(self) -> None:
        """Give every path up: another owner has the volume. Commands wait until the volume is abandoned."""
        for path in self._paths:
            self._fail(path, self.ownership.fenced)
        if self._was_active and self._activated.is_set():
            self.on_no_path(True)
        self._activated.set()  # whoever waits for a path in vain must hear of it

    def _refused_to_open(self, path: PathLink, error: FarpageError) -> None:
        """Learn from a refusal who has the volume."""
        refusal = refusal_of(error)
        if refusal is None:
            return
        if refusal.kind is RefusalKind.STALE_EPOCH:
            self.ownership.learn(refusal.epoch)
            self.epoch = max(self.epoch, refusal.epoch)
        elif not self.ownership.fenced:
            self.ownership.fence(f"another owner has the volume at epoch {refusal.epoch}")
            self._alarm(
                "fenced",
                f"VIOS {path.endpoint.vios} lets this hypervisor in no more: {self.ownership.fenced}; "
                "accesses to paged-out memory wait for good",
            )

    async def _open(self, path: PathLink) -> None:
        await self._open_once(path)
        while path.epoch < self.epoch:
            # Another path took over meanwhile. Only under its epoch does this server fence what it held.
            path.disconnect()
            await self._open_once(path)
        for held in list(path.held):
            if held.epoch < path.epoch:
                self._release(path, held)

    async def _open_once(self, path: PathLink) -> None:
        try:
            await path.open(self.name, self._size_bytes, self.epoch, self._path_timeout, self._lost)
        except FarpageError as error:
            self._refused_to_open(path, error)
            raise
        if self.ownership.fenced:
            path.disconnect()
            raise ClientFenced(self.name, self.ownership.fenced)

    # Keeping the paths

    async def _maintain(self, path: PathLink) -> None:
        """Connect a failed path again and again; probe a connected one when it is idle."""
        pause = FIRST_PAUSE_SECONDS
        while not self.ownership.fenced:
            if path.machine.state is PathState.FAILED:
                await path.wanted.wait()
                try:
                    await self._open(path)
                    await path.probe(self._size_bytes, self._path_timeout)
                except (FarpageError, OSError) as error:
                    path.disconnect()
                    reason = self.ownership.fenced or path.left or _cause(error)
                    path.machine.apply(PathEvent.LOST, self._loop.time(), reason)
                    await asyncio.sleep(pause)
                    pause = min(pause * 2, LONGEST_PAUSE_SECONDS)
                    continue
                if path.connection is None or path.epoch < self.epoch:
                    path.disconnect()  # another path took over meanwhile: only its epoch fences this server
                    continue
                if not path.wanted.is_set():
                    path.disconnect()
                    continue
                path.left = ""
                pause = FIRST_PAUSE_SECONDS
                path.failed.clear()
                path.machine.apply(PathEvent.PROBED, self._loop.time())
                self._choose()
            if not await self._fails_within(path, self._probe_interval):
                await self._probe_idle(path)

    async def _fails_within(self, path: PathLink, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await path.failed.wait()
        except TimeoutError:
            return False
        path.failed.clear()
        return True

    async def _probe_idle(self, path: PathLink) -> None:
        connection = path.connection
        if connection is None or path.in_flight:
            return
        try:
            await path.probe(self._size_bytes, self._path_timeout)
        except OSError as error:
            if path.connection is not connection:
                return  # it failed or took over meanwhile
            if path.machine.carries and isinstance(error, TimeoutError):
                self._overdue(path, str(error))
            else:
                self._fail(path, str(error))
        else:
            if path.machine.state is PathState.SUSPECT and not path.in_flight:
                path.machine.apply(PathEvent.ANSWERED, self._loop.time())
                self._stalls(False)


def _cause(error: Exception) -> str:
    """Say what went wrong without the remedy: a path's reason is one line of a table."""
    return error.cause if isinstance(error, FarpageError) else str(error)


def _end(end: Finished, error: int) -> None:
    end(error, None)
