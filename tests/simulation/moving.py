"""A client whose volume is moved to another device under load, by an intermediate client that may die too.

Its worker goes over to the first VIOS while it runs, or is lost and the next one opens the volume there; when
the move is cancelled it comes back likewise. Every process may be killed, stopped or cut
off at any moment; the move is finished, or cancelled, or stays as it is. At the end the client reads what it
wrote, and after a move that was finished it does so without the source.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Coroutine
from typing import Any

from farpage.address import Address
from farpage.blockio import Feature
from farpage.definition.model import (
    Access,
    ClientRecord,
    Definition,
    Grant,
    Move,
    MoveState,
    Replica,
    ReplicaState,
    VolumeRecord,
)
from farpage.errors import FarpageError
from farpage.nbd.replaying import Losable
from farpage.pager.table import PAGE_BYTES
from farpage.vios.model import CopyStatus
from farpage.volume.connector import Endpoint
from tests.simulation.connection import Connector
from tests.simulation.definition import SimulatedDefinition
from tests.simulation.disk import Disk
from tests.simulation.faults import PATH_KINDS, WORKER_KINDS, Fault, FaultSchedule, Kind, Parts
from tests.simulation.intermediary import ADDRESS, HOST, SimulatedIntermediary, able
from tests.simulation.network import Network
from tests.simulation.owner import Owner, Place
from tests.simulation.scenario import Scenario
from tests.simulation.stamps import ZEROS
from tests.simulation.vios import SimulatedVios
from tests.simulation.world import Process, ProcessState, World

TARGET, SOURCE = "disk1", "disk2"
FIRST, SECOND = "vios1", "vios2"
PRINCIPAL = "00000000000000cc"
WATCH_SECONDS = 0.3
AGAIN_SECONDS = 0.2
COPYING = {SOURCE: ReplicaState.IN_SYNC, TARGET: ReplicaState.COPYING}


class MovingPlace(Place):
    """Where the volume is reached: at its source, or at the first VIOS while it is copied to its target."""

    moved = False
    """The target has everything, and is used like any device."""

    def ways(self, disk: Disk) -> tuple[Endpoint, ...]:
        source = SOURCE if disk.name == TARGET and not self.moved else ""
        return tuple(
            Endpoint(way.vios, way.address, way.device, source, way.lease_seconds)
            for way in super().ways(disk)
        )


class Moving(Scenario):
    """One client's volume on its way from disk2 to disk1."""

    def __init__(self, world: World) -> None:
        self.world = world
        chance = self._chance = world.random("scenario")
        network = Network(world)
        network.slow = chance.choice((0.0, 0.02, 0.2))
        user = self._user(chance.random() < 0.5)
        disks = [Disk(world, TARGET), Disk(world, SOURCE)]
        self.place = self.moving_place = MovingPlace(world, network, disks, {}, mirror=False)
        for disk in disks:
            disk.slowness = chance.choice((1.0, 1.0, 20.0))
            disk.thread_slowness = chance.choice((1.0, 1.0, 1000.0))
            self._serve(disk)
            self._make_volume(disk, user)
        self.place.same_host = chance.random() < 0.5
        self.place.leases = chance.random() < 0.7
        self.place.direct = world.random("direct reads").random() < 0.45
        definition = SimulatedDefinition(world, [SOURCE], lambda: True)
        self.owner = Owner(self.place, user, definition, chance, devices=[SOURCE])
        self.move = Move.model_construct(
            volume="vm1",
            source=SOURCE,
            target=TARGET,
            source_vios=SECOND,
            target_vios=FIRST,
            principal=PRINCIPAL,
            state=MoveState.COPYING,
            paused=False,
            bandwidth_bytes=None,
        )
        self.intermediary = SimulatedIntermediary(world, network, self.place.vioses, self, self.move)
        first = self.first
        first.dial = self._dial
        for vios in self.vioses:
            vios.dial = self._dial
            vios.process.kill()
            vios.start()
        self.begun = self.finished = self.cancelled = False
        self.running = chance.random() < 0.6
        """The worker goes over while it runs."""
        self._revision = 1
        self._going: Process | None = None
        """The worker that is going over."""
        self.wants_end = chance.random() < 0.8
        self.intermediary.bandwidth_bytes = chance.choice((None, 64 << 10, 16 << 10))
        self.faults = FaultSchedule(world, self._parts(), self._kinds())

    @property
    def first(self) -> SimulatedVios:
        """The VIOS of the target."""
        return self.place.vioses[FIRST]

    @property
    def second(self) -> SimulatedVios:
        """The VIOS of the source."""
        return self.place.vioses[SECOND]

    def _parts(self) -> Parts:
        place = self.place
        return Parts(
            place.network, self.vioses, place.disks, (*self.hosts, HOST), self._guest, self.crash_worker
        )

    def _kinds(self) -> dict[Kind, int]:
        def kill(parts: Parts, chance: random.Random) -> Fault:
            return Fault("kill the intermediary", self.intermediary.process.kill, self._start_intermediary)

        def stop(parts: Parts, chance: random.Random) -> Fault:
            process = self.intermediary.process
            return Fault("stop the intermediary", process.stop, process.cont)

        return PATH_KINDS | WORKER_KINDS | {kill: 20, stop: 6}

    def _start_intermediary(self) -> None:
        if self.begun and not self.cancelled:
            self.intermediary.start()

    async def _dial(self, address: Address, export: str) -> Losable:
        """Connect from the first VIOS to the relay."""
        del address
        process = self.first.process
        reached: dict[str, Any] = {"intermediary": self.intermediary}
        connector = Connector(self.place.network, reached, process, host=FIRST, same_host=False)
        connection = await connector(Endpoint("intermediary", ADDRESS, ""), export, 5.0)
        return able(connection, Feature.FLUSH | Feature.ZERO | Feature.TRIM)

    # The definition

    def _definition(self, revision: int, move: Move | None, states: dict[str, ReplicaState]) -> Definition:
        replicas = tuple(Replica.model_construct(device=d, state=s) for d, s in states.items())
        volume = VolumeRecord.model_construct(
            name="vm1", size_bytes=self.owner.user.pages * PAGE_BYTES, replicas=replicas
        )
        client = ClientRecord.model_construct(epoch=1, owner=self.owner.token, volumes=(volume,))
        granted = move is not None and move.state is not MoveState.RETIRING
        grants = (
            Grant.model_construct(principal=PRINCIPAL, volume="vm1", access=Access.WRITE, device=SOURCE),
            Grant.model_construct(principal=PRINCIPAL, volume="vm1", access=Access.FILL, device=TARGET),
        )
        return Definition.model_construct(
            revision=revision,
            vioses={},
            devices={},
            clients={"vm1": client},
            grants=grants if granted else (),
            moves={"vm1": move} if move else {},
        )

    def carry(self, principal: str) -> Move | None:
        """Bring both VIOS the newer of their definitions, as far as an intermediate client reaches them."""
        reached = [vios for vios in self.vioses if self._reached(HOST, vios)]
        if not reached:
            return None
        newest = max((vios.defined for vios in reached), key=lambda definition: definition.revision)
        for vios in reached:
            if vios.defined.revision < newest.revision:
                vios.define(newest)
        move = newest.moves.get("vm1")
        return move if move and move.principal == principal else None

    def _reached(self, host: str, vios: SimulatedVios) -> bool:
        blocked = self.place.network.blocked
        return vios.process.state is ProcessState.RUNNING and not (
            {(host, vios.name), (vios.name, host)} & blocked
        )

    def ask(
        self,
        vios: SimulatedVios,
        question: Callable[[], Coroutine[Any, Any, Any]],
        answered: Callable[[Any], None],
    ) -> None:
        """Ask a VIOS over its control API, if it is there; the answer takes a while."""
        process = vios.process

        async def run() -> None:
            try:
                answer = await question()
            except FarpageError as error:
                self.world.note(f"{vios.name} answers {error.code}")
                answer = None
            self.world.after(0.001 + 0.1 * self._chance.random() ** 3, lambda: answered(answer))

        if process.state is ProcessState.RUNNING:
            process.loop.create_task(run())

    # What happens

    def _begin(self) -> None:
        self.world.after(0.2 + 2 * self._chance.random(), self._begin_move)
        if self._chance.random() < 0.3:
            self.world.after(2 + 7 * self._chance.random(), self._cancel)

    def _begin_move(self) -> None:
        """Have the client's next worker go over the first VIOS."""
        if not self._reached(self.owner.host, self.first):
            self.world.after(0.2, self._begin_move)
            return
        self.world.note("the move begins")
        self.begun = True
        self.world.after(self._chance.random(), self._start_intermediary)
        if self.running:
            self._define(self.move.model_copy(update={"state": MoveState.PREPARING}), COPYING)
            self.world.after(self._chance.random(), self._prepare)
        else:
            self._copy()
            self._switch(TARGET)

    def _prepare(self) -> None:
        """Have the worker go over, again and again until one has."""
        if self.cancelled:
            return
        if not self.intermediary.process.alive or self._going_over():
            self.world.after(AGAIN_SECONDS, self._prepare)
            return
        self._go_over(TARGET, SECOND, self._copy, self._prepare)

    def _copy(self) -> None:
        """Let pages be copied."""
        if self.cancelled:
            return
        if not self._reached(self.owner.host, self.first):
            self.world.after(AGAIN_SECONDS, self._copy)
            return
        self._define(self.move, COPYING)
        self.world.after(8 * self._chance.random(), self._watch)

    def _define(self, move: Move | None, states: dict[str, ReplicaState]) -> None:
        self._revision += 1
        self.first.define(self._definition(self._revision, move, states))

    def _going_over(self) -> bool:
        return self._going is not None and self._going.alive

    def _go_over(self, device: str, fences: str, done: Callable[[], None], again: Callable[[], None]) -> None:
        """Have the worker at hand go over; `again` is called when it has not, or is lost."""
        owner, chance = self.owner, self._chance
        if not owner.process.alive or not hasattr(owner, "volume"):
            self.world.after(AGAIN_SECONDS, again)
            return
        # Whoever takes its place opens the volume there.
        owner.devices = [device]
        owner.definition.states = {device: ReplicaState.IN_SYNC}
        (disk,) = (disk for disk in self.place.disks if disk.name == device)
        process = self._going = owner.process
        outcome: list[bool] = []

        async def run() -> None:
            try:
                await owner.volume.go_over(self.place.ways(disk), device, device, fences)
            except FarpageError as error:
                self.world.note(f"{process.name} does not go over to {device}: {error.cause}")
                outcome.append(False)
            else:
                self.world.note(f"{process.name} has gone over to {device}")
                outcome.append(True)

        def look() -> None:
            if process.alive and not outcome:
                self.world.after(AGAIN_SECONDS * chance.random(), look)
                return
            self._going = None
            if outcome and outcome[0]:
                done()
            else:
                self.world.after(AGAIN_SECONDS, again)

        process.loop.create_task(run())
        look()

    def _switch(self, device: str) -> None:
        self.owner.devices = [device]
        self.owner.definition.states = {device: ReplicaState.IN_SYNC}
        self.owner.crash()

    def _cancel(self) -> None:
        if self.finished or not self.begun:
            return
        if not self._reached(self.owner.host, self.first) or self._going_over():
            self.world.after(AGAIN_SECONDS, self._cancel)
            return
        self.world.note("the move is cancelled")
        self.cancelled = True
        self._define(None, {SOURCE: ReplicaState.IN_SYNC, TARGET: ReplicaState.RETIRED})
        if not self.running:
            self._switch(SOURCE)
        elif self.owner.devices != [SOURCE]:
            # A worker that is started from now on goes by the definition.
            self.owner.devices = [SOURCE]
            self.owner.definition.states = {SOURCE: ReplicaState.IN_SYNC}
            self._come_back()
        self.intermediary.process.kill()

    def _come_back(self) -> None:
        self._go_over(SOURCE, FIRST, lambda: None, self._come_back)

    def _use_alone(self) -> None:
        """Have the worker use the target like any device."""
        self.moving_place.moved = True
        self._go_over(TARGET, "", lambda: None, self._use_alone)

    def _watch(self) -> None:
        """Finish the move when everything is there, as the hypervisor does."""
        if self.cancelled or self.finished:
            return
        self.world.after(WATCH_SECONDS, self._watch)
        copies = self.first.copies
        if self.wants_end and copies is not None and self._reached(self.owner.host, self.first):
            self.ask(self.first, lambda: copies.status("vm1", TARGET), self._status)

    def _status(self, status: CopyStatus | None) -> None:
        first = self.first
        copies = first.copies
        complete = status is not None and status.present_pages == status.total_pages
        if not complete or self.cancelled or self.finished or copies is None:
            return
        if not self._reached(self.owner.host, first):
            return
        states = {SOURCE: ReplicaState.RETIRED, TARGET: ReplicaState.IN_SYNC}
        retiring = self.move.model_copy(update={"state": MoveState.RETIRING})
        finished = self._definition(self._revision + 1, retiring, states)

        async def store() -> bool:
            await copies.refuse_early_end(finished)
            if self.cancelled:
                return False
            self.world.note("the move is finished")
            self.finished = True
            self._revision += 1
            first.define(finished)
            if self.running:
                self.world.after(self._chance.random(), self._use_alone)
            return True

        self.ask(first, store, lambda _: None)

    # The end

    def _finish(self) -> None:
        self._start_intermediary()
        problem = "the copy does not come to its end long after all is healed"
        if self.begun and not self.cancelled and not self._quiet(self._copied, problem):
            return
        super()._finish()

    def _copied(self) -> bool:
        if self.wants_end:
            return self.finished and self.intermediary.freed
        copies = self.first.copies
        return copies is not None and any(found.copy.presence.complete for found in copies.all)

    def _stored(self, page: int) -> list[bytes]:
        """Return what the devices hold that are whole now: both, while the move is neither over nor off."""
        names = [SOURCE, TARGET] if self.begun else [SOURCE]
        if self.finished:
            names = [TARGET]
        elif self.cancelled:
            names = [SOURCE]
        return [disk.volumes["vm1"].pages.get(page, ZEROS) for disk in self.place.disks if disk.name in names]
