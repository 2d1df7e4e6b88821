"""One intermediate client at work: its relay, its copying, what it reports and what it is told.

The definition says what there is to do, and the first VIOS how far it is; nothing is kept here. So a new
process, anywhere that reaches both VIOS, goes on where one that was killed has stopped.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from typing import Final

from farpage.address import Address
from farpage.api.remote import RemoteError
from farpage.definition.model import ClientRecord, Definition, Move, MoveState
from farpage.errors import FarpageError
from farpage.intermediary.courier import Courier
from farpage.intermediary.errors import Displaced
from farpage.intermediary.handover import HandoverCarrier
from farpage.intermediary.keeper import CopyKeeper
from farpage.intermediary.model import IntermediaryStatus
from farpage.intermediary.places import Place, data_addresses
from farpage.intermediary.relay import Relay
from farpage.intermediary.route import Route
from farpage.log import get_logger
from farpage.nbd.client import Connection
from farpage.nbd.errors import ServerRefused, ServerUnreachable
from farpage.vios.model import CopyOrders, CopyState, IntermediaryReport, VolumeInfo, VolumeOpen
from farpage.vios.names import ExportName

REPORT_SECONDS: Final = 0.5
CARRY_SECONDS: Final = 0.5
FAREWELL_SECONDS: Final = 5.0
"""So long it tries, when the move is over, to tell both VIOS so."""
CLAIM_TIMEOUT_SECONDS: Final = 30.0
"""A claim waits for what an older owner has under way at the device."""
DEAD_PEER_SECONDS: Final = 5.0

log = get_logger()


class Intermediary:
    """The work for one move, from `run` until the move is over."""

    def __init__(self, route: Route, courier: Courier) -> None:
        self.route = route
        self.courier = courier
        self.relay = Relay(
            lambda: self._addresses(route.second), route.source, dead_peer_seconds=DEAD_PEER_SECONDS
        )
        self.keeper = CopyKeeper(self._open_both, self._client_commands)
        self.orders: CopyOrders | None = None
        """What the first VIOS answered last."""
        self.problem = ""
        """What is wrong beside what the copying has."""
        self.freed = False
        """Whether the volume on the source is gone."""
        self._handover = HandoverCarrier(route.first, route.second)
        self._over = asyncio.Event()
        self._seen_commands: int | None = None
        self._carry_now = asyncio.Event()

    # What there is

    @property
    def definition(self) -> Definition:
        """The newest definition."""
        assert self.courier.newest is not None
        return self.courier.newest

    @property
    def move(self) -> Move | None:
        """The move as the newest definition has it; None when it is over."""
        move = self.definition.moves.get(self.route.client)
        return move if move is not None and move.principal == self.route.move.principal else None

    @property
    def client(self) -> ClientRecord | None:
        """The client as the newest definition has it."""
        return self.definition.clients.get(self.route.client)

    def _addresses(self, place: Place) -> tuple[Address, ...]:
        record = self.definition.vioses.get(place.name)
        return () if record is None else data_addresses(record, place.control)

    def _client_commands(self) -> int:
        """Count what the client has had relayed so far, answered or not."""
        counters = self.relay.counters
        return counters.reads + counters.writes + counters.others + counters.errors + counters.in_flight

    # Life

    async def run(self) -> None:
        """Work until the move is over.

        :raise Displaced: another intermediate client does this work.
        """
        works = (self._carry(), self._report(), self.keeper.run(), self._until_over())
        tasks = [asyncio.create_task(work) for work in works]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        await self._farewell()

    async def _until_over(self) -> None:
        await self._over.wait()

    async def _farewell(self) -> None:
        """Have both VIOS know that the move is over."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FAREWELL_SECONDS):
                while not all(map(self.courier.has_newest, (self.route.first, self.route.second))):
                    await self.courier.carry()
                    await asyncio.sleep(CARRY_SECONDS / 10)

    # The definition

    async def _carry(self) -> None:
        while True:
            await self.courier.carry()
            if self.move is None:
                self._over.set()
            elif self.client is not None:
                await self._handover.carry(self.move, self.client)
            if self.move is not None and self.move.state is MoveState.RETIRING:
                await self._free(self.move)
            self._carry_now.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(CARRY_SECONDS):
                    await self._carry_now.wait()

    async def _free(self, move: Move) -> None:
        """Delete the volume on the source, when its VIOS knows that it is retired."""
        second, client = self.route.second, self.client
        if self.freed or client is None or not self.courier.has_newest(second):
            return
        if not self._handover.is_there(client):  # it would go with the volume
            return
        volume = f"/v1/volumes/{move.volume}"
        try:
            found = await _volume_on(second, move.volume, move.source)
            if found is not None:
                # Its pager may have raised the epoch there beyond the one in the definition.
                epoch = max(client.epoch, found.epoch)
                await second.client.delete(volume, params={"epoch": epoch, "device": move.source})
        except FarpageError as error:
            self._note(f"the volume on the source cannot be deleted: {error.cause}")
            return
        self._note("")
        self.freed = True
        log.info("freed", volume=move.volume, device=move.source)

    # Reports and orders

    async def _report(self) -> None:
        first, move = self.route.first, self.route.move
        path = f"/v1/volumes/{move.volume}/intermediary"
        reported = ""
        while True:
            try:
                orders = await first.client.put(
                    path, self.report(), CopyOrders, params={"device": move.target}
                )
            except RemoteError as error:
                if error.code == "intermediary_displaced":
                    raise Displaced(self.route.client, str(error.details.get("relay", ""))) from error
                problem = error.cause
            except FarpageError as error:
                problem = error.cause
            else:
                problem = ""
                self._obey(orders)
            if problem and problem != reported:
                log.warning("not_reported", problem=problem)
            reported = problem
            await asyncio.sleep(REPORT_SECONDS)

    def _whats_wrong(self) -> str:
        problems = (self.keeper.problem, self.problem, self._handover.problem, self.route.second.problem)
        return next(filter(None, problems), "")

    def status(self) -> IntermediaryStatus:
        """Return what users see; may be called from any thread."""
        copied, counters, orders, move = self.keeper.copied, self.relay.counters, self.orders, self.route.move
        return IntermediaryStatus(
            client=self.route.client,
            volume=move.volume,
            source=move.source,
            target=move.target,
            pid=os.getpid(),
            relay=str(self.relay.server.addresses[0]),
            state=str(orders.state) if orders else "",
            complete=self.keeper.complete,
            present_bytes=orders.present_bytes if orders else 0,
            total_bytes=orders.total_bytes if orders else 0,
            read_bytes=copied.read_bytes,
            written_bytes=copied.written_bytes,
            zeroed_bytes=copied.zeroed_bytes,
            rate_bytes=round(self.keeper.rate()),
            relayed_connections=self.relay.connections,
            relayed_reads=counters.reads,
            relayed_writes=counters.writes,
            relayed_in_flight=counters.in_flight,
            definition_revision=self.definition.revision,
            problem=self._whats_wrong(),
        )

    def report(self) -> IntermediaryReport:
        """Return what the first VIOS is told."""
        copied = self.keeper.copied
        return IntermediaryReport(
            principal=self.route.move.principal,
            relay=str(self.relay.server.addresses[0]),
            read_bytes=copied.read_bytes,
            written_bytes=copied.written_bytes,
            rate_bytes=round(self.keeper.rate()),
            problem=self._whats_wrong(),
            freed=self.freed,
        )

    def _obey(self, orders: CopyOrders) -> None:
        if self.orders is None or orders.state is not self.orders.state:
            log.info("orders", state=orders.state, present_bytes=orders.present_bytes, of=orders.total_bytes)
            self._carry_now.set()
        if self._seen_commands not in (None, orders.client_commands):
            self.keeper.give_way(2 * REPORT_SECONDS)
        self._seen_commands = orders.client_commands
        self.orders = orders
        move = self.move
        wanted = orders.state is CopyState.COPYING and move is not None and move.state is MoveState.COPYING
        self.keeper.want(wanted, orders.bandwidth_bytes)

    def _note(self, problem: str) -> None:
        if problem and problem != self.problem:
            log.warning("problem", problem=problem)
        self.problem = problem

    # Connections for the copying

    async def _open_both(self) -> tuple[Connection, Connection]:
        """Claim the volume on the source for its owner, then open it to read, and the target to fill."""
        move, client = self.route.move, self.client
        if client is not None:
            await self._claim(client)
        source = await self._connect(self.route.second, self.route.source)
        try:
            target = await self._connect(self.route.first, self.route.target)
        except FarpageError:
            source.abort()
            raise
        if source.size_bytes < target.size_bytes:
            source.abort()
            target.abort()
            raise ServerUnreachable(
                str(self.route.source), str(source.address), f"volume {move.volume} is smaller there"
            )
        return source, target

    async def _claim(self, client: ClientRecord) -> None:
        """Make sure that nobody before this owner can change the source any more."""
        move = self.route.move
        wanted = VolumeOpen(epoch=client.epoch, owner=client.owner)
        try:
            await self.route.second.client.post(
                f"/v1/volumes/{move.volume}/open",
                wanted,
                VolumeInfo,
                params={"device": move.source},
                timeout_seconds=CLAIM_TIMEOUT_SECONDS,
            )
        except RemoteError as error:
            # The same owner under a newer epoch, which the definition will have in a moment.
            if error.code != "stale_epoch":
                raise

    async def _connect(self, place: Place, name: ExportName) -> Connection:
        problem: FarpageError | None = None
        for address in self._addresses(place):
            try:
                return await Connection.open(address, str(name), dead_peer_seconds=DEAD_PEER_SECONDS)
            except ServerRefused:
                raise
            except FarpageError as error:
                problem = error
        raise problem or ServerUnreachable(
            str(name), f"VIOS {place.name}", "the definition has no address of it that this host reaches"
        )


async def _volume_on(place: Place, volume: str, device: str) -> VolumeInfo | None:
    """Look a volume up on one device; None if it is not there.

    :raise FarpageError: the VIOS does not answer.
    """
    found = await place.client.get("/v1/volumes", tuple[VolumeInfo, ...])
    return next((info for info in found if (info.name, info.device) == (volume, device)), None)
