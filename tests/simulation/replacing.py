"""A client whose device is replaced under load, by a hypervisor of which every process may die.

The control process may be killed alone, or with the data worker: then the spare worker inherits the client.
An operator repeats the command to replace the device until that is done, and may have it undone then.
"""

from __future__ import annotations

import random

from farpage.definition.model import ReplicaState
from tests.simulation.definition import KeptDefinition
from tests.simulation.disk import Disk
from tests.simulation.faults import Fault, FaultSchedule, Kind, Parts
from tests.simulation.hypervisor import Hypervisor
from tests.simulation.network import Network
from tests.simulation.owner import Place
from tests.simulation.scenario import FAULTY_SECONDS, Scenario
from tests.simulation.world import World


class Replacing(Scenario):
    """One client's volume, of one replica or two, and a device that takes the place of one."""

    def __init__(self, world: World) -> None:
        self.world = world
        chance = self._chance = world.random("scenario")
        network = Network(world)
        network.slow = chance.choice((0.0, 0.02, 0.2))
        user = self._user(chance.random() < 0.5)
        count = chance.choice((1, 1, 2))
        disks = [Disk(world, f"disk{n}") for n in range(1, count + 2)]
        self.place = Place(world, network, disks, {}, mirror=True)
        for disk in [disks[0], *disks] if chance.random() < 0.5 else disks:
            disk.slowness = chance.choice((1.0, 1.0, 20.0))
            disk.thread_slowness = chance.choice((1.0, 1.0, 1000.0))
            self._serve(disk)
        for disk in disks[:-1]:
            self._make_volume(disk, user)
        kept = KeptDefinition(
            world, [disk.name for disk in disks[:-1]], lambda: any(v.process.alive for v in self.vioses)
        )
        kept.on_attempt = self._crash_while_recording
        self.place.same_host = chance.random() < 0.5
        self.place.leases = chance.random() < 0.7
        self.place.direct = world.random("direct reads").random() < 0.45
        self.owner = self.hypervisor = Hypervisor(self.place, user, kept, chance)
        self.wanted = [("disk1", disks[-1].name)] if chance.random() < 0.8 else []
        """Devices to replace, and by which."""
        if self.wanted and chance.random() < 0.3:
            self.wanted.append((disks[-1].name, "disk1"))
        self.faults = FaultSchedule(world, self._parts(), self._kinds())

    def _kinds(self) -> dict[Kind, int]:
        def kill_control(parts: Parts, chance: random.Random) -> Fault:
            return Fault(
                "kill the control process", self.hypervisor.kill_control, self.hypervisor.start_control
            )

        def kill_both(parts: Parts, chance: random.Random) -> Fault:
            def begin() -> None:
                deaths = [self.hypervisor.kill_control, self.hypervisor.crash]
                chance.shuffle(deaths)
                deaths[0]()
                self.world.after(0.005 * chance.random() ** 2, deaths[1])

            return Fault("kill the control process and the worker", begin, self.hypervisor.start_control)

        return super()._kinds() | {kill_control: 3, kill_both: 4}

    def _crash_while_recording(self) -> None:
        """Kill the worker while it may wait for the states of its replicas to be stored."""
        if not self.faults.healed and self._chance.random() < 0.2:
            self.world.after(self._chance.choice((0.01, 1.0)) * self._chance.random(), self.crash_worker)

    def _begin(self) -> None:
        self.world.after(self._chance.random() * (FAULTY_SECONDS - 3), self._replace)

    def _replace(self) -> None:
        """Give the command, again and again until it was carried out."""
        while self.wanted and self._replaced(*self.wanted[0]):
            self.world.note(f"{self.wanted[0][0]} is replaced")
            self.wanted.pop(0)
        if not self.wanted:
            return
        if self.hypervisor.control.process.alive and self.hypervisor.control.up:
            self.hypervisor.control.replace(*self.wanted[0])
        self.world.after(0.3 + self._chance.random(), self._replace)

    def _replaced(self, old: str, new: str) -> bool:
        states = self.hypervisor.kept.states
        return old not in states and states.get(new) is ReplicaState.IN_SYNC

    def _finish(self) -> None:
        self.hypervisor.start_control()
        if self._quiet(lambda: not self.wanted, "the device is not replaced long after everything is healed"):
            super()._finish()
