"""What goes wrong when: drawn from the seed before the run begins, carried out by the world."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tests.simulation.disk import Disk
from tests.simulation.network import Network
from tests.simulation.vios import SimulatedVios
from tests.simulation.world import World


@dataclass(frozen=True)
class Fault:
    """One fault: what begins it, what ends it, and how long it lasts."""

    name: str
    begin: Callable[[], None]
    end: Callable[[], None]
    seconds: float


class FaultSchedule:
    """The faults of one run."""

    def __init__(
        self,
        world: World,
        network: Network,
        vioses: dict[str, SimulatedVios],
        disks: list[Disk],
        hosts: list[str],
        seconds: float,
    ) -> None:
        """`hosts` are those of the clients, as their connections name them."""
        self.done: list[str] = []
        self._world = world
        self._network = network
        self._vioses = vioses
        self._disks = disks
        self._hosts = hosts
        self._chance = world.random("faults")
        self._seconds = seconds
        self._healed = False

    def start(self) -> None:
        """Let them happen from now on."""
        chance = self._chance
        for _ in range(chance.choice((0, 2, 4, 8, 14))):
            self._world.after(chance.random() * self._seconds, self._begin)

    def _begin(self) -> None:
        if self._healed:
            return
        fault = self._draw()
        self.done.append(fault.name)
        self._world.note(f"fault: {fault.name} for {fault.seconds:.3f} s")
        fault.begin()
        self._world.after(fault.seconds, fault.end)

    def _draw(self) -> Fault:
        chance = self._chance
        seconds = chance.choice((0.01, 0.3, 0.8, 1.2, 2.5, 5.0)) * (0.5 + chance.random())
        vios = chance.choice(list(self._vioses.values()))
        disk = chance.choice(self._disks)
        host = chance.choice(self._hosts)
        kinds: list[tuple[int, Callable[[], Fault]]] = [
            (6, lambda: Fault(f"stop {vios.name}", partial(self._stop, vios), partial(self._cont, vios), seconds)),
            (5, lambda: Fault(f"kill {vios.name}", vios.process.kill, partial(self._restart, vios), seconds)),
            (3, lambda: Fault(f"cut {host}-{vios.name}", partial(self._cut, vios), _nothing, seconds)),
            (2, lambda: Fault(f"block {host}>{vios.name}", partial(self._network.block, host, vios.name), self._network.heal, seconds)),
            (2, lambda: Fault(f"block {vios.name}>{host}", partial(self._network.block, vios.name, host), self._network.heal, seconds)),
            (2, lambda: Fault(f"hang {disk.name}", partial(setattr, disk, "hung", True), disk.resume, seconds)),
            (1, lambda: Fault(f"fill {disk.name}", partial(setattr, disk, "full", True), partial(setattr, disk, "full", False), seconds)),
            (1, lambda: Fault(f"fail {disk.name}", partial(setattr, disk, "failing", True), partial(setattr, disk, "failing", False), seconds)),
        ]  # fmt: skip
        (kind,) = chance.choices([make for _, make in kinds], [weight for weight, _ in kinds])
        return kind()

    def _stop(self, vios: SimulatedVios) -> None:
        vios.process.stop()

    def _cont(self, vios: SimulatedVios) -> None:
        vios.process.cont()

    def _restart(self, vios: SimulatedVios) -> None:
        if not vios.process.alive:
            vios.start()

    def _cut(self, vios: SimulatedVios) -> None:
        for pipe in list(self._network.pipes):
            if pipe.server is vios.process:
                pipe.reset(pipe.client)
                pipe.reset(pipe.server)

    def heal(self) -> None:
        """End every fault."""
        self._healed = True
        self._world.note("healed")
        self._network.heal()
        for disk in self._disks:
            disk.full = disk.failing = False
            disk.resume()
        for vios in self._vioses.values():
            vios.process.cont()
            self._restart(vios)


def _nothing() -> None:
    pass
