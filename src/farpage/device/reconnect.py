"""An NBD export over connections that are made anew when they end.

A command whose connection ends is repeated on another one (`farpage.nbd.replaying`). That a repeated change
does not pass a later one of the same range, nor comes after its owner has lost the volume, is seen to by the
volume over it (`farpage.device.remotevolume`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Final, TypeAlias

from farpage.address import Address
from farpage.blockio import BlockLimits, Feature
from farpage.errors import FarpageError
from farpage.log import get_logger
from farpage.nbd.client import Connection
from farpage.nbd.replaying import Link, Replaying

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

Verify: TypeAlias = Callable[[Connection], Awaitable[str]]
"""Looks at a new connection and says what is wrong with what it leads to; empty if nothing."""


class Reconnecting(Replaying):
    """The export; used from one event loop. Offsets are those of the export, ranges must lie within it."""

    def __init__(self, address: Address, export: str, first: Connection, *, name: str) -> None:
        """Take over an open connection."""
        count = CONNECTIONS if Feature.MULTI_CONN in first.features else 1
        super().__init__(count, WAIT_SECONDS, too_busy_pause_seconds=TOO_BUSY_PAUSE_SECONDS)
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
        self._use(self._links[0], first)
        self._tasks = [self._loop.create_task(self._keep(link)) for link in self._links]

    # Connections

    def _use(self, link: Link, connection: Connection) -> None:
        self._attach(link, connection)
        self.problem = ""

    def _detached(self, error: Exception) -> None:
        reason = _cause(error)
        if not self.connections:
            self.problem = reason
        log.warning("remote_connection_lost", device=self.name, problem=reason, left=self.connections)

    async def _keep(self, link: Link) -> None:
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

    async def _connect(self, link: Link) -> str:
        """Connect and make sure that this is the same export as ever; returns the problem."""
        if problem := self._one_too_many():
            return problem
        try:
            connection = await open_connection(self.address, self.export)
        except (FarpageError, OSError) as error:
            return _cause(error)
        try:
            problem = (
                self._other_export(connection)
                or await self._verified(connection)
                or self._one_too_many(connection.features)
            )
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

    def _one_too_many(self, features: Feature = Feature.MULTI_CONN) -> str:
        """Say what is wrong with a connection of these features beside the present ones."""
        present = [link.connection.features for link in self._links if link.connection is not None]
        if present and any(Feature.MULTI_CONN not in promised for promised in (*present, features)):
            return "the server allows one connection only now"
        return ""

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
        await self._end()


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
