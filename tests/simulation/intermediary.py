"""An intermediate client's process: the real relay and copier over simulated connections."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any, Protocol, cast

from farpage.address import UnixAddress
from farpage.blockio import Feature
from farpage.definition.model import Move
from farpage.errors import FarpageError
from farpage.intermediary.keeper import CopyKeeper
from farpage.intermediary.relay import Relay
from farpage.nbd.client import Connection
from farpage.nbd.errors import ExportRefused, ServerRefused
from farpage.nbd.protocol import NBD_REP_ERR_POLICY, NBD_REP_ERR_SHUTDOWN
from farpage.vios.model import CopyOrders, CopyState, IntermediaryReport
from farpage.vios.names import ExportName
from farpage.volume.connector import Endpoint, PathConnection
from tests.simulation.connection import Connector, SimulatedConnection
from tests.simulation.network import Network, Pipe
from tests.simulation.vios import OrderedSet, SimulatedServerConnection, SimulatedVios, running
from tests.simulation.world import World

ADDRESS = UnixAddress("/relay")
REPORT_SECONDS = 0.5
OPEN_SECONDS = 5.0
HOST = "host of the intermediary"


class _Service:
    """What a simulated server connection wants of who accepts it."""

    def __init__(self, exports: object) -> None:
        self.exports = exports


class _Relay(Relay):
    """The relay over simulated connections to the second VIOS."""

    connector: Connector
    second: str

    async def _connect(self, name: str, wanted: ExportName) -> Connection:
        endpoint = Endpoint(self.second, UnixAddress("/"), "")
        try:
            connection = await self.connector(endpoint, name, OPEN_SECONDS)
        except ServerRefused as refusal:
            raise ExportRefused(NBD_REP_ERR_POLICY, refusal.reason) from refusal
        except FarpageError as error:
            raise ExportRefused(NBD_REP_ERR_SHUTDOWN, error.cause) from error
        return able(connection, Feature.FLUSH | Feature.ZERO | Feature.TRIM)


class Definitions(Protocol):
    """What an intermediate client asks the VIOS of its move for, over their control APIs."""

    def ask(
        self,
        vios: SimulatedVios,
        question: Callable[[], Coroutine[Any, Any, Any]],
        answered: Callable[[Any], None],
    ) -> None:
        """Ask one VIOS; there may be no answer."""

    def carry(self, principal: str) -> Move | None:
        """Bring both VIOS the newer of their definitions, as far as they are reached; return the move."""


class SimulatedIntermediary:
    """One intermediate client at a time; killed, another one may be started."""

    name = "intermediary"

    def __init__(
        self,
        world: World,
        network: Network,
        vioses: dict[str, SimulatedVios],
        control: Definitions,
        move: Move,
    ) -> None:
        self.world = world
        self.move = move
        self._network = network
        self._vioses = vioses
        self._control = control
        self.process = world.process(self.name)
        self.process.kill()
        self.service: _Service
        self.freed = False
        self.bandwidth_bytes: int | None = None

    def start(self) -> None:
        """Start a process, unless there is one."""
        if self.process.alive:
            return
        self.process = process = self.world.process(self.name)
        self.world.note("the intermediary starts")
        with running(process):
            connector = Connector(self._network, self._vioses, process, host=HOST, same_host=False)
            source = ExportName("vm1", None, device=self.move.source, principal=self.move.principal)
            relay = _Relay(lambda: (), source)
            relay.connector, relay.second = connector, self.move.source_vios
            relay.server._connections = OrderedSet()  # type: ignore[assignment]
            self.service = _Service(relay)
            keeper = CopyKeeper(lambda: self._open_both(connector), lambda: 0)
            process.loop.create_task(keeper.run())
            process.loop.create_task(self._report(keeper))

    def accept(self, pipe: Pipe) -> SimulatedServerConnection:
        """Accept a connection to the relay."""
        return SimulatedServerConnection(cast(SimulatedVios, self), pipe)

    async def _open_both(self, connector: Connector) -> tuple[Connection, Connection]:
        move = self.move
        source_name = ExportName("vm1", None, device=move.source, principal=move.principal)
        target_name = ExportName(
            "vm1", None, device=move.target, source=move.source, principal=move.principal
        )
        second, first = (
            Endpoint(vios, UnixAddress("/"), "") for vios in (move.source_vios, move.target_vios)
        )
        source = await connector(second, str(source_name), OPEN_SECONDS)
        try:
            target = await connector(first, str(target_name), OPEN_SECONDS)
        except FarpageError:
            source.abort()
            raise
        features = Feature.FLUSH | Feature.ZERO | Feature.EXTENTS
        return able(source, features), able(target, features)

    async def _report(self, keeper: CopyKeeper) -> None:
        while True:
            move = self._control.carry(self.move.principal)
            report = IntermediaryReport(
                principal=self.move.principal,
                relay=str(ADDRESS),
                read_bytes=0,
                written_bytes=0,
                rate_bytes=0,
                freed=self.freed,
            )
            first = self._vioses[self.move.target_vios]
            if first.copies is not None:
                question = partial(first.copies.report, "vm1", self.move.target, report)
                self._control.ask(first, question, partial(self._obey, keeper, move))
            await asyncio.sleep(REPORT_SECONDS)

    def _obey(self, keeper: CopyKeeper, move: Move | None, orders: CopyOrders | None) -> None:
        if orders is not None:
            wanted = orders.state is CopyState.COPYING and move is not None
            keeper.want(wanted, self.bandwidth_bytes)
            if orders.state is CopyState.RETIRING:
                self._free()

    def _free(self) -> None:
        """Delete the volume on the source."""
        second = self._vioses[self.move.source_vios]
        disk = second.disks[0]
        if "vm1" not in disk.volumes:
            self.freed = True
            return
        epoch = max(disk.volumes["vm1"].claims.current.epoch, second.defined.clients["vm1"].epoch)
        volumes = second.service.volumes
        self._control.ask(second, lambda: volumes.delete("vm1", epoch, disk.name), lambda _: None)


def able(connection: PathConnection, features: Feature) -> Connection:
    """Let a simulated connection do more than reading and writing."""
    assert isinstance(connection, SimulatedConnection)
    connection.features = features
    return cast(Connection, connection)
