"""A volume of one replica over its paths: the commands of its client, and what the client sees of it.

No error of a path or a device reaches the caller: commands wait until they succeed (`dispatch.py`), while
`paths.py` sees to it that a path carries them.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from farpage.blockio import BlockIO, Done, ReadDone, Run, write_runs
from farpage.volume.command import Command, Finished
from farpage.volume.connector import Connector, Endpoint
from farpage.volume.errors import ClientFenced, NoPath
from farpage.volume.events import VolumeEvents
from farpage.volume.failover import FailoverLog
from farpage.volume.lease import Leases
from farpage.volume.link import PathLink, PathStatus
from farpage.volume.ownership import Ownership
from farpage.volume.paged import MirrorCounts, ReplicaStatus
from farpage.volume.paths import Paths, Place
from farpage.volume.rewrite import RewriteGate
from farpage.volume.shortcut import Shortcut
from farpage.volume.state import ReplicaHealth


class _Owner:
    """The volume as its paths see it: what they tell goes to whom it concerns by then."""

    def __init__(self, volume: MultipathVolume, events: VolumeEvents) -> None:
        self.events = events
        self._volume = volume

    def taken_over(self) -> None:
        self._volume.on_active()

    def no_path(self, none: bool) -> None:
        self._volume.on_no_path(none)

    def server_fenced(self) -> None:
        self._volume.on_fenced_server()

    def full(self, full: bool) -> None:
        self._volume.on_full(full)

    def gives_up(self, error: int) -> bool:
        return self._volume.gives_up(error)

    def epoch_raised(self, epoch: int) -> None:
        self.events.epoch_raised(epoch)

    def vios_doubted(self, vios: str) -> None:
        self.events.vios_doubted(vios)

    def alarm(self, kind: str, message: str) -> None:
        self.events.alarm(kind, f"volume {self._volume.name}: {message}")


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
        had_owner: bool = False,
        path_timeout_seconds: float = 1.0,
        probe_interval_seconds: float = 1.0,
    ) -> None:
        """With `had_owner` nothing is written before no server can carry out anything older any more."""
        self.name = name
        self.device = device
        """Identifier of the device that all paths lead to."""
        self.device_name = device_name
        self.ownership = ownership
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
        self._connector = connector
        self._leases = leases
        self._opened_seconds = asyncio.get_running_loop().time()
        self._owner = _Owner(self, events)
        self._rewrites = RewriteGate()
        self._paths = Paths(
            Place(name, size_bytes, device_name, path_timeout_seconds, probe_interval_seconds),
            self._links(endpoints, device),
            ownership,
            self._owner,
            had_owner=had_owner,
        )
        self._commands = self._paths.commands
        self._direct = self._paths.direct

    def _links(self, endpoints: Iterable[Endpoint], device: str) -> list[PathLink]:
        now = asyncio.get_running_loop().time()
        return [
            PathLink(endpoint, self.ownership, self._connector, self._leases, now, device=device)
            for endpoint in endpoints
        ]

    # What it looks like

    @property
    def epoch(self) -> int:
        """What this volume is opened with; the ownership's may be higher, by another replica's takeover."""
        return self._paths.epoch

    @property
    def shortcut(self) -> Shortcut:
        """What may be read past it."""
        return self._direct

    @property
    def failovers(self) -> FailoverLog:
        """The latest losses of the active path."""
        return self._paths.failovers

    @failovers.setter
    def failovers(self, log: FailoverLog) -> None:
        self._paths.failovers = log

    @property
    def relayed(self) -> bool:
        """Whether it is being moved; see `PagedVolume`."""
        active = self._commands.active
        return active is not None and bool(active.endpoint.source)

    @property
    def held_bytes(self) -> int:
        """Bytes of writes that wait until a failed server is fenced."""
        return self._paths.quarantine.bytes

    def status(self) -> list[PathStatus]:
        """Every path, in the order of preference."""
        return [path.status() for path in self._paths.links]

    def reasons(self) -> str:
        """Say for each path why it does not carry the commands, in one line."""
        return self._paths.reasons()

    @property
    def ready(self) -> bool:
        """Whether commands are carried out now, and no server can still carry out one that was given up."""
        return self._paths.ready

    @property
    def predecessors_gone(self) -> bool:
        """Whether no server can still carry out what it was sent before this owner began."""
        return self._paths.predecessors_gone

    @property
    def answers(self) -> bool:
        """Whether a path carries commands, as far as `on_no_path` has told."""
        return self._paths.answers

    @property
    def full(self) -> bool:
        """Whether writes wait for room."""
        return self._commands.full

    @property
    def repairing(self) -> bool:
        """Whether a `rewrite_replica` is under way."""
        return self._rewrites.active

    @property
    def active_vios(self) -> str | None:
        """The VIOS that carries the commands; None while none does."""
        active = self._commands.active
        return active.endpoint.vios if active else None

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
                await self._paths.activated()
        except TimeoutError:
            reasons = self.reasons()
            await self.abandon()
            raise NoPath(self.name, reasons) from None
        if self.ownership.fenced:
            await self.abandon()
            raise ClientFenced(self.name, self.ownership.fenced)

    def start(self) -> None:
        """Begin to connect the paths."""
        self._paths.start()

    def report_to(self, events: VolumeEvents) -> None:
        """Tell another owner from now on."""
        self._owner.events = events

    def redirect_reads(self, adopt: Callable[[int, int, ReadDone], ReadDone]) -> None:
        """Have somebody else told of the reads in flight; `adopt(offset, length, done)` returns who."""
        for command in self.outstanding():
            if not command.mutates:
                command.finished = adopt(command.offset, command.length_bytes, command.finished)
        self._direct.redirect(adopt)

    def drop(self, reason: str, *, for_good: bool = False) -> None:
        """Give up every command at once: each ends with ECANCELED, and its buffer is free then.

        The paths are connected anew; whatever a server may still carry out keeps the volume from being
        `ready` until it is fenced. With `for_good` the volume is only abandoned after it.
        """
        if for_good:
            self._paths.give_up(reason)
        else:
            self._paths.drop(reason)
        self._direct.give_up(errno.ECANCELED)
        while left := self._take_all():
            for command in left:
                self._commands.finish(command, errno.ECANCELED, None)

    def _take_all(self) -> list[Command]:
        """Take every command that is on no path's way, without ending it."""
        return [*self._commands.take_off_path(), *self._paths.quarantine.take()]

    def outstanding(self) -> list[Command]:
        """Every command that has not ended."""
        in_flight = [command for path in self._paths.links for command in path.in_flight]
        return [*self._commands.off_path(), *in_flight, *self._paths.quarantine.commands()]

    async def close(self) -> None:
        """Wait for the commands in flight, then let go of the paths."""
        self._direct.stop()
        await self._commands.idle()
        await self.abandon()

    async def abandon(self) -> None:
        """Let go of the paths at once; commands not finished end with ESHUTDOWN."""
        await self._paths.stop()
        self._direct.give_up(errno.ESHUTDOWN)
        self._commands.stop_watching()
        for command in [*self._take_all(), *self._paths.disconnect()]:
            self._commands.finish(command, errno.ESHUTDOWN, None)

    # Going over to another device

    async def go_over(
        self, endpoints: Sequence[Endpoint], device: str, device_name: str, fences: str = ""
    ) -> None:
        """Use the volume at other endpoints from now on, at which its content is just the same.

        For another device one of them is opened under a raised epoch, which drains the VIOS `fences` of what
        was in flight there. The paths to the same device go on, beside new ones.

        :raise NoPath: none of the endpoints can be opened; the volume is used as before.
        """
        if device == self.device:
            used = {(link.endpoint.vios, link.endpoint.address): link for link in self._paths.links}
            for endpoint in endpoints:
                if link := used.get((endpoint.vios, endpoint.address)):
                    link.endpoint = endpoint
            new = [endpoint for endpoint in endpoints if (endpoint.vios, endpoint.address) not in used]
            self._paths.extend(self._links(new, device))
            if not any(endpoint.source for endpoint in endpoints):
                self._paths.use_alone(device)
            return
        await self._paths.go_over(self._links(endpoints, device), device_name, fences)
        self.device, self.device_name = device, device_name

    # Leaving a VIOS on purpose

    async def leave(self, vios: str) -> None:
        """Move off a VIOS that is about to stop; on return it has no command of this volume any more.

        Its path stays away from it until `rejoin`. When it carries the commands, they finish first, or are
        replayed if they do not within the path timeout, while new ones wait; then another path takes over.

        :raise NoPath: no other path can take over; the VIOS goes on being used then.
        """
        await self._paths.leave(vios)

    def rejoin(self, vios: str, reason: str = "") -> None:
        """Try the paths over a VIOS again from now on; until one is back its reason is `reason`."""
        self._paths.rejoin(vios, reason)

    def shun(self, vios: str) -> None:
        """Connect over a VIOS no more until `rejoin`, or for a while."""
        self._paths.shun(vios)

    # Commands: the hot path

    def read(self, offset: int, length: int, done: ReadDone) -> None:
        """Read; waits out every failure."""
        if not self._direct.read(offset, length, done):
            self._paths.serve(offset, length, done)

    def write(self, offset: int, data: memoryview, done: Done) -> None:
        """Write; waits out every failure."""

        def start(io: BlockIO, end: Finished) -> None:
            io.write(offset, data, partial(_end, end))

        self.carry_out(start, offset, len(data), lambda error, _: done(error))

    def write_runs(self, runs: Sequence[Run], done: Done) -> None:
        """Write several runs, rising; waits out every failure, and is done when all are written."""

        def start(io: BlockIO, end: Finished) -> None:
            write_runs(io, runs, partial(_end, end))

        first, (last, data) = runs[0][0], runs[-1]
        length = sum(len(data) for _, data in runs)
        span = last + len(data) - first
        self.carry_out(start, first, length, lambda error, _: done(error), span_bytes=span, runs=runs)

    def zero(self, offset: int, length: int, done: Done) -> None:
        """Zero; waits out every failure."""

        def start(io: BlockIO, end: Finished) -> None:
            io.zero(offset, length, partial(_end, end))

        self.carry_out(start, offset, length, lambda error, _: done(error))

    def carry_out(
        self,
        start: Callable[[BlockIO, Finished], None],
        offset: int,
        length: int,
        finished: Finished,
        *,
        span_bytes: int | None = None,
        runs: Sequence[Run] = (),
    ) -> None:
        """Carry out what changes content, in the way that `start` does; waits out every failure."""
        command = Command(
            start, finished, length, offset=offset, span_bytes=span_bytes, runs=runs, mutates=True
        )
        if self._rewrites.active:
            self._rewrites.pass_or_wait(offset, command.span_bytes, partial(self._commands.submit, command))
        else:
            self._commands.submit(command)

    def push(self) -> None:
        """Send what was submitted in this turn now."""
        self._direct.push()
        self._commands.push()

    # One replica, for comparing and repairing

    def read_replica(
        self, device: str, offset: int, length: int, done: ReadDone, *, other_path: bool = False
    ) -> None:
        """Read what the one replica holds; with `other_path` once, over a standby path."""
        if device != self.device:
            done(errno.ESTALE, None)
        elif not other_path:
            self._paths.serve(offset, length, done)
        elif (standby := self._paths.standby()) is not None and standby.connection is not None:
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

        self._commands.submit(Command(start, finished, len(data), offset=offset, mutates=True))


def _end(end: Finished, error: int) -> None:
    end(error, None)
