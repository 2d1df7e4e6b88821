"""One path's link: its connection, the process behind it, and what is in flight or held back on it."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from farpage.address import Address
from farpage.blockio import CONNECTION_LOST, DirectFile
from farpage.errors import FarpageError
from farpage.volume.command import Command
from farpage.volume.connector import Connector, Endpoint, PathConnection
from farpage.volume.lease import Lease, Leases
from farpage.volume.ownership import Ownership
from farpage.volume.path import PathMachine
from farpage.volume.server import ServerProcess
from farpage.volume.state import PathState

PROBE_BYTES = 4096
TIMES_ASKED = 10
"""A VIOS is asked so often for what was moved to it: it may not know yet that it has all of it."""


@dataclass(eq=False)
class VolumeTooSmall(FarpageError):
    """What a VIOS serves under the volume's name is not the client's volume."""

    code = "volume_too_small"
    template = "VIOS {vios} serves volume {volume!r} with {found_bytes} bytes instead of {size_bytes}"
    remedy = "its file was cut off or belongs to another client: see 'farpage definition show'"
    volume: str
    vios: str
    found_bytes: int
    size_bytes: int


@dataclass(frozen=True)
class PathStatus:
    """One path as users see it."""

    endpoint: Endpoint
    state: PathState
    reason: str
    epoch: int
    in_flight: int
    held: int
    losses: int
    since_seconds: float
    direct: bool = False
    """The VIOS has lent the storage, so page-ins need not be served by it."""
    direct_reads: int = 0
    direct_failures: int = 0
    """Direct reads that failed or were late, and were served instead."""


@dataclass(eq=False)
class Held:
    """Writes that a failed server may still carry out, sent under `epoch`."""

    epoch: int
    server: ServerProcess | None
    commands: list[Command]
    forget_lease: Callable[[], object] = lambda: None
    """Stops waiting for the end of the lease that they were sent under."""


class PathLink:
    """One path: its machine, its connection and its commands."""

    def __init__(
        self,
        endpoint: Endpoint,
        ownership: Ownership,
        connector: Connector,
        leases: Leases | None,
        now_seconds: float,
        *,
        device: str = "",
    ) -> None:
        self.endpoint = endpoint
        self.device = device
        """Identifier of the device that it leads to."""
        self._ownership = ownership
        self._leases = leases
        self._lease: Lease | None = None
        self.machine = PathMachine(now_seconds)
        self.connection: PathConnection | None = None
        self.direct: DirectFile | None = None
        """The storage that its VIOS has lent; kept when the connection is lost."""
        self.direct_reads = 0
        self.direct_failures = 0
        self.epoch = 0
        self.in_flight: dict[Command, None] = {}
        self.held: list[Held] = []
        self.failed = asyncio.Event()
        self.wanted = asyncio.Event()
        """Clear while the path is to stay away from its VIOS, which is about to stop."""
        self.wanted.set()
        self.untold = ""
        """Why it failed, until the owner is told."""
        self.left = ""
        """Why the path was given up on purpose; empty again once it is back."""
        self._to_ask = 0
        self._connector = connector
        self._server: ServerProcess | None = None
        self._away: asyncio.TimerHandle | None = None

    @property
    def place(self) -> tuple[str, Address, str]:
        """Which server leads to which device: opening it drains whatever has led there before."""
        return (self.endpoint.vios, self.endpoint.address, self.device)

    def status(self) -> PathStatus:
        """Return what users see."""
        return PathStatus(
            endpoint=self.endpoint,
            state=self.machine.state,
            reason=self.machine.reason,
            epoch=self.epoch,
            in_flight=len(self.in_flight),
            held=sum(len(held.commands) for held in self.held),
            losses=self.machine.losses,
            since_seconds=self.machine.since_seconds,
            direct=self.direct is not None,
            direct_reads=self.direct_reads,
            direct_failures=self.direct_failures,
        )

    async def open(
        self,
        volume: str,
        size_bytes: int,
        epoch: int,
        timeout_seconds: float,
        on_lost: Callable[[PathLink, Exception], None],
    ) -> None:
        """Open the volume at this path's VIOS under `epoch`.

        :raise FarpageError: when the server cannot be reached, refuses, or has a smaller volume.
        :raise OSError: when it gives no lease.
        """
        lease = None
        if self._leases is not None and self._ownership.owner:
            lease = await self._leases.at(self.endpoint, timeout_seconds)
        name = self._ownership.export_name(
            volume, epoch, lease.identifier if lease else "", self.device, self.endpoint.source
        )
        connection = await self._connector(self.endpoint, name, timeout_seconds)
        if connection.size_bytes < size_bytes:
            connection.abort()
            if connection.direct:
                connection.direct.close()
            raise VolumeTooSmall(volume, self.endpoint.vios, connection.size_bytes, size_bytes)
        self.connection = connection
        self._to_ask = TIMES_ASKED if self.endpoint.source and connection.peer_pid is not None else 0
        self.give_back()
        self.direct = connection.direct
        self.epoch = epoch
        self._lease = lease

        def lost(error: Exception) -> None:
            if self.connection is connection:
                on_lost(self, error)

        connection.on_lost = lost
        if connection.peer_pid is not None:
            try:
                self._server = ServerProcess(connection.peer_pid)
            except OSError:  # it died since; the connection's loss will tell
                self._server = None

    @property
    def may_borrow(self) -> bool:
        """Whether the path was opened while its volume was moved here, of which a part is lent to nobody, and
        all of it is here now. A VIOS that has refused it some times is not asked again."""
        return self.connection is not None and self._to_ask > 0 and not self.endpoint.source

    async def borrow(self, volume: str, timeout_seconds: float) -> bool:
        """Ask the path's VIOS for the storage, over a connection of its own; tells whether it was lent.

        :raise FarpageError: when the server cannot be reached, or refuses.
        """
        asked = self.connection
        self._to_ask -= 1
        name = self._ownership.export_name(
            volume, self.epoch, self._lease.identifier if self._lease else "", self.device
        )
        connection = await self._connector(self.endpoint, name, timeout_seconds)
        direct = connection.direct
        connection.abort()
        if direct is None:
            return False
        if self.connection is not asked:  # it was lost, or opened anew, meanwhile
            direct.close()
            return False
        self._to_ask = 0
        self.direct = direct
        return True

    def stay_away(self, reason: str, seconds: float) -> None:
        """Do not use the path until `come_back`, or for so long."""
        self.left = reason
        self.wanted.clear()
        if self._away:
            self._away.cancel()
        self._away = asyncio.get_running_loop().call_later(seconds, self.wanted.set)

    def come_back(self, reason: str) -> None:
        """Use the path again as soon as its VIOS answers; until then `reason` says why it does not."""
        self.left = reason
        self.wanted.set()
        if self._away:
            self._away.cancel()
            self._away = None

    def disconnect(self) -> None:
        """End the connection at once."""
        connection, self.connection = self.connection, None
        if connection:
            connection.on_lost = None
            connection.abort()
        server, self._server = self._server, None
        if server:
            server.close()

    def give_back(self) -> None:
        """Let go of the storage that was lent."""
        direct, self.direct = self.direct, None
        if direct:
            direct.close()

    def hold(self, writes: list[Command], on_gone: Callable[[PathLink, Held], None]) -> list[Command]:
        """Keep `writes` until the server is fenced; returns those that may be repeated at once.

        That is all of them when its process is known to be gone, or its lease to be over. Takes the process
        over from the connection, so it comes before `disconnect`.
        """
        server, self._server = self._server, None
        lease = self._lease
        if not writes or (server and server.gone) or (lease and lease.over):
            if server:
                server.close()
            return writes
        fenced = partial(on_gone, self)
        held = Held(self.epoch, server, writes)
        self.held.append(held)
        if server:
            server.when_gone(partial(fenced, held))
        if lease:
            held.forget_lease = lease.when_over(partial(fenced, held))
        return []

    def forget(self, held: Held) -> None:
        """Stop watching for one fencing."""
        self.held.remove(held)
        held.forget_lease()
        if held.server:
            held.server.close()

    async def probe(self, length_bytes: int, timeout_seconds: float) -> None:
        """Read the first bytes of the volume, through to the device; not of one that is being moved.

        :raise OSError: when the server answers with an error or the connection is lost.
        :raise TimeoutError: when no answer comes in time.
        """
        if self.connection is None:
            raise OSError(CONNECTION_LOST, "the connection was lost")
        if self.endpoint.source:
            # The page may have to come over an intermediate client, which may be away: commands then wait for
            # it, while pages that are present are served.
            return
        answered: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def done(error: int, _payload: memoryview | None) -> None:
            if not answered.done():
                answered.set_result(error)

        self.connection.read(0, min(PROBE_BYTES, length_bytes), done)
        try:
            # Not wait_for, which in Python 3.11 swallows a cancellation that comes together with the answer.
            async with asyncio.timeout(timeout_seconds):
                error = await answered
        except TimeoutError:
            raise TimeoutError(f"no answer to a probe for {timeout_seconds:g} s") from None
        if error == CONNECTION_LOST:
            raise OSError(error, "the connection was lost")
        if error:
            raise OSError(error, f"the server answered {errno.errorcode.get(error, error)}")
