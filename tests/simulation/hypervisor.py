"""A hypervisor's processes around one client: a control process, the data worker, and a spare one.

Each may be killed at any moment. What outlives them is the run folder and the definition. Their messages,
the run folder's files and the VIOS' control API are stood in for; what they do is the shipped code: replicas
that come and go (`ClientReplicas`, `DeviceReplacements`, `farpage.pager.volumes`) and the heir.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from farpage.attach.memory import ClientKind
from farpage.pager.messages import (
    Attach,
    EndpointSpec,
    ReplicaSpec,
)
from farpage.volume.dirty import MemoryDirtyStore
from farpage.volume.recorder import States
from tests.simulation.control import SimulatedControl
from tests.simulation.dataworker import SimulatedWorker
from tests.simulation.definition import KeptDefinition
from tests.simulation.host import CLIENT, HOST, VOLUME, SimulatedFolder
from tests.simulation.owner import OPEN_SECONDS, Owner, Place
from tests.simulation.users import User
from tests.simulation.vios import SimulatedVios
from tests.simulation.world import ProcessState


class Hypervisor(Owner):
    """One client's owner with all its processes; `replicas` are the devices of the client at first."""

    def __init__(self, place: Place, user: User, kept: KeptDefinition, chance: random.Random) -> None:
        super().__init__(place, user, kept, chance)
        self.kept = kept
        self.chance = place.world.random("hypervisor")
        self.folder = SimulatedFolder()
        self.worker: SimulatedWorker
        self.control: SimulatedControl
        self._all: list[SimulatedWorker] = []
        self._controls = 0
        self._resync_bytes = self.chance.choice((100 << 20, 32 << 10))

    def open(self, epoch: int = 0) -> None:
        """Start the control process."""
        self.start_control()

    @property
    def epoch(self) -> int:
        """What the state file has."""
        return self.ownership.epoch

    def specs(self, states: States) -> tuple[ReplicaSpec, ...]:
        """Return replicas with the ways to each, in the order of their devices."""
        disks = {disk.name: disk for disk in self.place.disks}
        return tuple(
            ReplicaSpec(
                device=device,
                name=device,
                state=state,
                endpoints=tuple(
                    EndpointSpec(vios=way.vios, address=f"unix:/{way.vios}", lease_seconds=way.lease_seconds)
                    for way in self.place.ways(disks[device])
                ),
            )
            for device, state in states.items()
        )

    def order(self) -> Attach:
        """Return what the first worker is told."""
        return Attach(
            client=CLIENT,
            volume=VOLUME,
            epoch=1,
            owner=self.token,
            kind=ClientKind.PROCESS,
            pid=1,
            pages=self.user.pages,
            start_address=0,
            memfd_offset_bytes=0,
            limit_pages=self.user.pages,
            replicas=self.specs(self.kept.states),
            resync_bytes_per_second=self._resync_bytes,
            state_path="",
            path_timeout_seconds=1.0,
            open_timeout_seconds=OPEN_SECONDS,
        )

    def new_worker(self) -> SimulatedWorker:
        """Start a worker."""
        worker = SimulatedWorker(self, f"worker{len(self._all) + 1}")
        self._all.append(worker)
        return worker

    def living_workers(self) -> Sequence[SimulatedWorker]:
        """Return the workers that are there."""
        return [worker for worker in self._all if worker.process.alive]

    def reaches(self, vios: SimulatedVios) -> bool:
        """Tell whether the VIOS' control API answers."""
        ways = {(HOST, vios.name), (vios.name, HOST)}
        return vios.process.state is ProcessState.RUNNING and not ways & self.place.network.blocked

    # Losses

    def crash(self) -> None:
        """Kill the worker of the client; its dirty maps may be lost with it."""
        if hasattr(self, "worker") and self.worker.process.alive:
            self.world.note("the worker is killed")
            self.worker.process.kill()
            if self.chance.random() < 0.2:
                self.dirty = MemoryDirtyStore(self.user.pages)

    def kill_control(self) -> None:
        """Kill the control process."""
        self.world.note("the control process is killed")
        self.control.process.kill()

    def start_control(self) -> None:
        """Start the control process, unless it runs."""
        if self._controls == 0 or not self.control.process.alive:
            self._controls += 1
            self.control = SimulatedControl(self, f"control{self._controls}")

    def end(self) -> None:
        """Kill everything for good."""
        self.control.process.kill()
        for worker in self._all:
            worker.process.kill()
