"""What a path needs of the wire: something to connect with, and the connection's small interface."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from farpage.address import Address
from farpage.blockio import BlockIO, DirectFile, Lent
from farpage.nbd.client import Connection
from farpage.volume.deaths import ServerDeaths


@dataclass(frozen=True)
class Endpoint:
    """Where one VIOS serves the volume; `device` is the device's name.

    `source` is the identifier of the device that the volume is being moved from; empty when it is not.
    """

    vios: str
    address: Address
    device: str
    source: str = ""
    lease_seconds: float | None = None
    """How long a lease of the VIOS lasts; None where that is not known."""
    others: tuple[tuple[str, float], ...] = ()
    """VIOSes that nothing is sent to and that reach the device, or the one that `source` names, each with how
    long its leases last."""


class PathConnection(BlockIO, Protocol):
    """An open export: a `BlockIO` that can be lost."""

    on_lost: Callable[[Exception], None] | None
    direct: DirectFile | None
    """The storage as this process reads it by itself, if the server has lent it; outlives the connection."""

    @property
    def peer_pid(self) -> int | None:
        """Process of the server when it runs on this host."""

    def push(self) -> None:
        """Send what is gathered now."""

    def abort(self) -> None:
        """End the connection at once; commands in flight finish with CONNECTION_LOST."""


class Connector(Protocol):
    """Opens an export at an endpoint."""

    async def __call__(self, endpoint: Endpoint, export_name: str, timeout_seconds: float) -> PathConnection:
        """Connect and negotiate.

        :raise FarpageError: when the server cannot be reached, refuses or violates the protocol.
        """


class Borrower(Protocol):
    """Reads by itself what servers lend."""

    def file(self, lent: Lent) -> DirectFile:
        """Take what is lent over."""


@dataclass(frozen=True)
class ConnectNbd:
    """Connects over NBD. A connection is lost as soon as its server, on this host, begins to die."""

    deaths: ServerDeaths
    borrower: Borrower | None = None
    """For the storage of what is opened, where servers lend it; without one everything is served."""

    async def __call__(self, endpoint: Endpoint, export_name: str, timeout_seconds: float) -> PathConnection:
        """Connect and negotiate.

        :raise FarpageError: when the server cannot be reached, refuses or violates the protocol.
        """
        connection = await Connection.open(
            endpoint.address,
            export_name,
            handshake_timeout_seconds=timeout_seconds,
            borrow=self.borrower is not None and not endpoint.source,
        )
        if connection.peer_pid is not None:
            lose = partial(connection.lose, "the server's process is ending")
            connection.on_end = self.deaths.watch(connection.peer_pid, lose)
        if self.borrower is not None and connection.lent is not None:
            connection.direct = self.borrower.file(connection.lent)
        return connection
