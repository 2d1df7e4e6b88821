"""Empties a device, or a VIOS: each client there is moved to the device that fits it best.

What has begun is gone on with as any move; after a crash of the control process, asking again goes on with
the clients that had not had their turn.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from farpage.definition.errors import NoDeviceFits
from farpage.definition.model import ClientRecord, Definition, Redundancy, ReplicaState
from farpage.definition.placement import Wish, choose_devices
from farpage.definition.replacing import device_named
from farpage.errors import FarpageError
from farpage.hypervisor.errors import EvacuationUnderWay, NotBeingEvacuated
from farpage.hypervisor.movement import (
    ENDED,
    ClientMove,
    Evacuation,
    EvacuationStart,
    MoveInfo,
    MoveKind,
    MoveStage,
)
from farpage.hypervisor.moves import Moves
from farpage.hypervisor.records import ClientRecords
from farpage.hypervisor.stopping import ViosUnknown
from farpage.log import get_logger
from farpage.volume.resolve import Viewpoint

log = get_logger()

POLL_SECONDS: Final = 0.1


@dataclass
class _Evacuation:
    """One device or VIOS, and what becomes of each client."""

    what: str
    devices: frozenset[str]
    """Where no client is to be; by identifier."""
    without_vios: str = ""
    """The VIOS that is not to be used."""
    clients: dict[str, MoveInfo] = field(default_factory=dict)
    staying: tuple[str, ...] = ()
    task: asyncio.Task[None] | None = None

    @property
    def done(self) -> bool:
        return self.task is None or self.task.done()


class Evacuations:
    """The evacuations of this hypervisor, the latest one of each device and VIOS."""

    def __init__(
        self,
        moves: Moves,
        records: ClientRecords,
        definition: Callable[[], Definition],
        alarm: Callable[[str, str, str], None],
    ) -> None:
        """`definition` returns the one that is followed."""
        self._moves = moves
        self._records = records
        self._definition = definition
        self._alarm = alarm
        self._evacuations: dict[str, _Evacuation] = {}

    async def device(self, name: str, wanted: EvacuationStart) -> Evacuation:
        """Begin to move every client of a device to others.

        :raise DeviceMissing: there is no such device.
        :raise EvacuationUnderWay: that has begun.
        """
        now = self._definition()
        device = device_named(now, name)
        what = f"device {now.devices[device].name}"
        places = {client: device for client in sorted(now.clients) if _holds(now.clients[client], device)}
        return self._begin(_Evacuation(what, frozenset({device})), places, wanted)

    async def vios(self, name: str, wanted: EvacuationStart) -> Evacuation:
        """Begin to move every client that only this VIOS reaches to devices that others reach.

        :raise ViosUnknown: there is no such VIOS.
        :raise EvacuationUnderWay: that has begun.
        """
        now = self._definition()
        if name not in now.vioses:
            raise ViosUnknown(name, ", ".join(now.vioses))
        alone: set[str] = set()
        served: set[str] = set()
        for identifier, device in now.devices.items():
            reaching = {reach.vios for reach in device.reached_by}
            if name in reaching:
                (alone if reaching == {name} else served).add(identifier)
        places: dict[str, str] = {}
        staying = []
        for client, record in sorted(now.clients.items()):
            held = [replica.device for volume in record.volumes for replica in volume.replicas]
            if there := [device for device in held if device in alone and _holds(record, device)]:
                places[client] = there[0]
            elif served.intersection(held):
                staying.append(client)
        evacuation = _Evacuation(f"vios {name}", frozenset(alone), name, staying=tuple(staying))
        return self._begin(evacuation, places, wanted)

    def progress(self, what: str) -> Evacuation:
        """Tell how far the latest evacuation is; `what` as in the document, devices by name or identifier.

        :raise NotBeingEvacuated: there was none since the hypervisor was started.
        """
        kind, _, name = what.partition(" ")
        if kind == "device":
            now = self._definition()
            what = f"device {now.devices[device_named(now, name)].name}"
        if what not in self._evacuations:
            raise NotBeingEvacuated(what)
        return _document(self._evacuations[what])

    def _begin(
        self, evacuation: _Evacuation, places: Mapping[str, str], wanted: EvacuationStart
    ) -> Evacuation:
        """Begin, with each client's device."""
        what = evacuation.what
        before = self._evacuations.get(what)
        if before is not None and not before.done:
            raise EvacuationUnderWay(what)
        now = self._definition()
        self._evacuations[what] = evacuation
        evacuation.clients = {
            client: MoveInfo(
                client=client,
                kind=MoveKind.DIRECT,
                source=now.devices[place].name,
                target="",
                stage=MoveStage.WAITING,
            )
            for client, place in places.items()
        }
        log.info("evacuating", what=what, clients=sorted(places))
        evacuation.task = asyncio.get_running_loop().create_task(self._run(evacuation, wanted))
        return _document(evacuation)

    async def stop(self) -> None:
        """Begin nothing more."""
        tasks = [evacuation.task for evacuation in self._evacuations.values() if evacuation.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, evacuation: _Evacuation, wanted: EvacuationStart) -> None:
        turns = asyncio.Semaphore(wanted.at_a_time)

        async def one(client: str) -> None:
            async with turns:
                await self._move(evacuation, client, wanted)

        await asyncio.gather(*map(one, evacuation.clients))
        failed = [info for info in evacuation.clients.values() if info.stage is not MoveStage.DONE]
        log.info("evacuated", what=evacuation.what, failed=[info.client for info in failed])
        if not failed:
            count = len(evacuation.clients)
            self._alarm("", "evacuated", f"{evacuation.what} is empty: {count} clients were moved")

    async def _move(self, evacuation: _Evacuation, client: str, wanted: EvacuationStart) -> None:
        info = evacuation.clients[client]
        try:
            target = self._target(client, evacuation)
            order = ClientMove(to=target, indirect=wanted.indirect, bandwidth_bytes=wanted.bandwidth_bytes)
            info = evacuation.clients[client] = await self._moves.start(client, order)
            while info.stage not in ENDED:
                await asyncio.sleep(POLL_SECONDS)
                info = evacuation.clients[client] = await self._moves.progress(client)
        except FarpageError as error:
            evacuation.clients[client] = info.model_copy(
                update={"stage": MoveStage.FAILED, "problem": error.cause}
            )
            self._alarm(client, "not_evacuated", f"it is still on {evacuation.what}: {error.cause}")

    def _target(self, client: str, evacuation: _Evacuation) -> str:
        """Choose the device that fits a client best, of those within reach over other VIOS.

        A client on its way to such a device goes on to it.

        :raise NoDeviceFits: saying for each device why not.
        """
        now, view = self._definition(), self._records.view()
        move = now.moves.get(client)
        if move is not None and move.target not in evacuation.devices:
            return move.target
        view = Viewpoint(view.reached_vioses - {evacuation.without_vios}, view.provisioned_bytes)
        return best_device(now, client, evacuation.devices, view)


def best_device(definition: Definition, client: str, without: frozenset[str], view: Viewpoint) -> str:
    """Return the device that fits a client best, as for a new one, of those that a hypervisor reaches.

    :raise NoDeviceFits: saying for each device why not.
    """
    record = definition.clients[client]
    held = {replica.device for volume in record.volumes for replica in volume.replicas}
    devices = {
        identifier: device.model_copy(
            update={"reached_by": tuple(r for r in device.reached_by if r.vios in view.reached_vioses)}
        )
        for identifier, device in definition.devices.items()
        if identifier not in without | held
        and any(reach.vios in view.reached_vioses for reach in device.reached_by)
    }
    if not devices:
        raise NoDeviceFits(client, record.memory_bytes, "there is no other device within reach")
    wish = Wish(
        client,
        sum(volume.size_bytes for volume in record.volumes),
        Redundancy.PATH if record.redundancy is Redundancy.MIRROR else record.redundancy,
        record.vios_redundancy,
        view.provisioned_bytes,
    )
    (chosen,) = choose_devices(definition.model_copy(update={"devices": devices}), wish)
    return chosen


def _holds(client: ClientRecord, device: str) -> bool:
    return any(
        replica.device == device and replica.state is not ReplicaState.RETIRED
        for volume in client.volumes
        for replica in volume.replicas
    )


def _document(evacuation: _Evacuation) -> Evacuation:
    return Evacuation(
        what=evacuation.what,
        done=evacuation.done,
        clients=tuple(evacuation.clients.values()),
        staying=evacuation.staying,
    )
