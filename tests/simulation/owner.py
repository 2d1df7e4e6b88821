"""A hypervisor that has a client: its claim, its workers one after the other, and who uses the volume."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from farpage.address import UnixAddress
from farpage.definition.model import ReplicaState
from farpage.device.claim import new_owner
from farpage.pager.table import PAGE_BYTES
from farpage.vios.leases import DEFAULT_LEASE_SECONDS
from farpage.volume.connector import Endpoint
from farpage.volume.dirty import MemoryDirtyStore
from farpage.volume.errors import ClientFenced, NoPath
from farpage.volume.lease import Leases
from farpage.volume.mirror import MirrorVolume
from farpage.volume.multipath import MultipathVolume
from farpage.volume.ownership import Ownership
from farpage.volume.paged import PagedVolume
from farpage.volume.recorder import States
from farpage.volume.replica import ReplicaPlace
from tests.simulation.connection import Connector
from tests.simulation.definition import SimulatedDefinition
from tests.simulation.disk import Disk
from tests.simulation.network import Network
from tests.simulation.users import User
from tests.simulation.vios import SimulatedVios
from tests.simulation.world import Process, World

OPEN_SECONDS = 10.0


@dataclass
class Place:
    """What owners share: the VIOS, their disks, and the way to them."""

    world: World
    network: Network
    disks: list[Disk]
    vioses: dict[str, SimulatedVios]
    mirror: bool
    same_host: bool = False
    """The servers' processes can be watched."""
    leases: bool = False
    direct: bool = False
    """Owners read by themselves what VIOSes lend."""

    def ways(self, disk: Disk) -> tuple[Endpoint, ...]:
        """Return the ways to a disk."""
        return tuple(
            Endpoint(
                vios.name,
                UnixAddress(f"/{vios.name}"),
                disk.name,
                lease_seconds=DEFAULT_LEASE_SECONDS if self.leases else None,
            )
            for vios in self.vioses.values()
            if disk in vios.disks
        )


class Events:
    """What a volume tells its owner."""

    def __init__(self, owner: Owner, worker: str) -> None:
        self._world = owner.world
        self._owner = worker
        self._definition = owner.definition
        self._on_epoch = owner.on_epoch

    def epoch_raised(self, epoch: int) -> None:
        self._world.note(f"{self._owner}: epoch {epoch}")
        self._on_epoch(epoch)

    def vios_doubted(self, vios: str) -> None:
        self._world.note(f"{self._owner}: path over {vios} failed")

    def alarm(self, kind: str, message: str) -> None:
        self._world.note(f"{self._owner}: alarm {kind}: {message}")

    async def record_replicas(self, epoch: int, states: States) -> None:
        await self._definition.record(states)


class Owner:
    """One claim of a client, from its first worker to its last."""

    def __init__(
        self,
        place: Place,
        user: User,
        definition: SimulatedDefinition,
        chance: random.Random,
        *,
        number: int = 1,
        host: str = "host1",
        devices: Sequence[str] | None = None,
    ) -> None:
        """`devices` are those that the volume has at first; by default all."""
        self.place = place
        self.user = user
        self.definition = definition
        self.host = host
        self.devices = list(devices) if devices else [disk.name for disk in place.disks]
        self.dirty = MemoryDirtyStore(user.pages)
        self.token = new_owner(number, f"{number:08x}")
        self.ownership = Ownership(self.token, 0)
        self.workers = 0
        self.process: Process
        self.volume: PagedVolume
        self.opened = False
        """The worker at hand has begun to serve its user."""
        self.on_refused: Callable[[], None] = lambda: place.world.violated("the only owner is fenced")
        """Called when the first worker may not even begin."""
        self.on_epoch: Callable[[int], None] = lambda _epoch: None
        """Told of each epoch that a path was opened with after the first."""
        self.ended = False
        """Its hypervisor has given it up: no worker is started any more."""
        self._number = number
        self._chance = chance

    @property
    def world(self) -> World:
        """The world in which it lives."""
        return self.place.world

    def open(self, epoch: int = 0) -> None:
        """Start a worker, which opens the volume; the first under `epoch`, the next above the one before."""
        self.workers += 1
        name = f"{self._number}-{self.workers}" if self._number > 1 else f"{self.workers}"
        process = self.process = self.world.process(f"worker{name}")
        recovers = self.workers > 1
        ownership = self.ownership = Ownership(self.token, max(self.ownership.epoch + 1, epoch))
        place = self.place
        connector = Connector(
            place.network,
            place.vioses,
            process,
            host=self.host,
            same_host=place.same_host,
            borrows=place.direct,
        )
        leases = Leases(connector, f"{self._number:02x}{self.workers:06x}") if place.leases else None
        events = Events(self, process.name)
        self.opened = False

        async def run() -> None:
            self.volume = self._made(ownership, connector, leases, events, recovers=recovers)
            while True:
                try:
                    await self.volume.open(OPEN_SECONDS)
                except NoPath:
                    self.volume = self._made(ownership, connector, leases, events, recovers=recovers)
                except ClientFenced as fenced:
                    self.world.note(f"{process.name}: {fenced.cause}")
                    if not recovers:
                        self.on_refused()
                    return
                else:
                    break
            self.opened = True
            self.user.start(process, self.volume)

        process.loop.create_task(run())

    def _made(
        self,
        ownership: Ownership,
        connector: Connector,
        leases: Leases | None,
        events: Events,
        *,
        recovers: bool,
    ) -> PagedVolume:
        place = self.place
        had_owner = self._number > 1
        ways = {disk.name: place.ways(disk) for disk in place.disks if disk.name in self.devices}
        size_bytes = self.user.pages * PAGE_BYTES
        if not place.mirror:
            (device,) = ways
            return MultipathVolume(
                "vm1",
                size_bytes,
                ownership,
                list(ways[device]),
                connector=connector,
                events=events,
                device=device,
                leases=leases,
                had_owner=had_owner,
            )
        return MirrorVolume(
            "vm1",
            size_bytes,
            ownership,
            [ReplicaPlace(name, name, self.definition.states[name], ways[name]) for name in ways],
            connector=connector,
            events=events,
            store=self.dirty,
            recover=recovers,
            had_owner=had_owner,
            leases=leases,
        )

    def crash(self) -> None:
        """Kill the worker, and start another one soon; its dirty maps may be lost with it."""
        if not self.process.alive:
            return
        self.world.note("the worker is killed")
        self.process.kill()
        if self._chance.random() < 0.5:
            self.dirty = MemoryDirtyStore(self.user.pages)
        self.world.after(0.05 + self._chance.random(), self._open_again)

    def _open_again(self) -> None:
        if not self.ended:
            self.open()

    def end(self) -> None:
        """Kill the worker for good."""
        self.ended = True
        self.process.kill()

    def in_sync(self) -> bool:
        """Tell whether every replica is recorded in sync."""
        return all(state is ReplicaState.IN_SYNC for state in self.definition.states.values())
