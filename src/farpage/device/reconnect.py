"""An NBD export over connections that are made anew when they end.

A command whose connection ends is repeated on another one: to read or write the same bytes in the same
place once more does no harm. `Reconnecting` alone does not keep a repeated change from passing a later one of
the same range; the volume over it does (`farpage.device.remote`).

A command waits for a connection for at most `WAIT_SECONDS`, then it finishes with EIO. A server
that keeps its connection and does not answer is waited for, like a disk that hangs: only an answer says that
a change cannot come late any more.
"""

from __future__ import annotations

import asyncio
import errno
from collections import deque
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any, Final, TypeAlias

from farpage.address import Address
from farpage.blockio import CONNECTION_LOST, BlockLimits, Done, ExtentsDone, Feature, ReadDone
from farpage.errors import FarpageError
from farpage.log import get_logger
from farpage.nbd.client import Connection

log = get_logger()

CONNECTIONS: Final = 4
"""So many to a server that allows several (NBD_FLAG_CAN_MULTI_CONN)."""
WAIT_SECONDS: Final = 5.0
HANDSHAKE_SECONDS: Final = 5.0
DEAD_PEER_SECONDS: Final = 10.0
"""A host that acknowledges nothing for so long is gone, and its connections end."""
FIRST_PAUSE_SECONDS: Final = 0.02
LONGEST_PAUSE_SECONDS: Final = 2.0
TOO_BUSY_PAUSE_SECONDS: Final = 0.1
"""Before a command is repeated that a server has refused because it shuts down."""

Finished: TypeAlias = Callable[[int, Any], None]
Start: TypeAlias = Callable[[Connection, Finished], None]
Verify: TypeAlias = Callable[[Connection], Awaitable[str]]
"""Looks at a new connection and says what is wrong with what it leads to; empty if nothing."""


class _Command:
    __slots__ = ("expires", "finished", "start")

    def __init__(self, start: Start, finished: Finished) -> None:
        self.start = start
        self.finished = finished
        self.expires = 0.0
        """Loop time from which on it waits for no connection any more; 0 while it has not waited."""


class _Link:
    """One connection or the place of one."""

    __slots__ = ("commands", "connection", "lost", "used")

    def __init__(self) -> None:
        self.connection: Connection | None = None
        self.commands: dict[_Command, None] = {}
        self.lost = asyncio.Event()
        self.used = False
        """Whether it ever had one."""


class Reconnecting:
    """The export; used from one event loop. Offsets are those of the export, ranges must lie within it."""

    def __init__(self, address: Address, export: str, first: Connection, *, name: str) -> None:
        """Take over an open connection."""
        self.name = name
        """For the log."""
        self.address = address
        self.export = export
        self.size_bytes = first.size_bytes
        self.read_only = first.read_only
        self.limits: BlockLimits = first.limits
        self.features = first.features
        self.verify: Verify = _accept
        self.reconnects = 0
        """Connections made anew since the start."""
        self.problem = ""
        """Why there is no connection; empty while there is one."""
        self._loop = asyncio.get_running_loop()
        count = CONNECTIONS if Feature.MULTI_CONN in first.features else 1
        self._links = [_Link() for _ in range(count)]
        self._waiting: deque[_Command] = deque()
        self._expiry: asyncio.TimerHandle | None = None
        self._drain_scheduled = False
        self._closed = False
        self._use(self._links[0], first)
        self._tasks = [self._loop.create_task(self._keep(link)) for link in self._links]

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
        self._submit(_Command(lambda io, end: io.read(offset, length, end), done))

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
        self._submit(_Command(lambda io, end: io.extents(offset, length, end), done))

    def _plain(self, start: Callable[[Connection, Done], None], done: Done) -> None:
        self._submit(
            _Command(
                lambda io, end: start(io, lambda error: end(error, None)), lambda error, _result: done(error)
            )
        )

    # On their way

    def _submit(self, command: _Command) -> None:
        if self._closed:
            command.finished(errno.EIO, None)
            return
        link = self._least_busy()
        if link is None or self._waiting:
            self._wait(command)
        else:
            self._start(link, command)

    def _least_busy(self) -> _Link | None:
        best: _Link | None = None
        for link in self._links:
            if link.connection is not None and (best is None or len(link.commands) < len(best.commands)):
                best = link
        return best

    def _start(self, link: _Link, command: _Command) -> None:
        assert link.connection is not None
        link.commands[command] = None
        command.start(link.connection, partial(self._ended, link, command))

    def _ended(self, link: _Link, command: _Command, error: int, result: Any) -> None:
        link.commands.pop(command, None)
        if error == CONNECTION_LOST:
            self._wait(command)
        elif error == errno.ESHUTDOWN:
            # The server ends; to our clients that number would say that another owner has the volume.
            if not command.expires:
                command.expires = self._loop.time() + WAIT_SECONDS
            self._loop.call_later(TOO_BUSY_PAUSE_SECONDS, self._wait, command)
        else:
            command.finished(error, result)

    def _wait(self, command: _Command) -> None:
        """Put a command among those that wait for a connection, unless it has waited too long."""
        now = self._loop.time()
        if not command.expires:
            command.expires = now + WAIT_SECONDS
        if self._closed or command.expires <= now:
            command.finished(errno.EIO, None)
            return
        self._waiting.append(command)
        if self._expiry is None:
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

    def _use(self, link: _Link, connection: Connection) -> None:
        link.connection, link.used = connection, True
        link.lost.clear()
        connection.on_lost = partial(self._lost, link)
        self.problem = ""
        if self._waiting:
            self._schedule_drain()

    def _lost(self, link: _Link, error: Exception) -> None:
        link.connection = None
        link.lost.set()
        reason = _cause(error)
        if not self.connections:
            self.problem = reason
        log.warning("remote_connection_lost", device=self.name, problem=reason, left=self.connections)

    async def _keep(self, link: _Link) -> None:
        """Have a connection on the link, now and whenever one has ended."""
        pause = FIRST_PAUSE_SECONDS
        reported = ""
        while True:
            if link.connection is not None:
                pause, reported = FIRST_PAUSE_SECONDS, ""
                await link.lost.wait()
            problem = await self._connect(link)
            if not problem:
                continue
            if not self.connections:
                self.problem = problem
                if problem != reported:
                    log.error("remote_unreachable", device=self.name, problem=problem)
                    reported = problem
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE_SECONDS)

    async def _connect(self, link: _Link) -> str:
        """Connect and make sure that this is the same export as ever; returns the problem."""
        try:
            connection = await open_connection(self.address, self.export)
        except (FarpageError, OSError) as error:
            return _cause(error)
        try:
            problem = self._other_export(connection) or await self._verified(connection)
        except BaseException:
            connection.abort()
            raise
        if problem or connection.ended:
            connection.abort()
            return problem or "the connection ended at once"
        self.reconnects += link.used
        self._use(link, connection)
        log.info("remote_connected", device=self.name, connections=self.connections)
        return ""

    def _other_export(self, connection: Connection) -> str:
        if connection.size_bytes != self.size_bytes:
            return f"the export has {connection.size_bytes} bytes now, not {self.size_bytes}"
        if connection.read_only and not self.read_only:
            return "the export is read-only now"
        if connection.limits.minimum > self.limits.minimum:
            return f"the export takes no blocks below {connection.limits.minimum} bytes now"
        missing = self.features & ~connection.features
        return f"the export can do less now: {missing}" if missing & ~Feature.MULTI_CONN else ""

    async def _verified(self, connection: Connection) -> str:
        try:
            async with asyncio.timeout(HANDSHAKE_SECONDS):
                return await self.verify(connection)
        except (OSError, ValueError) as error:
            return str(error) or "no answer to the first read"

    async def close(self) -> None:
        """End the connections; commands that are not finished finish with EIO."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
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


async def open_connection(address: Address, export: str) -> Connection:
    """Connect to the export.

    :raise ConnectFailed:
    """
    return await Connection.open(
        address,
        export,
        handshake_timeout_seconds=HANDSHAKE_SECONDS,
        dead_peer_seconds=DEAD_PEER_SECONDS,
    )


async def _accept(_connection: Connection) -> str:
    return ""


def _cause(error: Exception) -> str:
    return error.cause if isinstance(error, FarpageError) else str(error)
