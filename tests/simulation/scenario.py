"""One run, drawn from its seed: who is there, what goes wrong when, and what must hold at the end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from unittest import mock

import structlog

from farpage.address import UnixAddress
from farpage.volume.connector import Endpoint
from farpage.volume.multipath import MultipathVolume
from farpage.volume.ownership import Ownership
from tests.simulation.checker import History, wrong_reads
from tests.simulation.connection import Connector, SimulatedServerProcess
from tests.simulation.disk import Disk, SimulatedDevice
from tests.simulation.faults import PATH_KINDS, FaultSchedule, Parts
from tests.simulation.mutations import mutated
from tests.simulation.network import Network
from tests.simulation.stamps import content_of, version_of
from tests.simulation.vios import SimulatedVios, running
from tests.simulation.world import Process, World

PAGE = 4096
PAGES = 24
FAULTY_SECONDS = 12.0
QUIET_SECONDS = 60.0


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


class VolumeUser:
    """Writes and reads pages of a volume as the pager does: never two commands for one page in flight."""

    def __init__(self, world: World, process: Process, volume: MultipathVolume, history: History) -> None:
        self._world = world
        self._process = process
        self._volume = volume
        self._history = history
        self._chance = world.random("user")
        self._versions = [0] * PAGES
        self._busy: set[int] = set()
        self.stopped = False
        self.writes = 0

    @property
    def idle(self) -> bool:
        """Whether no command waits."""
        return not self._busy

    def step(self) -> None:
        """Begin a few commands, and come again."""
        if self.stopped:
            return
        for _ in range(self._chance.choice((1, 1, 2, 6))):
            page = self._chance.randrange(PAGES)
            if page in self._busy:
                continue
            if self._chance.random() < 0.6:
                self.write(page)
            else:
                self.read(page)
        self._volume.push()
        pause = self._chance.choice((0.001, 0.02, 0.1, 0.3))
        self._process.loop.call_later(pause, self.step)

    def write(self, page: int) -> None:
        """Write a new version."""
        self._versions[page] += 1
        self.writes += 1
        version = self._versions[page]
        self._busy.add(page)
        write = self._history.begin_write(page, version)
        content = memoryview(content_of(page, version))

        def done(error: int) -> None:
            self._busy.discard(page)
            if error:
                self._world.violated(f"a write of page {page} ended with errno {error}")
            self._history.end_write(write)

        self._volume.write(page * PAGE, content, done)

    def read(self, page: int, by: str = "a read") -> None:
        """Read a page."""
        self._busy.add(page)
        began = self._history.instant()

        def done(error: int, payload: memoryview | None) -> None:
            self._busy.discard(page)
            if error or payload is None:
                self._world.violated(f"a read of page {page} ended with errno {error}")
            else:
                self._history.read(page, version_of(page, payload), began, by)

        self._volume.read(page * PAGE, PAGE, done)


class PathScenario:
    """One client with a volume on a common device, over two VIOS."""

    def __init__(self, world: World) -> None:
        self.world = world
        chance = world.random("scenario")
        self.network = Network(world)
        self.network.slow = chance.choice((0.0, 0.02, 0.2))
        self.history = History()
        self.disk = Disk(world, "disk1")
        self.disk.slowness = chance.choice((1.0, 1.0, 20.0))
        self.disk.thread_slowness = chance.choice((1.0, 1.0, 500.0))
        self.vioses = {name: SimulatedVios(world, name, [self.disk]) for name in ("vios1", "vios2")}
        for vios in self.vioses.values():
            vios.start()
        SimulatedDevice(self.disk, world.process("setup")).create_volume("vm1", PAGES * PAGE)
        self.process = world.process("worker")
        self.connector = Connector(
            self.network, self.vioses, self.process, host="host1", same_host=chance.random() < 0.5
        )
        parts = Parts(self.network, list(self.vioses.values()), [self.disk], ["host1"])
        self.faults = FaultSchedule(world, parts, PATH_KINDS)
        self.user: VolumeUser | None = None

    def run(self) -> None:
        """Run it to its end."""
        world = self.world
        with running(self.process):
            volume = MultipathVolume(
                "vm1",
                PAGES * PAGE,
                Ownership("a" * 16, 1),
                [Endpoint(name, UnixAddress(f"/{name}"), "disk1") for name in self.vioses],
                connector=self.connector,
                events=Events(world, "worker"),
            )
            opening = self.process.loop.create_task(volume.open(30.0))
        world.run_until(30.0, opening.done)
        user = self.user = VolumeUser(world, self.process, volume, self.history)
        self.process.loop.call_soon(user.step)
        self.faults.start(FAULTY_SECONDS)
        world.run_until(world.now_seconds + FAULTY_SECONDS)
        user.stopped = True
        self.faults.heal()
        if not world.run_until(world.now_seconds + QUIET_SECONDS, lambda: user.idle):
            world.violated("commands still wait long after everything is healed")
            return
        world.run_until(world.now_seconds + 5.0)
        with running(self.process):
            for page in range(PAGES):
                user.read(page, "the last read")
        if not world.run_until(world.now_seconds + QUIET_SECONDS, lambda: user.idle):
            world.violated("the last reads do not come back")


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
        scenario = PathScenario(world)
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
