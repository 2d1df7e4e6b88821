"""The paths of one volume: which one carries the commands, and what becomes of those of a path that fails.

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
"""

from __future__ import annotations

import asyncio
import errno
from dataclasses import dataclass, replace
from typing import Protocol

from farpage.blockio import ReadDone
from farpage.errors import FarpageError
from farpage.volume.command import Command
from farpage.volume.direct import DirectReads
from farpage.volume.dispatch import Dispatch
from farpage.volume.errors import NoPath
from farpage.volume.failover import Failover, FailoverLog
from farpage.volume.link import PathLink
from farpage.volume.opening import Opening
from farpage.volume.ownership import Ownership
from farpage.volume.path import PathEvent
from farpage.volume.predecessors import Predecessors
from farpage.volume.quarantine import Quarantine
from farpage.volume.state import PathState
from farpage.volume.upkeep import Upkeep, cause_of

DRAIN_POLL_SECONDS = 0.001
LOOK_SECONDS = 0.1
"""Pause between two looks whether something older may still arrive."""
AWAY_SECONDS = 30.0
"""A path that was left is tried again by itself after this, should nobody say that its VIOS has stopped."""

BEING_STOPPED = "being stopped"
GOING_OVER = "going over to another device"


class PathsOwner(Protocol):
    """What the paths tell their volume, and ask of it."""

    def taken_over(self) -> None:
        """A path carries the commands: what was held up can go on."""

    def no_path(self, none: bool) -> None:
        """No path is left, or the last one doesn't answer; with False, one does."""

    def server_fenced(self) -> None:
        """No server can any more carry out a write that was given up."""

    def full(self, full: bool) -> None:
        """Writes wait because the device has no room for them; with False, they go on."""

    def gives_up(self, error: int) -> bool:
        """Tell whether a command that the device refuses ends with the error instead of waiting."""

    def epoch_raised(self, epoch: int) -> None:
        """Writes go out under a new epoch from now on."""

    def vios_doubted(self, vios: str) -> None:
        """The path that carries the commands has failed or does not answer: its VIOS may answer nobody."""

    def alarm(self, kind: str, message: str) -> None:
        """Something happened that an operator should look at."""


@dataclass(frozen=True)
class Place:
    """The volume that all paths lead to, and how long a path may take to answer."""

    volume: str
    size_bytes: int
    device_name: str
    path_timeout_seconds: float
    probe_interval_seconds: float


class Paths:
    """The paths of one volume on one device."""

    def __init__(
        self,
        place: Place,
        links: list[PathLink],
        ownership: Ownership,
        owner: PathsOwner,
        *,
        had_owner: bool = False,
    ) -> None:
        """With `had_owner` nothing is written before `predecessors_gone`."""
        self.links = links
        """In the order of preference."""
        self.failovers = FailoverLog()
        self._known = list(links)
        """The links, and those of before that have writes held back."""
        self.quarantine = Quarantine(self._known, self._replay, owner.server_fenced)
        self.commands = Dispatch(
            self, place.path_timeout_seconds, gives_up=owner.gives_up, on_full=owner.full, alarm=owner.alarm
        )
        self._place = place
        self._ownership = ownership
        self._owner = owner
        self._opening = self._new_opening()
        self._loop = asyncio.get_running_loop()
        self._was_active = False
        self._written_epoch = 0
        self._stalled = False
        self._tasks: list[asyncio.Task[None]] = []
        self._takeover: asyncio.Task[None] | None = None
        self._going_over = False
        self._activated = asyncio.Event()
        self._closing = False
        self._predecessors = Predecessors(links)
        self._looking: asyncio.TimerHandle | None = None
        self._forget_fenced = ownership.when_fenced(self._fenced)
        if had_owner:
            self.commands.hold_writes()
        self.direct = DirectReads(self.serve, self.commands.push, place.path_timeout_seconds)

    # What they look like

    @property
    def epoch(self) -> int:
        """What the volume is opened with."""
        return self._opening.epoch

    def reasons(self) -> str:
        """Say for each path why it does not carry the commands, in one line."""
        return "; ".join(f"{p.endpoint.vios}: {p.machine.reason}" for p in self.links) or "it has none"

    @property
    def ready(self) -> bool:
        """Whether commands are carried out now, and no server can still carry out one that was given up."""
        active = self.commands.active
        return (
            active is not None
            and self._takeover is None
            and active.machine.state is PathState.ACTIVE
            and not self.quarantine
        )

    @property
    def answers(self) -> bool:
        """Whether a path carries commands, as far as `no_path` has told."""
        return self.commands.active is not None and not self._stalled

    def standby(self) -> PathLink | None:
        """Return the path that would take over."""
        return next(
            (p for p in self.links if p.machine.state is PathState.STANDBY and p.wanted.is_set()), None
        )

    # From first to last

    def start(self) -> None:
        """Begin to connect them."""
        self._tasks = [self._keep_up(path) for path in self.links]

    def _keep_up(self, path: PathLink) -> asyncio.Task[None]:
        upkeep = Upkeep(path, self, self._ownership, self._place.probe_interval_seconds)
        return self._loop.create_task(upkeep.run())

    async def activated(self) -> None:
        """Wait until one is active, or another owner has the volume."""
        await self._activated.wait()

    def drop(self, reason: str) -> None:
        """Give up every one that has something in flight: no command is on its way after it."""
        active = self.commands.active
        for path in self.links:
            if path is not active and path.machine.state is not PathState.FAILED and path.in_flight:
                self.fail(path, reason)
        if active:
            self.fail(active, reason)

    def give_up(self, reason: str) -> None:
        """Give up every one for good and on purpose, which is no failover; as with `drop` nothing is left."""
        self._closing = True
        self.commands.carry_over(None)
        for path in self.links:
            if path.machine.state is not PathState.FAILED:
                self.fail(path, reason, PathEvent.LEFT)

    async def stop(self) -> None:
        """Connect nothing any more."""
        self._closing = True
        self._forget_fenced()
        if self._looking:
            self._looking.cancel()
        running = [*self._tasks, *([self._takeover] if self._takeover else [])]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def disconnect(self) -> list[Command]:
        """Let go of them all; returns the commands that were in flight."""
        left: list[Command] = []
        self.direct.close()
        for path in self._known:
            path.give_back()
            left += path.in_flight
            path.in_flight.clear()
            path.disconnect()
            for held in list(path.held):
                path.forget(held)
        return left

    # Reading

    def serve(self, offset: int, length: int, done: ReadDone) -> None:
        """Read over the path that carries the commands."""
        self.commands.submit(
            Command(lambda io, end: io.read(offset, length, end), done, length, offset=offset, mutates=False)
        )

    # Failing

    def refused(self, path: PathLink, error: int, attempts: int) -> bool:
        """Give a path up whose server refuses to go on, or whose device may work over another one."""
        if error in (errno.ESHUTDOWN, errno.EPERM) or (
            error != errno.ENOSPC and attempts < len(self.links) and self.standby() is not None
        ):
            self.fail(path, f"the server answered {errno.errorcode.get(error, error)}")
            return True
        return False

    def answered(self, path: PathLink) -> None:
        """Trust a suspect path again.

        While a volume is moved, pages that are present are answered although others still wait.
        """
        oldest = next(iter(path.in_flight), None)
        if path.endpoint.source and oldest is not None:
            age = self._loop.time() - oldest.started_seconds
            if age > self._place.path_timeout_seconds:
                return
        path.machine.apply(PathEvent.ANSWERED, self._loop.time())
        self._stalls(False)

    def overdue(self, path: PathLink, reason: str) -> None:
        """Give the path up if another can take over; else only suspect it: a late answer is still one."""
        if self.standby() is None:
            if path.machine.apply(PathEvent.OVERDUE, self._loop.time(), f"{reason}, and no other path"):
                self._owner.vios_doubted(path.endpoint.vios)
                self._owner.alarm("path_suspect", f"VIOS {path.endpoint.vios}: {path.machine.reason}")
                self._stalls(True)
            return
        self.commands.timed_out(path)
        self.fail(path, reason)

    def _lost(self, path: PathLink, error: Exception) -> None:
        self.fail(path, f"connection lost: {cause_of(error)}")

    def fail(self, path: PathLink, reason: str, event: PathEvent = PathEvent.LOST) -> None:
        """Give a path up: replay its reads, hold its writes, let another take over."""
        carried = path.machine.carries
        if carried and self._going_over:
            reason = GOING_OVER
        path.machine.apply(event, self._loop.time(), reason)
        commands = list(path.in_flight)
        path.in_flight.clear()
        reads = [command for command in commands if not command.mutates]
        writes = [command for command in commands if command.mutates]
        self.commands.repeat_first(reads)
        self.commands.repeat(self.quarantine.admit(path, writes))
        path.disconnect()
        path.failed.set()
        if not carried or self._closing:
            return
        self.commands.carry_over(None)
        self.failovers.records.append(
            Failover(
                from_vios=path.endpoint.vios,
                device=self._place.device_name,
                reason=reason,
                detected_at_seconds=self._loop.time(),
                replayed_commands=len(reads),
                quarantined_bytes=sum(command.length_bytes for command in writes),
            )
        )
        if event is PathEvent.LOST and not self._going_over:
            self._owner.vios_doubted(path.endpoint.vios)
            path.untold = reason
            # A VIOS may let go of what is open under an older epoch: if it opens it anew at once, nothing is
            # wrong.
            if path.epoch >= self._ownership.epoch:
                self.unreachable(path)
        self._choose()

    def unreachable(self, path: PathLink) -> None:
        """Tell that a path has failed, if that is not told yet."""
        reason, path.untold = path.untold, ""
        if reason:
            self._owner.alarm("path_failed", f"VIOS {path.endpoint.vios}: {reason}")

    def _stalls(self, stalled: bool) -> None:
        """Tell whether accesses wait for want of a path that answers."""
        if stalled is not self._stalled:
            self._stalled = stalled
            self._owner.no_path(stalled)

    def _replay(self, writes: list[Command]) -> None:
        """Repeat writes whose server is fenced."""
        self.commands.repeat(writes)
        self.commands.resume()

    # Taking over

    def stands_by(self) -> None:
        """Let it take over, if none carries the commands."""
        self._choose()

    def _choose(self) -> None:
        """Let the first standby path take over, unless a path carries the commands or is about to."""
        if self.commands.active is not None or self._takeover is not None:
            return
        if self._closing or self._ownership.fenced:
            return
        path = self.standby()
        if path is not None:
            self._takeover = self._loop.create_task(self._take_over(path))
        elif self._activated.is_set():
            self._activated.clear()
            self._owner.alarm(
                "no_path", "no path is left; accesses to paged-out memory wait until one is back"
            )
            self._stalls(True)

    async def _take_over(self, path: PathLink) -> None:
        problem = ""
        if self._was_active and not self._fences(path):
            self._opening.raise_above(self._written_epoch)
            path.disconnect()
            try:
                await self.open(path)
            except (FarpageError, OSError) as error:
                problem = cause_of(error)
        self._takeover = None
        if problem or path.connection is None:
            if path.machine.state is not PathState.FAILED:
                self.fail(path, problem or "connection lost while it took over")
            self._choose()
            return
        self._carries(path)

    def _fences(self, path: PathLink) -> bool:
        """Tell whether a path is open under an epoch that keeps out all that was written before."""
        return path.connection is not None and path.epoch == self.epoch > self._written_epoch

    def _carries(self, path: PathLink) -> None:
        """Have a path that is open under the present epoch carry the commands."""
        if self._was_active:
            self._owner.epoch_raised(self.epoch)
        self._was_active = True
        self._written_epoch = path.epoch
        now = self._loop.time()
        path.machine.apply(PathEvent.ACTIVATED, now)
        self.commands.carry_over(path)
        self.direct.use(path)
        self._activated.set()
        self._stalls(False)
        self.failovers.taken_over(self._place.device_name, path.endpoint.vios, now)
        for other in self.links:
            if other.held and other.machine.state is PathState.STANDBY:
                self.fail(other, "to be opened under the newer epoch, which fences it")
        self.commands.resume()
        self.commands.push()
        self._owner.taken_over()

    # Going over to another place

    def extend(self, links: list[PathLink]) -> None:
        """Use more paths to where the volume is."""
        self.links = [*self.links, *links]
        self._known += links
        self._tasks += [self._keep_up(path) for path in links]

    def use_alone(self, device: str) -> None:
        """Rely on a device alone from now on: no other one has anything that it has not."""
        self._predecessors.only(device)
        self._look_for_predecessors()

    async def go_over(self, links: list[PathLink], device_name: str, fences: str) -> None:
        """Carry the commands over other paths from now on, to a device that gets at the same content.

        One of them is opened first, under a raised epoch, while the paths of before go on. That drains the
        VIOS `fences`: what was in flight there is repeated at once. At others it has `path_timeout` to
        finish, and writes that do not are held back as those of any path that fails.

        :raise NoPath: none can be opened; the paths of before go on.
        """
        await self._settled()
        switch = self._takeover = self._loop.create_task(self._go_over(links, device_name, fences))
        await asyncio.wait([switch])
        if switch.cancelled():
            raise NoPath(self._place.volume, "it is being closed")
        switch.result()

    async def _go_over(self, links: list[PathLink], device_name: str, fences: str) -> None:
        opening, problems = self._new_opening(), []
        opening.raise_above(self._written_epoch)
        chosen, self._going_over = None, True
        try:
            for path in links:
                try:
                    await opening.open(path)
                except (FarpageError, OSError) as error:
                    path.disconnect()
                    problems.append(f"{path.endpoint.vios}: {cause_of(error)}")
                else:
                    chosen = path
                    break
            active = self.commands.active
            if chosen is not None and active is not None and active.endpoint.vios != fences:
                self.commands.hold_off()
                await self._drained(active)
            if chosen is not None and chosen.connection is not None:
                self._opening = opening
                self._exchange(links, chosen, fences)
                self._place = replace(self._place, device_name=device_name)
                return
        finally:
            self._takeover, self._going_over = None, False
        self.commands.carry_over(self.commands.active)
        self.commands.resume()
        self._choose()
        raise NoPath(self._place.volume, "; ".join(problems) or "connection lost")

    def _exchange(self, links: list[PathLink], chosen: PathLink, fences: str) -> None:
        """Let go of the paths of before, and have a new one carry everything."""
        now, before, device_name = self._loop.time(), self.commands.active, self._place.device_name
        for task in self._tasks:
            task.cancel()
        held_before = bool(self.quarantine)
        self._predecessors.drained(fences)
        self.direct.stop()
        left = self._left_by(fences)
        self._known[:] = [*links, *(path for path in self._known if path.held)]
        self.links = links
        self.commands.repeat_first(left)
        if before is not None:
            self.failovers.records.append(
                Failover(
                    from_vios=before.endpoint.vios,
                    device=device_name,
                    reason=GOING_OVER,
                    detected_at_seconds=now,
                    replayed_commands=len(left),
                )
            )
        self._tasks = [self._keep_up(path) for path in links]
        chosen.machine.apply(PathEvent.PROBED, now)
        self._carries(chosen)
        self._opened(chosen)
        if held_before and not self.quarantine:
            self._owner.server_fenced()

    def _left_by(self, fences: str) -> list[Command]:
        """Disconnect every path; returns the commands that may be repeated at once."""
        left: list[Command] = []
        for path in self.links:
            commands = list(path.in_flight)
            path.in_flight.clear()
            if path.endpoint.vios == fences:
                left += self.quarantine.release_all(path)
                left += commands
            else:
                left += [command for command in commands if not command.mutates]
                left += self.quarantine.admit(path, [command for command in commands if command.mutates])
            path.disconnect()
            path.give_back()
        return left

    # Opening

    def _new_opening(self) -> Opening:
        return Opening(
            self._place.volume,
            self._place.size_bytes,
            self._ownership,
            self._place.path_timeout_seconds,
            lost=self._lost,
            fenced=self._alarm_fenced,
        )

    async def open(self, path: PathLink) -> None:
        """Open the volume over a path; writes held for its server are replayed then.

        The epoch is the present one; where no path carries commands the one to take over with, so that it is
        not opened once more for that.

        :raise FarpageError: when the server cannot be reached, or refuses.
        :raise OSError: when it gives no lease.
        """
        if self._was_active and self.commands.active is None:
            self._opening.raise_above(self._written_epoch)
        await self._opening.open(path)
        self.direct.lent(path)
        self._opened(path)
        self.quarantine.opened(path)

    async def borrow(self, path: PathLink) -> None:
        """Have the storage lent of what was moved here while the path was open."""
        if not path.may_borrow:
            return
        try:
            lent = await path.borrow(self._place.volume, self._place.path_timeout_seconds)
        except (FarpageError, OSError):  # all is served meanwhile
            return
        if lent:
            self.direct.lent(path)

    def _opened(self, path: PathLink) -> None:
        """Take note that a server has accepted the epoch, and so that it has nothing older left."""
        self._predecessors.opened(path, self._loop.time())
        if path.endpoint.source and path.connection is not None and not self.predecessors_gone:
            # It is acknowledged by both devices: over the relay it has come behind the epoch.
            path.connection.flush(self._relayed)
        self._look_for_predecessors()

    def _relayed(self, error: int) -> None:
        if error in (0, errno.ENOTSUP):  # a target that has nothing to flush tells nothing of the source
            self._predecessors.marked(self._loop.time())

    @property
    def predecessors_gone(self) -> bool:
        """Whether no server can still carry out what it was sent before this owner began."""
        return self._predecessors.gone(self._loop.time())

    def _look_for_predecessors(self) -> None:
        """Let writes go as soon as nothing older can arrive any more."""
        if self._looking:
            self._looking.cancel()
            self._looking = None
        if not self.commands.holds_writes or self._closing:
            return
        if self.predecessors_gone:
            self.commands.let_writes_go()
        else:
            self._looking = self._loop.call_later(LOOK_SECONDS, self._look_for_predecessors)

    def _alarm_fenced(self, path: PathLink) -> None:
        self._owner.alarm(
            "fenced",
            f"VIOS {path.endpoint.vios} lets this hypervisor in no more: {self._ownership.fenced}; "
            "accesses to paged-out memory wait for good",
        )

    def _fenced(self) -> None:
        """Give every path up: another owner has the volume. Commands wait until the volume is abandoned."""
        self.direct.stop()
        for path in self.links:
            self.fail(path, self._ownership.fenced)
            path.give_back()
        if self._was_active and self._activated.is_set():
            self._owner.no_path(True)
        self._activated.set()  # whoever waits for a path in vain must hear of it

    async def probe(self, path: PathLink) -> None:
        """Read the volume's first bytes over a path.

        :raise OSError: when the server answers with an error or the connection is lost.
        :raise TimeoutError: when no answer comes in time.
        """
        await self._opening.probe(path)

    # Leaving a VIOS on purpose

    def shun(self, vios: str) -> list[PathLink]:
        """Connect over a VIOS no more until `rejoin`, or for a while; returns its paths."""
        leaving = [path for path in self.links if path.endpoint.vios == vios]
        for path in leaving:
            path.stay_away(BEING_STOPPED, AWAY_SECONDS)
        return leaving

    async def leave(self, vios: str) -> None:
        """Move off a VIOS that is about to stop; on return it has no command any more.

        :raise NoPath: no other path can take over; the VIOS goes on being used then.
        """
        leaving = self.shun(vios)
        await self._settled()
        if (active := self.commands.active) in leaving and active is not None:
            self.commands.hold_off()
            self._takeover = self._loop.create_task(self._hand_over(active))
            await self._settled()
        if self.commands.active is None or self.commands.active in leaving:
            self.rejoin(vios)
            raise NoPath(self._place.volume, f"no path but the one over VIOS {vios} can carry its commands")
        for path in leaving:
            self.fail(path, BEING_STOPPED, PathEvent.LEFT)

    def rejoin(self, vios: str, reason: str = "") -> None:
        """Try the paths over a VIOS again from now on; until one is back its reason is `reason`."""
        for path in self.links:
            if path.endpoint.vios == vios and path.left:
                path.come_back(reason)
                if path.machine.state is PathState.FAILED:
                    path.machine.apply(PathEvent.LEFT, self._loop.time(), reason)

    async def _settled(self) -> None:
        """Wait until no path is about to take over."""
        while self._takeover is not None and not self._closing:
            await asyncio.wait([self._takeover])

    async def _drained(self, path: PathLink) -> None:
        """Wait until the active path has nothing in flight, for at most the path timeout."""
        patience_ends = self._loop.time() + self._place.path_timeout_seconds
        while path is self.commands.active and path.in_flight and self._loop.time() < patience_ends:  # noqa: ASYNC110
            # Polled: an event would cost every command something.
            await asyncio.sleep(DRAIN_POLL_SECONDS)

    async def _hand_over(self, path: PathLink) -> None:
        """Let the active path finish what it has, then another one take over; new commands wait meanwhile."""
        await self._drained(path)
        self._takeover = None
        if self.commands.active is not path:
            self._choose()  # it was lost meanwhile
        elif self.standby() is None:
            self.commands.carry_over(path)
            self.commands.resume()
        else:
            self.fail(path, BEING_STOPPED, PathEvent.LEFT)
