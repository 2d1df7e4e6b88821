"""The commands of one volume that have not ended: on the path that carries them, waiting for one, or refused.

No error of a path or a device ends a command: it waits, or is repeated, until it succeeds. Only what its
owner gives up ends with the error.
"""

from __future__ import annotations

import asyncio
import errno
from collections import deque
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Protocol

from farpage.blockio import CONNECTION_LOST
from farpage.volume.command import Command
from farpage.volume.full import FullDevice
from farpage.volume.link import PathLink
from farpage.volume.state import PathState
from farpage.volume.watch import AgeWatch

FIRST_PAUSE_SECONDS = 0.05
LONGEST_PAUSE_SECONDS = 1.0


class PathKeeper(Protocol):
    """Who decides on the path that carries the commands."""

    def refused(self, path: PathLink, error: int, attempts: int) -> bool:
        """Decide whether a refusal is the path's fault; its commands go over another one then."""

    def answered(self, path: PathLink) -> None:
        """A suspect path has answered."""

    def overdue(self, path: PathLink, reason: str) -> None:
        """The oldest command on a path is older than the path timeout."""


class Dispatch:
    """Sends commands over the path that carries them, and keeps those that no path carries."""

    def __init__(
        self,
        keeper: PathKeeper,
        path_timeout_seconds: float,
        *,
        gives_up: Callable[[int], bool],
        on_full: Callable[[bool], None],
        alarm: Callable[[str, str], None],
    ) -> None:
        """`gives_up(error)` tells whether a command that the device refuses ends with the error."""
        self.active: PathLink | None = None
        """The path that has the commands in flight."""
        self._carrier: PathLink | None = None
        """The active path, unless new commands wait for another one to take over."""
        self._keeper = keeper
        self._gives_up = gives_up
        self._alarm = alarm
        self._loop = asyncio.get_running_loop()
        self._full = FullDevice(self._again, on_full)
        self._waiting: deque[Command] = deque()
        self._early: list[Command] | None = None
        """Writes that are held until nothing older can arrive; None once they need not be."""
        self._retrying: dict[Command, asyncio.TimerHandle] = {}
        self._watch = AgeWatch(path_timeout_seconds, self._oldest_seconds, self._overdue)
        self._alarmed: set[tuple[str, int]] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._unfinished = 0

    # Hot path

    def submit(self, command: Command) -> None:
        """Carry a command out now, or as soon as a path carries commands."""
        self._unfinished += 1
        self._idle.clear()
        if self._early is not None and command.mutates:
            self._early.append(command)
        elif self._carrier is None:
            self._waiting.append(command)
        else:
            self._start(self._carrier, command)

    def _start(self, path: PathLink, command: Command) -> None:
        connection = path.connection
        assert connection is not None
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
            self._keeper.answered(path)
        if command.mutates and self._full:
            self._full.carried_out(command)
        if self._watch.repeated and command in self._watch.repeated:
            self._watch.answered(command)
        self.finish(command, 0, result)

    def finish(self, command: Command, error: int, result: Any) -> None:
        """End a command that nothing here holds any more."""
        self._unfinished -= 1
        if self._unfinished == 0:
            self._idle.set()
        command.finished(error, result)

    def push(self) -> None:
        """Send what was submitted in this turn now."""
        if self.active and self.active.connection:
            self.active.connection.push()

    # The path that carries them

    def carry_over(self, path: PathLink | None) -> None:
        """Send new commands over a path from now on; `resume` sends those that wait. None: let all wait."""
        self.active = self._carrier = path

    def hold_off(self) -> None:
        """Let new commands wait, while the active path goes on with those that it has."""
        self._carrier = None

    def resume(self) -> None:
        """Send what waits over the path that carries commands, if one does."""
        while self._waiting and self._carrier is not None:
            self._start(self._carrier, self._waiting.popleft())

    @property
    def holds_writes(self) -> bool:
        """Whether writes are held."""
        return self._early is not None

    def hold_writes(self) -> None:
        """Keep writes until `let_writes_go`; reads go."""
        self._early = []

    def let_writes_go(self) -> None:
        """Carry out the writes that were held, and all others from now on."""
        early, self._early = self._early or [], None
        self._waiting.extend(early)
        self.resume()
        self.push()

    def repeat_first(self, commands: list[Command]) -> None:
        """Let commands of a failed path wait for the next one, before all others."""
        self._waiting.extendleft(reversed(commands))

    def repeat(self, commands: Iterable[Command]) -> None:
        """Let commands of a failed path wait for the next one, behind all others."""
        self._waiting.extend(commands)

    # Refusals

    def _refused(self, path: PathLink, command: Command, error: int) -> None:
        """Decide on a command that the server answered with an error."""
        command.attempts += 1
        if self._keeper.refused(path, error, command.attempts):
            return
        del path.in_flight[command]
        if self._gives_up(error):
            self.finish(command, error, None)
            return
        if error == errno.ENOSPC:
            self._full.refused(command)
            return
        if (path.endpoint.vios, error) not in self._alarmed:
            self._alarmed.add((path.endpoint.vios, error))
            self._alarm(
                "device_error",
                f"VIOS {path.endpoint.vios} answers {errno.errorcode.get(error, error)}: "
                "pages stay in memory and accesses wait; commands are repeated",
            )
        pause = min(FIRST_PAUSE_SECONDS * 2**command.attempts, LONGEST_PAUSE_SECONDS)
        self._retrying[command] = self._loop.call_later(pause, self._retry, command)

    def _retry(self, command: Command) -> None:
        del self._retrying[command]
        self._again(command)

    def _again(self, command: Command) -> None:
        self._unfinished -= 1
        self.submit(command)

    @property
    def full(self) -> bool:
        """Whether writes wait for room."""
        return bool(self._full)

    # Time-outs

    def _oldest_seconds(self) -> float | None:
        in_flight = self.active.in_flight if self.active else None
        return next(iter(in_flight)).started_seconds if in_flight else None

    def _overdue(self, reason: str) -> None:
        if self.active:
            self._keeper.overdue(self.active, reason)

    def timed_out(self, path: PathLink) -> None:
        """Take note that a path is given up because its commands are overdue; before it fails."""
        self._watch.timed_out(path.in_flight)

    # Giving up

    def off_path(self) -> list[Command]:
        """Return the commands that no path has."""
        return [*self._waiting, *self._retrying, *self._full.waiting, *(self._early or ())]

    def take_off_path(self) -> list[Command]:
        """Take out the commands that no path has, without ending them."""
        left = [*self._waiting, *self._retrying, *self._full.abandon(), *(self._early or ())]
        self._waiting.clear()
        for timer in self._retrying.values():
            timer.cancel()
        self._retrying.clear()
        if self._early:
            self._early.clear()
        return left

    async def idle(self) -> None:
        """Wait until every command has ended."""
        await self._idle.wait()

    def stop_watching(self) -> None:
        """Time nothing any more."""
        self._watch.cancel()
