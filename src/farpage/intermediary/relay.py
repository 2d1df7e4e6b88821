"""The relay: an NBD server whose every export is a connection to another server, under the same name.

The first VIOS opens it for the client's owner, and so has a way to the second VIOS that it does not reach
itself. Each connection from there has one of its own to the second VIOS: an owner that is fenced there loses
just its own, and a refused open is refused here in the second VIOS's very words, for the owner to read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Final

from farpage.address import Address
from farpage.errors import InvalidInput
from farpage.log import get_logger
from farpage.nbd import protocol as p
from farpage.nbd.client import Connection
from farpage.nbd.errors import ConnectFailed, ExportRefused, ServerRefused
from farpage.nbd.export import Counters, Export, ExportInfo, Peer
from farpage.nbd.server import Server
from farpage.vios.names import ExportName, parse_export_name

OPEN_TIMEOUT_SECONDS: Final = 10.0
"""So long the second VIOS may take to open a volume: it waits for what older owners have under way there."""

_REPLIES: Final = {name: number for number, name in p.REP_ERROR_NAMES.items()}

log = get_logger()


class Relay:
    """An `ExportProvider` over connections to `upstream`; `server` serves it."""

    def __init__(
        self,
        upstream: Callable[[], Iterable[Address]],
        replica: ExportName,
        *,
        dead_peer_seconds: float | None = None,
    ) -> None:
        """Prepare. `upstream` tells the addresses of the other server, which are tried in this order.

        `replica` has the volume, the device and the principal that are this relay's to pass on, for whichever
        owner.
        """
        self._upstream = upstream
        self._replica = replica
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
        connection = await self._connect(name, self._wanted(name))
        export = Export(
            name=name,
            io=connection,
            description=f"relayed to {connection.address}",
            on_closed=connection.abort,
            counters=self.counters,
        )
        connection.on_lost = lambda error: self._lost(export, error)
        log.info("relaying", export=name, to=str(connection.address))
        return export

    async def describe(self, name: str, peer: Peer) -> ExportInfo:
        """Describe the volume as it is upstream; its owner's epoch is neither looked at nor raised.

        :raise ExportRefused: as `open` would.
        """
        connection = await self._connect(name, replace(self._wanted(name), epoch=None, owner=""))
        try:
            return ExportInfo.of(connection, f"relayed to {connection.address}")
        finally:
            connection.abort()

    async def names(self, peer: Peer) -> list[tuple[str, str]]:
        """List nothing: the first VIOS knows the name."""
        return []

    @property
    def connections(self) -> int:
        """Connections that are relayed now."""
        return sum(connection.export is not None for connection in self.server.connections)

    def _wanted(self, name: str) -> ExportName:
        """Read a name that is this relay's to pass on.

        :raise ExportRefused: it is another one.
        """
        try:
            wanted = parse_export_name(name)
        except InvalidInput:
            wanted = None
        if wanted is None or replace(wanted, epoch=None, owner="") != self._replica:
            self.refused += 1
            raise ExportRefused.unknown(name[:80])
        return wanted

    async def _connect(self, name: str, wanted: ExportName) -> Connection:
        problem = "no address of it is known"
        for address in self._upstream():
            try:
                return await Connection.open(
                    address,
                    str(wanted),
                    handshake_timeout_seconds=OPEN_TIMEOUT_SECONDS,
                    dead_peer_seconds=self._dead_peer_seconds,
                )
            except ServerRefused as refusal:
                self.refused += 1
                log.warning("refused", export=name, to=str(address), problem=refusal.reason)
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
        log.warning("relayed_connection_lost", export=export.name, problem=str(error))
        for connection in self.server.connections:
            if connection.export is export:
                connection.disconnect()
