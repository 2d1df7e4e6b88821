"""The relay: an NBD server whose every export is a connection to another server, under the same name.

The first VIOS opens it for the client's owner, and so has a way to the second VIOS that it does not reach
itself. Each connection from there has one of its own to the second VIOS: an owner that is fenced there loses
just its own, and a refused open is refused here in the second VIOS's very words, for the owner to read.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Final

from farpage.address import Address
from farpage.nbd import protocol as p
from farpage.nbd.client import Connection
from farpage.nbd.errors import ConnectFailed, ExportRefused, ServerRefused
from farpage.nbd.export import Counters, Export, ExportInfo, Peer
from farpage.nbd.server import Server

OPEN_TIMEOUT_SECONDS: Final = 10.0
"""So long the second VIOS may take to open a volume: it waits for what older owners have under way there."""

_REPLIES: Final = {name: number for number, name in p.REP_ERROR_NAMES.items()}

log = logging.getLogger(__name__)


class Relay:
    """An `ExportProvider` over connections to `upstream`; `server` serves it."""

    def __init__(
        self,
        upstream: Iterable[Address],
        allowed: Callable[[str], bool],
        *,
        dead_peer_seconds: float | None = None,
    ) -> None:
        """Prepare. `upstream` are addresses of one server, tried in this order.

        `allowed` tells of an export's name whether it is this relay's to pass on.
        """
        self.upstream = tuple(upstream)
        self._allowed = allowed
        self._dead_peer_seconds = dead_peer_seconds
        self.counters = Counters()
        """Summed over all connections since the start."""
        self.refused = 0
        """Opens that were refused, here or upstream."""
        self.lost = 0
        """Connections that ended because the one upstream did."""
        self.server = Server(self)

    async def open(self, name: str, peer: Peer) -> Export:
        """Open the export upstream.

        :raise ExportRefused: it is not this relay's, refused upstream (with the reply and the words from
            there), or the server upstream does not answer (NBD_REP_ERR_SHUTDOWN: try again later).
        """
        connection = await self._connect(name)
        export = Export(
            name=name,
            io=connection,
            description=f"relayed to {connection.address}",
            on_closed=connection.abort,
            counters=self.counters,
        )
        connection.on_lost = lambda error: self._lost(export, error)
        log.info("relaying %r to %s", name, connection.address)
        return export

    async def describe(self, name: str, peer: Peer) -> ExportInfo:
        """Describe the export as the server upstream does.

        :raise ExportRefused: always; whoever may use the relay opens the export.
        """
        raise ExportRefused.forbidden("a relay describes nothing without opening it")

    def names(self, peer: Peer) -> list[tuple[str, str]]:
        """List nothing: the first VIOS knows the name."""
        return []

    @property
    def connections(self) -> int:
        """Connections that are relayed now."""
        return sum(connection.export is not None for connection in self.server.connections)

    async def _connect(self, name: str) -> Connection:
        if not self._allowed(name):
            self.refused += 1
            raise ExportRefused.unknown(name[:80])
        problem = "no address to connect to is known"
        for address in self.upstream:
            try:
                return await Connection.open(
                    address,
                    name,
                    handshake_timeout_seconds=OPEN_TIMEOUT_SECONDS,
                    dead_peer_seconds=self._dead_peer_seconds,
                    block_status=False,  # nobody asks a relay, and with it longer reads would ask first
                )
            except ServerRefused as refusal:
                self.refused += 1
                raise ExportRefused(
                    _REPLIES.get(refusal.reply, p.NBD_REP_ERR_POLICY), refusal.reason
                ) from refusal
            except ConnectFailed as error:
                problem = error.cause
        self.refused += 1
        raise ExportRefused(p.NBD_REP_ERR_SHUTDOWN, problem)

    def _lost(self, export: Export, error: Exception) -> None:
        """Hang up before the commands in flight are answered: their outcome is unknown, as it is upstream."""
        self.lost += 1
        log.warning("relayed connection %r ended: %s", export.name, error)
        for connection in self.server.connections:
            if connection.export is export:
                connection.disconnect()
