"""A data worker with one client: what `farpage.pager.worker` does with its volume, and the real heir."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, cast
from unittest import mock

from farpage.attach.memory import ClientMemory
from farpage.kernel.process import ProcessIdentity
from farpage.pager import volumes
from farpage.pager.channel import PeerGone
from farpage.pager.heir import Heir
from farpage.pager.messages import (
    AddReplica,
    Attach,
    RecordReplicas,
    ReplicaSpec,
    RetireReplica,
)
from farpage.pager.statefile import StateFile
from farpage.volume.errors import ClientFenced
from farpage.volume.lease import Leases
from farpage.volume.ownership import Ownership
from farpage.volume.paged import PagedVolume
from farpage.volume.recorder import States
from tests.simulation.connection import Connector, SimulatedServerProcess
from tests.simulation.host import CLIENT, HOST, LOST_SECONDS, SimulatedFolder, call
from tests.simulation.owner import OPEN_SECONDS, Place

if TYPE_CHECKING:
    from tests.simulation.control import SimulatedControl
    from tests.simulation.hypervisor import Hypervisor


class SimulatedHeir(Heir):
    """An heir with the lock of a simulated folder."""

    def __init__(self, worker: SimulatedWorker) -> None:
        super().__init__(cast(Path, worker.hypervisor.folder), worker.inherit)
        self._myself = worker.identity
        self._process = worker.process

    @contextmanager
    def _locked(self) -> Iterator[bool]:
        folder = cast(SimulatedFolder, self._run_folder)
        locked = folder.try_lock(self._process)
        try:
            yield locked
        finally:
            if locked:
                folder.unlock()


def simulated_heirs() -> AbstractContextManager[object]:
    """Let heirs work on simulated folders while the context lasts."""
    memory = SimpleNamespace(is_registered=lambda: True, close_descriptors=lambda: None)
    return mock.patch.multiple(
        "farpage.pager.heir",
        clients_folder=lambda folder: folder,
        read_records=lambda folder: folder.records(),
        read_record=lambda folder, client: folder.record(client),
        save_record=lambda folder, record: folder.save(record),
        retake=lambda _record: memory,
        state_path=lambda _folder, _client: None,
        StateFile=SimpleNamespace(open=lambda _path: SimpleNamespace(close=lambda: None)),
        _ended=lambda identity: SimulatedServerProcess.find(identity.pid).gone,
    )


class SimulatedWorker:
    """A data worker: what `farpage.pager.worker` does with the volume of its client."""

    def __init__(self, hypervisor: Hypervisor, name: str) -> None:
        self.hypervisor = hypervisor
        self.process = hypervisor.world.process(name)
        self.identity = ProcessIdentity(pid=self.process.pid, started_ticks=0, boot="")
        self.clients: set[str] = set()
        self.channel = self
        """It is asked directly; see `call`."""
        self.control: SimulatedControl | None = None
        self.paged = asyncio.Event()
        self.volume: PagedVolume
        self._order: Attach
        self._met = 0
        self._inheriting = False
        place = hypervisor.place
        self._connector = Connector(
            place.network,
            place.vioses,
            self.process,
            host=HOST,
            same_host=place.same_host,
            borrows=place.direct,
        )
        self._leases = Leases(self._connector, f"{self.process.pid:08x}")

    # Control processes

    def meet(self, control: SimulatedControl) -> None:
        """Be connected with a control process from now on."""
        self.control = control
        self._met += 1
        world = self.hypervisor.world
        control.process.on_killed.append(
            lambda: world.after(LOST_SECONDS, lambda: self._alone(control), self.process)
        )

    def _alone(self, control: SimulatedControl) -> None:
        if self.control is control:
            self.control = None
            self._become_heir()

    def _become_heir(self) -> None:
        if not self.clients and not self._inheriting:
            self._inheriting = True
            self.process.loop.create_task(self._wait_as_heir())

    async def _wait_as_heir(self) -> None:
        met = self._met
        await SimulatedHeir(self).wait(lambda: self.control is None and self._met == met)
        self._inheriting = False
        if self.control is None and self._met != met:
            self._become_heir()

    async def inherit(self, order: Attach, _memory: ClientMemory, _state: StateFile) -> None:
        """Take the client over."""
        self.hypervisor.world.note(f"{self.process.name} inherits the client")
        await self.attach(order)

    async def hand_over(self) -> None:
        """Return when the client is this worker's."""
        await self.paged.wait()

    # The client

    async def attach(self, order: Attach) -> None:
        """Page the client."""
        self.clients.add(order.client)
        hypervisor, place = self.hypervisor, self.hypervisor.place
        before = hypervisor.ownership.epoch
        epoch = max(order.epoch, before) + 1 if order.recover else order.epoch
        hypervisor.ownership = Ownership(order.owner, epoch)
        self._order = order
        self.volume = volumes.make(
            order,
            hypervisor.ownership,
            self,
            hypervisor.dirty,
            self._lease_or_none(place),
            connector=self._connector,
        )
        hypervisor.worker, hypervisor.process = self, self.process
        hypervisor.world.note(
            f"{self.process.name}: epoch {epoch}, "
            + ", ".join(f"{spec.device} {spec.state}" for spec in order.replicas)
        )
        opening = self.process.loop.create_task(self._open(math.inf if order.recover else OPEN_SECONDS))
        if not order.recover:
            await opening
        hypervisor.user.start(self.process, self.volume)
        self.paged.set()

    def _lease_or_none(self, place: Place) -> Leases:
        return self._leases if place.leases else cast(Leases, None)

    async def _open(self, timeout_seconds: float) -> None:
        try:
            await self.volume.open(timeout_seconds)
        except ClientFenced as fenced:
            self.hypervisor.world.violated(f"the only owner is fenced: {fenced.cause}")

    async def call(self, _method: str, order: object, _answer: object, **_: object) -> None:
        """Carry out what the control process asks for: the other end of its channel."""
        await self.hypervisor.control.ask(self, lambda: self._carry_out(order))

    async def _carry_out(self, order: object) -> None:
        match order:
            case AddReplica():
                await self._add(order.replica)
            case RetireReplica():
                await volumes.retire(self.volume, order.device)
            case _:
                raise AssertionError(f"unknown order {order!r}")

    async def _add(self, replica: ReplicaSpec) -> None:
        while volumes.is_repairing(self.volume):
            await asyncio.sleep(0.01)
        hypervisor = self.hypervisor
        self.volume = volumes.with_replica(
            self.volume,
            replica,
            order=self._order,
            events=self,
            store=hypervisor.dirty,
            leases=self._lease_or_none(hypervisor.place),
            connector=self._connector,
        )
        hypervisor.user.use(self.volume)

    # What the volume tells

    def epoch_raised(self, epoch: int) -> None:
        """Writes go out under a new epoch."""
        self.hypervisor.world.note(f"{self.process.name}: epoch {epoch}")

    def vios_doubted(self, vios: str) -> None:
        """Note it."""
        self.hypervisor.world.note(f"{self.process.name}: path over {vios} failed")

    def alarm(self, kind: str, message: str) -> None:
        """Note it."""
        self.hypervisor.world.note(f"{self.process.name}: alarm {kind}: {message}")

    async def record_replicas(self, epoch: int, states: States) -> None:
        """Have them stored by the control process, or the next one."""
        wanted = RecordReplicas(client=CLIENT, owner=self.hypervisor.token, epoch=epoch, states=states)
        while True:
            control = self.control
            if control is None:
                await asyncio.sleep(0.01)
                continue
            try:
                await call(
                    self.hypervisor.world,
                    self.hypervisor.chance,
                    self.process,
                    control.process,
                    lambda: control.replicas.record(wanted),  # noqa: B023 - awaited before the next turn
                )
            except PeerGone:
                continue
            return
