"""Commands over connections that come and go: what was in flight on one that ended is repeated on another.

To read or write the same bytes in the same place once more does no harm. This alone does not keep a
repeated change from passing a later one of the same range, nor what the lost connection may still carry out
from coming after it: whoever needs that sees to it, by waiting or by fencing, or is asked before a command is
sent late (`Command.late`).
"""

from __future__ import annotations

import asyncio
import errno
import math
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol, TypeAlias

from farpage.blockio import CONNECTION_LOST, BlockIO, Done, ExtentsDone, ReadDone

Finished: TypeAlias = Callable[[int, Any], None]
Start: TypeAlias = Callable[["Losable", Finished], None]


class Losable(BlockIO, Protocol):
    """A connection: a `BlockIO` that can be lost."""

    on_lost: Callable[[Exception], None] | None

    @property
    def ended(self) -> bool:
        """Whether it is gone."""

    def abort(self) -> None:
        """End it at once; commands in flight finish with CONNECTION_LOST."""


class Command:
    """One command, until it is finished."""

    __slots__ = ("expires", "finished", "given_up", "late", "start", "user")

    def __init__(
        self,
        start: Start,
        finished: Finished,
        user: object = None,
        *,
        late: Callable[[], None] | None = None,
    ) -> None:
        self.start = start
        self.finished = finished
        self.user = user
        """Whose it is, where several share the connections."""
        self.late = late
        """Called where it would have to wait or be sent again: it is to be submitted once more, or finished.
        None if it may be sent at any time."""
        self.given_up = False
        """Whether nobody waits for it any more: it is not to be sent again."""
        self.expires = 0.0
        """Loop time from which on it waits for no connection any more; 0 while it has not waited."""


class Link:
    """One connection or the place of one."""

    __slots__ = ("commands", "connection", "lost", "used")

    def __init__(self) -> None:
        self.connection: Losable | None = None
        self.commands: dict[Command, None] = {}
        self.lost = asyncio.Event()
        self.used = False
        """Whether it ever had one."""


class Replaying:
    """The commands of a `BlockIO` whose connections come and go; used from one event loop.

    A command waits for a connection for at most `wait_seconds` (math.inf: for ever), then it finishes with
    EIO. A server that keeps its connection and does not answer is waited for, like a disk that hangs: only an
    answer says that a change cannot come late any more. One that refuses because it shuts down (ESHUTDOWN)
    is asked again after `too_busy_pause_seconds`.
    """

    def __init__(self, links: int, wait_seconds: float, *, too_busy_pause_seconds: float = 0.1) -> None:
        self._loop = asyncio.get_running_loop()
        self._links = [Link() for _ in range(links)]
        self._wait_seconds = wait_seconds
        self._too_busy_pause_seconds = too_busy_pause_seconds
        self._waiting: deque[Command] = deque()
        self._expiry: asyncio.TimerHandle | None = None
        self._drain_scheduled = False
        self._pausing: dict[Command, None] = {}
        """Commands that are asked again in a moment."""
        self._closed = False
        self._closed_error = errno.EIO
        """What commands finish with after the end."""

    @property
    def connections(self) -> int:
        """Count the connections that are up."""
        return sum(link.connection is not None for link in self._links)

    # Commands

    def read_now(self, offset: int, into: memoryview) -> bool:
        """Return False: bytes of a server are never at hand."""
        del offset, into
        return False

    def read(self, offset: int, length: int, done: ReadDone) -> None:
        """Read."""
        self.submit(Command(lambda io, end: io.read(offset, length, end), done))

    def write(self, offset: int, data: memoryview, done: Done, *, fua: bool = False) -> None:
        """Write; `data` stays unchanged until `done`, however often it is sent."""
        self._plain(lambda io, end: io.write(offset, data, end, fua=fua), done)

    def zero(
        self,
        offset: int,
        length: int,
        done: Done,
        *,
        punch: bool = True,
        fast: bool = False,
        fua: bool = False,
    ) -> None:
        """Zero."""
        self._plain(lambda io, end: io.zero(offset, length, end, punch=punch, fast=fast, fua=fua), done)

    def trim(self, offset: int, length: int, done: Done, *, fua: bool = False) -> None:
        """Discard."""
        self._plain(lambda io, end: io.trim(offset, length, end, fua=fua), done)

    def cache(self, offset: int, length: int, done: Done) -> None:
        """Have the server read ahead."""
        self._plain(lambda io, end: io.cache(offset, length, end), done)

    def flush(self, done: Done) -> None:
        """Flush; over several connections that is one command, as CAN_MULTI_CONN promises."""
        self._plain(lambda io, end: io.flush(end), done)

    def extents(self, offset: int, length: int, done: ExtentsDone) -> None:
        """Report the allocation."""
        self.submit(Command(lambda io, end: io.extents(offset, length, end), done))

    def _plain(self, start: Callable[[Losable, Done], None], done: Done) -> None:
        self.submit(
            Command(
                lambda io, end: start(io, lambda error: end(error, None)), lambda error, _result: done(error)
            )
        )

    # On their way

    def submit(self, command: Command) -> None:
        """Carry a command out, or keep it until there is a connection."""
        if self._closed:
            command.finished(self._closed_error, None)
            return
        link = self._least_busy()
        if link is None or self._waiting:
            self._wait(command)
        else:
            self._start(link, command)

    def _least_busy(self) -> Link | None:
        best: Link | None = None
        for link in self._links:
            if link.connection is not None and (best is None or len(link.commands) < len(best.commands)):
                best = link
        return best

    def _start(self, link: Link, command: Command) -> None:
        assert link.connection is not None
        link.commands[command] = None
        command.start(link.connection, partial(self._ended, link, command))

    def _ended(self, link: Link, command: Command, error: int, result: Any) -> None:
        link.commands.pop(command, None)
        if error == CONNECTION_LOST:
            self._wait(command)
        elif error == errno.ESHUTDOWN:
            # The server ends; to our clients that number would say that another owner has the volume.
            if not command.expires:
                command.expires = self._loop.time() + self._wait_seconds
            self._pausing[command] = None
            self._loop.call_later(self._too_busy_pause_seconds, self._wait, command)
        elif not command.given_up:
            command.finished(error, result)

    def _wait(self, command: Command) -> None:
        """Put a command among those that wait for a connection, unless it has waited too long."""
        self._pausing.pop(command, None)
        if command.given_up:
            return
        now = self._loop.time()
        if not command.expires:
            command.expires = now + self._wait_seconds
        if self._closed or command.expires <= now:
            command.finished(self._closed_error, None)
            return
        if command.late is not None:
            command.late()
            return
        self._waiting.append(command)
        if self._expiry is None and command.expires != math.inf:
            self._expiry = self._loop.call_at(command.expires, self._expire)
        # Not from here: the connection that ended is yet to hand back its other commands.
        self._schedule_drain()

    def _expire(self) -> None:
        self._expiry = None
        now = self._loop.time()
        expired = [command for command in self._waiting if command.expires <= now]
        if expired:
            self._waiting = deque(command for command in self._waiting if command.expires > now)
        if self._waiting:
            self._expiry = self._loop.call_at(min(command.expires for command in self._waiting), self._expire)
        for command in expired:
            command.finished(errno.EIO, None)

    def _schedule_drain(self) -> None:
        if not self._drain_scheduled:
            self._drain_scheduled = True
            self._loop.call_soon(self._drain)

    def _drain(self) -> None:
        self._drain_scheduled = False
        while self._waiting and (link := self._least_busy()) is not None:
            self._start(link, self._waiting.popleft())

    # Connections

    def _attach(self, link: Link, connection: Losable) -> None:
        """Use a connection from now on; `_detached` is called when it ends unasked."""
        link.connection, link.used = connection, True
        link.lost.clear()
        connection.on_lost = partial(self._lost, link)
        if self._waiting:
            self._schedule_drain()

    def _lost(self, link: Link, error: Exception) -> None:
        link.connection = None
        link.lost.set()
        self._detached(error)

    def _detached(self, error: Exception) -> None:
        """Take note that a connection was lost."""

    async def _end(self) -> None:
        """End the connections; commands that are not finished finish with EIO."""
        self._closed = True
        if self._expiry is not None:
            self._expiry.cancel()
        waiting, self._waiting = self._waiting, deque()
        for link in self._links:
            if link.connection is not None:
                connection, link.connection = link.connection, None
                if link.commands:
                    connection.abort()
                else:
                    await connection.close()
        for command in waiting:
            command.finished(errno.EIO, None)
