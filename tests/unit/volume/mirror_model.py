"""A mirror over VIOS with a disk each, and a definition that can be out of reach, in simulated time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from collections.abc import Set as AbstractSet

from farpage.address import UnixAddress
from farpage.blockio import DirectFile
from farpage.definition.model import ReplicaState
from farpage.errors import Unreachable
from farpage.vios.names import parse_export_name
from farpage.volume.connector import Endpoint, PathConnection
from farpage.volume.dirty import MemoryDirtyStore
from farpage.volume.mirror import MirrorVolume
from farpage.volume.multipath import MultipathVolume
from farpage.volume.ownership import Ownership
from farpage.volume.recorder import States
from farpage.volume.replica import ReplicaPlace
from tests.unit.volume.model import OWNER, PAGE, SIZE, Disk, ModelVios, Recorder

IN_SYNC, STALE = ReplicaState.IN_SYNC, ReplicaState.STALE
PAGES = SIZE // PAGE


class MirrorRecorder(Recorder):
    """What a mirror told its owner; the definition that it stores."""

    def __init__(self, stored: States) -> None:
        super().__init__()
        self.stored = stored
        self.reachable = True
        self.gate = asyncio.Event()
        self.gate.set()
        self.attempts = 0

    async def record_replicas(self, epoch: int, states: States) -> None:
        self.attempts += 1
        await self.gate.wait()
        if not self.reachable:
            raise Unreachable("the definition", "vios", "refused", "")
        assert ReplicaState.IN_SYNC in states.values()
        self.stored.update(states)


class MirrorRig:
    """A mirror of `count` replicas, disk1 behind vios1 and so on; `common` lets a spare VIOS reach disk1."""

    def __init__(
        self,
        count: int = 2,
        *,
        common: bool = False,
        stored: States | None = None,
        store: MemoryDirtyStore | None = None,
        recover: bool = False,
        disks: dict[str, Disk] | None = None,
        bandwidth: float = 100 << 20,
        epoch: int = 1,
        unsure: AbstractSet[str] = frozenset(),
    ) -> None:
        self.disks = disks or {f"disk{n}": Disk() for n in range(1, count + 1)}
        self.vioses = {f"vios{n}": ModelVios(f"vios{n}", self.disks[f"disk{n}"]) for n in range(1, count + 1)}
        if common:
            self.vioses["spare"] = ModelVios("spare", self.disks["disk1"])
        self.events = MirrorRecorder(stored or dict.fromkeys(self.disks, IN_SYNC))
        self.store = store or MemoryDirtyStore(PAGES)
        self.lends: dict[str, DirectFile] = {}
        """What VIOSes lend to whoever opens the volume."""
        places = [
            ReplicaPlace(
                disk,
                disk,
                self.events.stored[disk],
                tuple(
                    Endpoint(name, UnixAddress(f"/{name}"), disk)
                    for name, vios in self.vioses.items()
                    if vios.disk is self.disks[disk]
                ),
                disk in unsure,
            )
            for disk in self.disks
        ]
        self.volume = MirrorVolume(
            "vm1",
            SIZE,
            Ownership(OWNER, epoch),
            places,
            connector=self.connect,
            events=self.events,
            store=self.store,
            recover=recover,
            path_timeout_seconds=1.0,
            resync_bytes_per_second=bandwidth,
        )

    async def connect(self, endpoint: Endpoint, export_name: str, timeout_seconds: float) -> PathConnection:
        wanted = parse_export_name(export_name)
        try:
            async with asyncio.timeout(timeout_seconds):
                connection = await self.vioses[endpoint.vios].open(wanted)
        except TimeoutError as error:
            raise Unreachable("the server", endpoint.vios, "no answer", "") from error
        connection.direct = self.lends.get(endpoint.vios)
        return connection

    def add(self, disk: str) -> None:
        """Give the mirror a replica on a disk of its own, behind a VIOS of its own."""
        vios = f"vios{len(self.disks) + 1}"
        self.disks[disk] = Disk()
        self.vioses[vios] = ModelVios(vios, self.disks[disk])
        self.events.stored[disk] = STALE
        self.volume.add(ReplicaPlace(disk, disk, STALE, (Endpoint(vios, UnixAddress(f"/{vios}"), disk),)))

    def plain(self) -> MultipathVolume:
        """Return a volume of one replica on disk1, not open, and make the mirror one that has none yet."""
        plain = MultipathVolume(
            "vm1",
            SIZE,
            self.volume.ownership,
            [Endpoint("vios1", UnixAddress("/vios1"), "disk1")],
            connector=self.connect,
            events=self.events,
            device="disk1",
            device_name="disk1",
            path_timeout_seconds=1.0,
        )
        self.volume = MirrorVolume(
            "vm1",
            SIZE,
            self.volume.ownership,
            [],
            connector=self.connect,
            events=self.events,
            store=self.store,
            path_timeout_seconds=1.0,
        )
        return plain

    def health(self) -> dict[str, str]:
        """Return what each replica is good for."""
        return {status.device: status.health.value for status in self.volume.replica_status()}

    def dirty(self, disk: str) -> int:
        """Return how many pages a replica has missed."""
        return next(s.dirty_pages for s in self.volume.replica_status() if s.device == disk)

    def page(self, disk: str, page: int) -> int:
        """Return the first byte of a page on a disk."""
        return self.disks[disk].content[page * PAGE]

    def restart(self, vios: str) -> None:
        """Start a killed VIOS again."""
        self.vioses[vios].up = True

    async def until(self, condition: Callable[[], bool], seconds: float = 20.0) -> None:
        """Let simulated time pass until a condition holds."""
        end = asyncio.get_running_loop().time() + seconds
        while not condition():
            assert asyncio.get_running_loop().time() < end, "the condition never held"
            await asyncio.sleep(0.005)

    async def in_sync(self) -> None:
        """Wait until every replica is, in the definition too."""
        await self.until(lambda: set(self.events.stored.values()) == {IN_SYNC})
        await self.until(lambda: set(self.health().values()) == {"in_sync"})

    def write(self, page: int, fill: int) -> list[int]:
        """Start a page-out and return the list that its error will be put into."""
        result: list[int] = []
        self.volume.write(page * PAGE, memoryview(bytes([fill]) * PAGE), result.append)
        return result

    async def written(self, page: int, fill: int) -> None:
        """Write a page out."""
        result = self.write(page, fill)
        await self.until(lambda: result == [0])

    def read(self, page: int) -> list[int]:
        """Start a page-in and return the list that the page's first byte will be put into."""
        result: list[int] = []

        def done(error: int, payload: memoryview | None) -> None:
            assert error == 0
            assert payload is not None
            result.append(payload[0])

        self.volume.read(page * PAGE, PAGE, done)
        return result

    async def has_read(self, page: int, fill: int) -> None:
        """Read a page in, which holds `fill`."""
        read = self.read(page)
        await self.until(lambda: read == [fill])
