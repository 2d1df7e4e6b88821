"""One client's volume while things go wrong: who is there, drawn from the seed, and what must hold then."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from farpage.pager.table import PAGE_BYTES
from tests.simulation.checker import History
from tests.simulation.definition import SimulatedDefinition
from tests.simulation.disk import Disk, SimulatedDevice
from tests.simulation.faults import (
    FLIP_KINDS,
    FLIP_READ_KINDS,
    PATH_KINDS,
    WORKER_KINDS,
    FaultSchedule,
    Kind,
    Parts,
)
from tests.simulation.guest import Guest
from tests.simulation.network import Network
from tests.simulation.owner import Owner, Place
from tests.simulation.stamps import ZEROS
from tests.simulation.users import PagerUser, User, VolumeUser
from tests.simulation.vios import SimulatedVios, running
from tests.simulation.world import World

FAULTY_SECONDS = 10.0
QUIET_SECONDS = 120.0
SETTLE_SECONDS = 5.0


class Scenario:
    """One client's volume: over two VIOS of a common device, or a mirror on devices of several VIOS."""

    hosts: tuple[str, ...] = ("host1",)
    """Where clients are."""

    def __init__(self, world: World) -> None:
        self.world = world
        chance = self._chance = world.random("scenario")
        network = Network(world)
        network.slow = chance.choice((0.0, 0.02, 0.2))
        user = self._user(chance.random() < 0.5)
        mirror = chance.random() < 0.5
        disks = [Disk(world, f"disk{n}") for n in range(1, chance.choice((3, 4)) if mirror else 2)]
        self.place = Place(world, network, disks, {}, mirror)
        for disk in [disks[0], *disks] if chance.random() < 0.5 or not mirror else disks:
            disk.slowness = chance.choice((1.0, 1.0, 20.0))
            disk.thread_slowness = chance.choice((1.0, 1.0, 1000.0))
            self._serve(disk)
        for disk in disks:
            self._make_volume(disk, user)
        definition = SimulatedDefinition(
            world, [disk.name for disk in disks], lambda: any(v.process.alive for v in self.vioses)
        )
        definition.on_attempt = self._crash_while_recording
        self.place.same_host = chance.random() < 0.5
        self.place.leases = chance.random() < 0.7
        self.place.direct = world.random("direct reads").random() < 0.45
        self.owner = Owner(self.place, user, definition, chance)
        self.faults = FaultSchedule(world, self._parts(), self._kinds())

    # What is there

    def _user(self, is_pager: bool, client: int = 1) -> User:
        history = History()
        if is_pager:
            return PagerUser(self.world, history, client)
        return VolumeUser(self.world, history, client)

    def _serve(self, disk: Disk) -> None:
        """Let one VIOS more serve a disk."""
        vios = SimulatedVios(self.world, f"vios{len(self.place.vioses) + 1}", [disk])
        self.place.vioses[vios.name] = vios
        vios.start()

    def _make_volume(self, disk: Disk, user: User) -> None:
        setup = SimulatedDevice(disk, self.world.process("setup"))
        setup.create_volume("vm1", user.pages * PAGE_BYTES)

    def _parts(self) -> Parts:
        place = self.place
        return Parts(place.network, self.vioses, place.disks, self.hosts, self._guest, self.crash_worker)

    def _guest(self) -> Guest | None:
        user = self.owner.user
        return user.guest if isinstance(user, PagerUser) else None

    def _kinds(self) -> dict[Kind, int]:
        kinds = PATH_KINDS | WORKER_KINDS
        if isinstance(self.owner.user, PagerUser):
            kinds |= FLIP_KINDS | FLIP_READ_KINDS
        return kinds

    @property
    def vioses(self) -> list[SimulatedVios]:
        """Every VIOS."""
        return list(self.place.vioses.values())

    @property
    def fault_names(self) -> Sequence[str]:
        """What went wrong."""
        return self.faults.done

    def histories(self) -> Iterable[History]:
        """Return what is to be held against the registers of pages."""
        return [self.owner.user.history]

    # What happens

    def _crash_while_recording(self) -> None:
        """Kill the worker around the moment at which it has a replica recorded stale."""
        if not self.faults.healed and self._chance.random() < 0.3:
            self.world.after(0.01 * self._chance.random(), self.crash_worker)

    def crash_worker(self) -> None:
        """Kill the worker of the owner."""
        self.owner.crash()

    def run(self) -> None:
        """Run it to its end."""
        world = self.world
        self.owner.open()
        world.run_until(1.0)
        self.faults.start(FAULTY_SECONDS)
        self._begin()
        world.run_until(world.now_seconds + FAULTY_SECONDS)
        self.owner.user.stop()
        self.faults.heal()
        world.run_until(world.now_seconds + SETTLE_SECONDS)
        self._finish()

    def _begin(self) -> None:
        """Let what is special to this scenario happen while things go wrong."""

    def _finish(self) -> None:
        """See that everything comes to rest, and that it is right then."""
        world, user = self.world, self.owner.user
        if not self._quiet(lambda: user.idle, "commands still wait long after everything is healed"):
            return
        if not self._quiet(self.owner.in_sync, "a replica is not in sync long after everything is healed"):
            return
        world.run_until(world.now_seconds + SETTLE_SECONDS)
        for problem in user.wrong_in_store(self._stored):
            world.violated(problem)
        with running(self.owner.process):
            user.read_all()
        self._quiet(lambda: user.idle, "the last reads do not come back")

    def _quiet(self, condition: Callable[[], bool], problem: str) -> bool:
        world = self.world
        if world.run_until(world.now_seconds + QUIET_SECONDS, condition):
            return True
        if not world.violations:
            world.violated(problem)
        return False

    def _stored(self, page: int) -> list[bytes]:
        return [
            disk.volumes["vm1"].pages.get(page, ZEROS)
            for disk in self.place.disks
            if disk.name in self.owner.definition.states
        ]

    def close(self) -> None:
        """Give back what outlives the world."""
        for vios in self.vioses:
            vios.database.close()
