"""One run, drawn from its seed: who is there, what goes wrong when, and what must hold at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from unittest import mock

import structlog

from farpage.address import UnixAddress
from farpage.definition.model import ReplicaState
from farpage.pager.table import PAGE_BYTES
from farpage.volume.connector import Endpoint
from farpage.volume.dirty import MemoryDirtyStore
from farpage.volume.errors import NoPath
from farpage.volume.lease import Leases
from farpage.volume.mirror import MirrorVolume, ReplicaPlace
from farpage.volume.multipath import MultipathVolume
from farpage.volume.ownership import Ownership
from farpage.volume.paged import PagedVolume
from farpage.volume.recorder import States
from tests.simulation.checker import History, wrong_reads
from tests.simulation.connection import Connector, SimulatedServerProcess
from tests.simulation.definition import SimulatedDefinition
from tests.simulation.disk import Disk, SimulatedDevice
from tests.simulation.faults import (
    FLIP_KINDS,
    FLIP_READ_KINDS,
    PATH_KINDS,
    WORKER_KINDS,
    FaultSchedule,
    Parts,
)
from tests.simulation.mutations import mutated
from tests.simulation.network import Network
from tests.simulation.stamps import ZEROS
from tests.simulation.users import PagerUser, User, VolumeUser
from tests.simulation.vios import SimulatedVios, running
from tests.simulation.world import Process, World

FAULTY_SECONDS = 10.0
QUIET_SECONDS = 120.0
SETTLE_SECONDS = 5.0


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    seed: int
    violations: tuple[str, ...]
    digest: str
    events: int
    reads: int
    writes: int
    faults: tuple[str, ...]
    error: BaseException | None = None


class Events:
    """What a volume tells its owner."""

    def __init__(self, world: World, owner: str, definition: SimulatedDefinition) -> None:
        self._world = world
        self._owner = owner
        self._definition = definition

    def epoch_raised(self, epoch: int) -> None:
        self._world.note(f"{self._owner}: epoch {epoch}")

    def alarm(self, kind: str, message: str) -> None:
        self._world.note(f"{self._owner}: alarm {kind}: {message}")

    async def record_replicas(self, epoch: int, states: States) -> None:
        await self._definition.record(states)


@contextmanager
def quiet() -> Iterator[None]:
    """Drop the logs of the code under test, which cost more than the code."""
    before = structlog.get_config()
    structlog.configure(
        wrapper_class=structlog.make_filtering_bound_logger(50), cache_logger_on_first_use=False
    )
    try:
        yield
    finally:
        structlog.configure(**before)


class Scenario:
    """One client's volume: over two VIOS of a common device, or a mirror on devices of several VIOS."""

    def __init__(self, world: World) -> None:
        self.world = world
        chance = self._chance = world.random("scenario")
        self.network = Network(world)
        self.network.slow = chance.choice((0.0, 0.02, 0.2))
        self.history = History()
        user = PagerUser(world, self.history) if chance.random() < 0.5 else VolumeUser(world, self.history)
        self.user: User = user
        self.mirror = chance.random() < 0.5
        self.disks = [Disk(world, f"disk{n}") for n in range(1, chance.choice((3, 4)) if self.mirror else 2)]
        self.vioses: dict[str, SimulatedVios] = {}
        for disk in [self.disks[0], *self.disks] if chance.random() < 0.5 or not self.mirror else self.disks:
            disk.slowness = chance.choice((1.0, 1.0, 20.0))
            disk.thread_slowness = chance.choice((1.0, 1.0, 1000.0))
            vios = SimulatedVios(world, f"vios{len(self.vioses) + 1}", [disk])
            self.vioses[vios.name] = vios
            vios.start()
        for disk in self.disks:
            setup = SimulatedDevice(disk, world.process("setup"))
            setup.create_volume("vm1", user.pages * PAGE_BYTES)
        self.definition = SimulatedDefinition(
            world,
            [disk.name for disk in self.disks],
            lambda: any(v.process.alive for v in self.vioses.values()),
        )
        self.definition.on_attempt = self._crash_while_recording
        self.dirty = MemoryDirtyStore(user.pages)
        self.same_host = chance.random() < 0.5
        self.leases = chance.random() < 0.7
        self.workers = 0
        self.process: Process
        self.ownership = Ownership("0" * 16, 0)
        guest = user.guest if isinstance(user, PagerUser) else None
        parts = Parts(
            self.network, list(self.vioses.values()), self.disks, ["host1"], guest, self.crash_worker
        )
        kinds = PATH_KINDS | WORKER_KINDS
        if guest:
            kinds |= FLIP_KINDS | FLIP_READ_KINDS
        self.faults = FaultSchedule(world, parts, kinds)

    def _open(self) -> None:
        """Start a worker, which opens the volume under a claim of its own."""
        world, user = self.world, self.user
        self.workers += 1
        token = f"{self.workers:08x}"
        process = self.process = world.process(f"worker{self.workers}")
        ownership = self.ownership = Ownership(token * 2, self.ownership.epoch + 1)
        user.first_epoch = ownership.epoch
        connector = Connector(self.network, self.vioses, process, host="host1", same_host=self.same_host)
        leases = Leases(connector, token) if self.leases else None
        events = Events(world, process.name, self.definition)

        async def run() -> None:
            volume = self._volume(ownership, connector, leases, events)
            while True:
                try:
                    await volume.open(10.0)
                except NoPath:
                    volume = self._volume(ownership, connector, leases, events)
                else:
                    break
            user.start(process, volume)

        process.loop.create_task(run())

    def _volume(
        self, ownership: Ownership, connector: Connector, leases: Leases | None, events: Events
    ) -> PagedVolume:
        ways = {
            disk.name: tuple(
                Endpoint(vios.name, UnixAddress(f"/{vios.name}"), disk.name)
                for vios in self.vioses.values()
                if disk in vios.disks
            )
            for disk in self.disks
        }
        size_bytes = self.user.pages * PAGE_BYTES
        if not self.mirror:
            return MultipathVolume(
                "vm1",
                size_bytes,
                ownership,
                list(ways["disk1"]),
                connector=connector,
                events=events,
                device="disk1",
                leases=leases,
            )
        return MirrorVolume(
            "vm1",
            size_bytes,
            ownership,
            [ReplicaPlace(name, name, self.definition.states[name], ways[name]) for name in ways],
            connector=connector,
            events=events,
            store=self.dirty,
            recover=self.workers > 1,
            leases=leases,
        )

    def _crash_while_recording(self) -> None:
        """Kill the worker around the moment at which it has a replica recorded stale."""
        if not self.faults.healed and self._chance.random() < 0.3:
            self.world.after(0.01 * self._chance.random(), self.crash_worker)

    def crash_worker(self) -> None:
        """Kill the worker, and start another one soon; its dirty maps may be lost with it."""
        if not self.process.alive:
            return
        self.world.note("the worker is killed")
        self.process.kill()
        if self._chance.random() < 0.5:
            self.dirty = MemoryDirtyStore(self.user.pages)
        self.world.after(0.05 + self._chance.random(), self._open)

    def run(self) -> None:
        """Run it to its end."""
        world, user = self.world, self.user
        self._open()
        world.run_until(1.0)
        self.faults.start(FAULTY_SECONDS)
        world.run_until(world.now_seconds + FAULTY_SECONDS)
        user.stop()
        self.faults.heal()
        world.run_until(world.now_seconds + SETTLE_SECONDS)
        if not self._quiet(lambda: user.idle, "commands still wait long after everything is healed"):
            return
        if not self._quiet(self._in_sync, "a replica is not in sync long after everything is healed"):
            return
        world.run_until(world.now_seconds + SETTLE_SECONDS)
        for problem in user.wrong_in_store(self._stored):
            world.violated(problem)
        with running(self.process):
            user.read_all()
        self._quiet(lambda: user.idle, "the last reads do not come back")

    def _in_sync(self) -> bool:
        return all(state is ReplicaState.IN_SYNC for state in self.definition.states.values())

    def _quiet(self, condition: Callable[[], bool], problem: str) -> bool:
        world = self.world
        if world.run_until(world.now_seconds + QUIET_SECONDS, condition):
            return True
        if not world.violations:
            world.violated(problem)
        return False

    def _stored(self, page: int) -> list[bytes]:
        return [disk.volumes["vm1"].pages.get(page, ZEROS) for disk in self.disks]


def run_seed(
    seed: int, *, mutation: str | None = None, trace: Callable[[str], None] | None = None
) -> Outcome:
    """Run one seed, with a mutation if one is named."""
    world = World(seed, trace=trace)
    with ExitStack() as stack:
        stack.enter_context(quiet())
        stack.enter_context(mutated(mutation))
        stack.enter_context(mock.patch("farpage.volume.link.ServerProcess", SimulatedServerProcess))
        SimulatedServerProcess.find = partial(_process_of, world)
        scenario = Scenario(world)
        scenario.run()
        if not world.violations:
            for problem in wrong_reads(scenario.history):
                world.violated(problem)
        world.end()
    for vios in scenario.vioses.values():
        vios.database.close()
    return Outcome(
        seed=seed,
        violations=tuple(world.violations),
        digest=world.digest,
        events=world.events,
        reads=len(scenario.history.reads),
        writes=sum(map(len, scenario.history.writes.values())),
        faults=tuple(scenario.faults.done),
        error=world.error,
    )


def _process_of(world: World, pid: int) -> Process:
    return world.processes[pid - 1000]
