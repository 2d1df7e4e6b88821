"""A control process: which replicas its client has, and which worker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar, cast

from farpage.attach.memory import ClientKind, ClientMemory
from farpage.attach.retake import MemoryRecord
from farpage.definition.model import ReplicaState
from farpage.errors import FarpageError, Unreachable
from farpage.hypervisor.attached import Attached
from farpage.hypervisor.clients import Clients
from farpage.hypervisor.definitions import DefinitionKeeper
from farpage.hypervisor.pool import MemoryPool
from farpage.hypervisor.records import ClientRecords
from farpage.hypervisor.replacing import DeviceReplacements
from farpage.hypervisor.replicas import ClientReplicas
from farpage.hypervisor.runfolder import LOCK_PAUSE_SECONDS, RunFolder
from farpage.hypervisor.workers import WorkerProcess
from farpage.pager.attachmentrecord import AttachmentRecord
from farpage.pager.channel import PeerGone
from farpage.pager.messages import (
    RecordReplicas,
    ReplicaSpec,
)
from farpage.pager.statefile import StateFile
from farpage.pager.table import PAGE_BYTES
from farpage.volume.recorder import States
from tests.simulation.dataworker import SimulatedWorker
from tests.simulation.host import CLIENT, HOST, LOST_SECONDS, VOLUME, call
from tests.simulation.vios import SimulatedVios
from tests.simulation.world import Process

if TYPE_CHECKING:
    from tests.simulation.hypervisor import Hypervisor


Result = TypeVar("Result")

API_SECONDS = 2.0


class SimulatedRecords:
    """Stands in for `ClientRecords` and `DefinitionKeeper` of one control process."""

    hypervisor = HOST
    unproven = None

    def __init__(self, hypervisor: Hypervisor, process: Process) -> None:
        self._hypervisor = hypervisor
        self._definition = hypervisor.kept
        self._lock = asyncio.Lock()
        self._process = process
        devices = {disk.name: SimpleNamespace(name=disk.name) for disk in hypervisor.place.disks}
        self.current = SimpleNamespace(clients={CLIENT: None}, devices=devices)

    def plan_replacement(self, old: str, new: str) -> tuple[str, str, tuple[str, ...]]:
        """Let every client go over."""
        return old, new, (CLIENT,)

    def replica_states(self, client: str) -> States:
        """Return what the replicas are worth."""
        return dict(self._definition.states)

    def of(self, client: str) -> Any:
        """Return the client's record."""
        return SimpleNamespace(hypervisor=HOST, epoch=self._hypervisor.ownership.epoch)

    def replicas(self, client: str, turn: int) -> tuple[ReplicaSpec, ...]:
        """List the replicas with the ways to each."""
        states = self._definition.states
        return self._hypervisor.specs(
            {device: state for device, state in states.items() if state is not ReplicaState.RETIRED}
        )

    async def _change(self, edit: Callable[[States], States]) -> None:
        async with self._lock:
            await self._definition.change(edit)

    async def record_replicas(self, wanted: RecordReplicas, begins: Callable[[], None]) -> None:
        """Store what the replicas are worth."""

        def edit(now: States) -> States:
            begins()
            return {device: wanted.states.get(device, now[device]) for device in now}

        await self._change(edit)

    async def begin_replacing(self, client: str, new: str) -> None:
        """Enter a stale replica and make its volume."""
        had_it = new in self._definition.states

        def edit(now: States) -> States:
            if now.get(new) not in (None, ReplicaState.RETIRED):
                return now
            return {**{device: now[device] for device in now if device != new}, new: ReplicaState.STALE}

        size_bytes = self._hypervisor.user.pages * PAGE_BYTES
        await self._change(edit)
        try:
            await self._on_any_vios(new, lambda vios: vios.service.volumes.create(VOLUME, new, size_bytes))
        except FarpageError as error:
            if error.code == "volume_exists":
                return
            if not had_it:
                await self._change(lambda now: _without(now, new, ReplicaState.STALE))
            raise

    async def remove_retired(self, client: str, device: str) -> None:
        """Delete the volume of a retired replica, and forget that."""
        (disk,) = (disk for disk in self._hypervisor.place.disks if disk.name == device)
        if VOLUME in disk.volumes:
            # The client's epoch may have been raised by a path of another replica.
            epoch = max(self._hypervisor.ownership.epoch, disk.volumes[VOLUME].claims.current.epoch)
            await self._on_any_vios(device, lambda vios: vios.service.volumes.delete(VOLUME, epoch, device))
        await self._change(lambda now: _without(now, device, ReplicaState.RETIRED))

    async def _on_any_vios(
        self, device: str, work: Callable[[SimulatedVios], Coroutine[Any, Any, object]]
    ) -> None:
        """Have one of the VIOS that reach a device do something over its control API."""
        world, chance = self._hypervisor.world, self._hypervisor.chance
        problem: FarpageError = Unreachable("VIOS", device, "none", "start one")
        for vios in self._hypervisor.place.vioses.values():
            if device not in [disk.name for disk in vios.disks]:
                continue
            if not self._hypervisor.reaches(vios):
                continue
            try:
                async with asyncio.timeout(API_SECONDS):
                    await call(world, chance, self._process, vios.process, lambda: work(vios))  # noqa: B023
            except TimeoutError:
                problem = Unreachable("VIOS", vios.name, "no answer", "start it")
            except FarpageError as error:
                problem = error
                if error.code == "volume_missing":
                    return
            else:
                return
        raise problem


def _without(states: States, device: str, state: ReplicaState) -> States:
    return {other: found for other, found in states.items() if (other, found) != (device, state)}


class SimulatedControl:
    """A control process: adopts or recovers the client, and replaces devices."""

    def __init__(self, hypervisor: Hypervisor, name: str) -> None:
        self.hypervisor = hypervisor
        self.world = hypervisor.world
        self.process = self.world.process(name)
        self.spare: SimulatedWorker | None = None
        self.up = False
        """It has the client, and takes commands."""
        records = SimulatedRecords(hypervisor, self.process)
        self._clients = Clients(cast(ClientRecords, records), cast(MemoryPool, None))
        self._clients.run = cast(RunFolder, hypervisor.folder)
        self.replicas = ClientReplicas(self._clients)
        self._replacements = DeviceReplacements(
            self._clients, self.replicas, cast(DefinitionKeeper, records), self._alarm
        )
        self.process.loop.create_task(self._run())

    def _alarm(self, client: str, kind: str, message: str) -> None:
        self.world.note(f"{self.process.name}: alarm {kind}: {message}")

    async def ask(self, worker: SimulatedWorker, work: Callable[[], Coroutine[Any, Any, Result]]) -> Result:
        """Have a worker do something."""
        return await call(
            self.world,
            self.hypervisor.chance,
            self.process,
            worker.process,
            work,
            connected=lambda: worker.control is self,
        )

    async def _run(self) -> None:
        folder = self.hypervisor.folder
        while not folder.try_lock(self.process):
            await asyncio.sleep(LOCK_PAUSE_SECONDS)
        self.hypervisor.kept.found_again()
        owner = await self._adopt()
        record = folder.record(CLIENT)
        if record is None:
            owner = await self._attach_first()
            record = folder.record(CLIENT)
            assert record is not None
        attached = Attached(
            record, cast(ClientMemory, None), cast(StateFile, self.hypervisor), cast(WorkerProcess, owner), 0
        )
        self._clients.attached[CLIENT] = attached
        if owner is None or not owner.process.alive:
            self.process.loop.create_task(self._recover(attached))
        else:
            attached.paged.set()
        self.up = True
        self._start_spare()

    async def _adopt(self) -> SimulatedWorker | None:
        """Meet the workers that are there; returns the client's."""
        owner = None
        for worker in self.hypervisor.living_workers():
            self._watch(worker)
            try:
                clients = await call(
                    self.world,
                    self.hypervisor.chance,
                    self.process,
                    worker.process,
                    lambda: _clients_of(worker, self),  # noqa: B023 - awaited before the next turn
                )
                if CLIENT in clients:
                    await self.ask(worker, worker.hand_over)
                    owner = worker
                else:
                    self.spare = worker
            except PeerGone:
                continue
        return owner

    def _watch(self, worker: SimulatedWorker) -> None:
        worker.process.on_killed.append(
            lambda: self.world.after(LOST_SECONDS, lambda: self._lost(worker), self.process)
        )

    def _lost(self, worker: SimulatedWorker) -> None:
        attached = self._clients.attached.get(CLIENT)
        if self.spare is worker:
            self.spare = None
        if attached and cast(Any, attached.worker) is worker and attached.paged.is_set():
            attached.paged.clear()
            self.process.loop.create_task(self._recover(attached))

    def _start_spare(self) -> None:
        if self.spare is None:
            self.spare = self._started()

    def _started(self) -> SimulatedWorker:
        worker = self.hypervisor.new_worker()
        worker.meet(self)
        self._watch(worker)
        return worker

    async def _attach_first(self) -> SimulatedWorker:
        worker = self._started()
        order = self.hypervisor.order()
        self.hypervisor.folder.save(
            AttachmentRecord(
                client=CLIENT,
                kind=ClientKind.PROCESS,
                process=worker.identity,
                memory=cast(MemoryRecord, worker),
                order=order,
                worker=worker.identity,
            )
        )
        await self.ask(worker, lambda: worker.attach(order))
        return worker

    async def _recover(self, attached: Attached) -> None:
        """Give the client another worker, as `farpage.hypervisor.recovery` does."""
        while True:
            worker, self.spare = self.spare, None
            if worker is None or not worker.process.alive:
                await asyncio.sleep(0.1)
                worker = self._started()
            attached.worker = cast(WorkerProcess, worker)
            order = attached.record.order
            assert order is not None
            order = order.model_copy(
                update={"recover": True, "replicas": self.replicas.for_next_worker(CLIENT, attached, order)}
            )
            record = attached.record.model_copy(update={"order": order, "worker": worker.identity})
            self._clients.keep(attached, record)
            try:
                await self.ask(worker, lambda: worker.attach(order))  # noqa: B023
            except PeerGone:
                continue
            if not worker.process.alive:  # it has answered and then ended, and `_lost` takes it for seen to
                continue
            attached.paged.set()
            self._start_spare()
            return

    def replace(self, old: str, new: str) -> None:
        """Carry out the command of an operator."""
        self.process.loop.create_task(self._replace(old, new))

    async def _replace(self, old: str, new: str) -> None:
        try:
            await self._replacements.start(old, new)
        except FarpageError as error:
            self.world.note(f"{self.process.name}: {error.cause}")


async def _clients_of(worker: SimulatedWorker, control: SimulatedControl) -> set[str]:
    worker.meet(control)
    return set(worker.clients)
