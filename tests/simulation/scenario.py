"""One run, drawn from its seed: who is there, what goes wrong when, and what must hold at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from unittest import mock

import structlog

from farpage.address import UnixAddress
from farpage.pager.table import PAGE_BYTES
from farpage.volume.connector import Endpoint
from farpage.volume.lease import Leases
from farpage.volume.multipath import MultipathVolume
from farpage.volume.ownership import Ownership
from tests.simulation.checker import History, wrong_reads
from tests.simulation.connection import Connector, SimulatedServerProcess
from tests.simulation.disk import Disk, SimulatedDevice
from tests.simulation.faults import FLIP_KINDS, PATH_KINDS, FaultSchedule, Parts
from tests.simulation.mutations import mutated
from tests.simulation.network import Network
from tests.simulation.stamps import ZEROS
from tests.simulation.users import PagerUser, User, VolumeUser
from tests.simulation.vios import SimulatedVios, running
from tests.simulation.world import Process, World

FAULTY_SECONDS = 10.0
QUIET_SECONDS = 60.0
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

    def __init__(self, world: World, owner: str) -> None:
        self._world = world
        self._owner = owner

    def epoch_raised(self, epoch: int) -> None:
        self._world.note(f"{self._owner}: epoch {epoch}")

    def alarm(self, kind: str, message: str) -> None:
        self._world.note(f"{self._owner}: alarm {kind}: {message}")


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
    """One client with a volume on a common device, over two VIOS."""

    def __init__(self, world: World) -> None:
        self.world = world
        chance = world.random("scenario")
        self.network = Network(world)
        self.network.slow = chance.choice((0.0, 0.02, 0.2))
        self.history = History()
        user = PagerUser(world, self.history) if chance.random() < 0.6 else VolumeUser(world, self.history)
        self.user: User = user
        self.disk = Disk(world, "disk1")
        self.disk.slowness = chance.choice((1.0, 1.0, 20.0))
        self.disk.thread_slowness = chance.choice((1.0, 1.0, 1000.0))
        self.vioses = {name: SimulatedVios(world, name, [self.disk]) for name in ("vios1", "vios2")}
        for vios in self.vioses.values():
            vios.start()
        setup = SimulatedDevice(self.disk, world.process("setup"))
        setup.create_volume("vm1", self.user.pages * PAGE_BYTES)
        self.process = world.process("worker")
        self.connector = Connector(
            self.network, self.vioses, self.process, host="host1", same_host=chance.random() < 0.5
        )
        self.leases = chance.random() < 0.7
        guest = user.guest if isinstance(user, PagerUser) else None
        parts = Parts(self.network, list(self.vioses.values()), [self.disk], ["host1"], guest)
        self.faults = FaultSchedule(world, parts, PATH_KINDS | (FLIP_KINDS if guest else {}))

    def run(self) -> None:
        """Run it to its end."""
        world, user = self.world, self.user
        with running(self.process):
            volume = MultipathVolume(
                "vm1",
                user.pages * PAGE_BYTES,
                Ownership("a" * 16, 1),
                [Endpoint(name, UnixAddress(f"/{name}"), "disk1") for name in self.vioses],
                connector=self.connector,
                events=Events(world, "worker"),
                device="disk1",
                leases=Leases(self.connector, "0" * 8) if self.leases else None,
            )
            opening = self.process.loop.create_task(volume.open(30.0))
        world.run_until(30.0, opening.done)
        with running(self.process):
            user.start(self.process, volume)
        self.faults.start(FAULTY_SECONDS)
        world.run_until(world.now_seconds + FAULTY_SECONDS)
        user.stop()
        self.faults.heal()
        if not self._quiet("commands still wait long after everything is healed"):
            return
        world.run_until(world.now_seconds + SETTLE_SECONDS)
        for problem in user.wrong_in_store(self._stored):
            world.violated(problem)
        with running(self.process):
            user.read_all()
        self._quiet("the last reads do not come back")

    def _quiet(self, problem: str) -> bool:
        world = self.world
        if world.run_until(world.now_seconds + QUIET_SECONDS, lambda: self.user.idle):
            return True
        if not world.violations:
            world.violated(problem)
        return False

    def _stored(self, page: int) -> list[bytes]:
        return [self.disk.volumes["vm1"].pages.get(page, ZEROS)]


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
