"""The hosts and processes of the claim.

    host h              host v1                 host i                  host v2
    hypervisor "h"  --  VIOS "vios1"        --  intermediate client --  VIOS "vios2"
    the client          device first                                    device second, where the data is
                        device common  . . . . . . . . . . . . . . . .  device common, hypervisor "a"

Links are drawn as dashes: h reaches v1 alone. As long as the client is on v2, where hypervisor "a" runs,
there is a link between v1 and v2 as well; it is taken away before the client comes to h. Everything between
hosts goes over TCP: pages by NBD, control with mutual TLS. The test itself asks daemons at UNIX sockets.
"""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import trustme

from farpage.address import parse_address
from farpage.api.client import ControlClient
from farpage.definition.model import Definition
from farpage.embedded.control import HypervisorControl, ViosControl
from farpage.embedded.layout import SetDocument, SetHypervisor, SetVios, StateLayout
from farpage.errors import FarpageError
from farpage.hypervisor.model import ClientInfo, PoolSet
from farpage.nbd.client import Connection
from farpage.vios.model import CopyStatus, VolumeCreate, VolumeInfo
from tests.support.certificates import certificate_folder
from tests.support.hosts import FarpageProcess, Host, Hosts, hosts
from tests.support.paged_set import RegionProcess, path_in, until_client
from tests.support.scrape import Scrape

CONTROL_PORT, DATA_PORT, RELAY_PORT = 7010, 10809, 10810
HOSTS = ("h", "v1", "i", "v2")
LINKS = (("h", "v1"), ("v1", "i"), ("i", "v2"))
PLACES = {"vios1": "v1", "vios2": "v2"}
"""Host of each VIOS."""
DEVICES = {
    "vios1": {"first": 96 << 20, "common": 24 << 20},
    "vios2": {"second": 48 << 20, "common": 24 << 20},
}
"""Sizes of the devices that a VIOS reaches. A client goes to the common one if it fits, else to the smallest
with room."""
DEADLINE_SECONDS = 60.0


@dataclass
class Paged:
    """A client: the process with the memory, and the hypervisor that pages it."""

    name: str
    hypervisor: HypervisorControl
    process: RegionProcess
    pages: int

    async def info(self) -> ClientInfo:
        return await self.hypervisor.client(self.name)

    async def until(self, condition: Callable[[ClientInfo], bool], what: str) -> ClientInfo:
        """Wait until the client, as its hypervisor describes it, fulfils a condition."""
        return await until_client(self.hypervisor, self.name, condition, what)

    async def active(self) -> str:
        """Return the VIOS of the active path."""
        info = await self.until(lambda info: path_in(info, "active") is not None, "any path active")
        path = path_in(info, "active")
        assert path is not None
        return path.vios

    async def set_limit(self, limit_bytes: int) -> None:
        """Change how much of it may be in memory."""
        await self.hypervisor.set_pool(PoolSet(client=self.name, limit_bytes=limit_bytes))

    async def write_all(self) -> None:
        """Give every page a new version."""
        assert await self.process.do(f"write 0 {self.pages}") == "done"

    async def verify_all(self) -> None:
        """Compare every byte."""
        assert await self.process.do(f"verify 0 {self.pages}") == "wrong 0"


@dataclass
class Scene:
    """The hosts and what runs on them."""

    root: Path
    hosts: Hosts
    processes: dict[str, FarpageProcess] = field(default_factory=dict)
    vioses: dict[str, ViosControl] = field(default_factory=dict)
    hypervisors: dict[str, HypervisorControl] = field(default_factory=dict)

    # Processes

    def host_of(self, vios: str) -> Host:
        return self.hosts[PLACES[vios]]

    def start(self, host: str, name: str, *arguments: str) -> FarpageProcess:
        """Start a farpage command on a host, with the host's certificates."""
        line = [*arguments, "--tls", str(self.root / "tls" / host)]
        process = FarpageProcess(self.hosts[host], name, self.root / f"{name}.log", line)
        self.processes[name] = process
        return process

    async def start_vios(self, name: str) -> None:
        host = self.host_of(name)
        folder = self.root / name
        devices = [
            word
            for device, size_bytes in DEVICES[name].items()
            for word in ("--device", f"dir:{self.folder(device)}?size={size_bytes}")
        ]
        process = self.start(
            *(host.name, name, "vios", "run", name, "--dir", str(folder), *devices),
            *("--control", host.tcp(CONTROL_PORT), "--data", host.tcp(DATA_PORT)),
        )
        await process.until_said('"ready"')
        self.vioses[name] = ViosControl(f"unix:{folder}/control.sock", name)

    async def start_hypervisor(self, name: str, host: str, vioses: tuple[str, ...]) -> HypervisorControl:
        layout = self.state(name)
        layout.create_root()
        document = SetDocument(
            hypervisor=SetHypervisor(
                name=name,
                control=f"unix:{layout.hypervisor_dir}/control.sock",
                attach=f"unix:{layout.hypervisor_dir}/attach.sock",
            ),
            vioses={
                vios: SetVios(
                    control=self.host_of(vios).tcp(CONTROL_PORT), data=(self.host_of(vios).tcp(DATA_PORT),)
                )
                for vios in vioses
            },
            tls=self.root / "tls" / host,
        )
        layout.create(document)
        named = [word for vios in vioses for word in ("--vios", f"{vios}={document.vios(vios).control}")]
        process = self.start(
            *(host, name, "hypervisor", "run", name, "--dir", str(layout.hypervisor_dir), "--workers", "1"),
            *named,
        )
        control = HypervisorControl(document.hypervisor.control)
        await process.until_said("hypervisor_ready")
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not await self._recorded(control, vioses):
                await asyncio.sleep(0.05)
        self.hypervisors[name] = control
        return control

    @staticmethod
    async def _recorded(control: HypervisorControl, vioses: tuple[str, ...]) -> bool:
        """Tell whether a hypervisor reaches some VIOS and has recorded their devices."""
        try:
            if not all(vios.reachable for vios in await control.vioses()):
                return False
            names = {record.name for record in (await control.definition()).devices.values()}
        except FarpageError:
            return False
        return names >= {device for vios in vioses for device in DEVICES[vios]}

    async def stop_hypervisor(self, name: str) -> None:
        """End a hypervisor in order."""
        await self.hypervisors.pop(name).close()
        assert await self.processes.pop(name).stop() == 0

    async def region(
        self, hypervisor: str, host: str, name: str, pages: int, *, limit_bytes: int, version: int = 0
    ) -> Paged:
        """Start a process whose region a hypervisor pages, on the host of that hypervisor."""
        process = await RegionProcess.start(
            self.state(hypervisor).root, pages, limit_bytes, name, version, launcher=self.hosts[host].launcher
        )
        return Paged(name, self.hypervisors[hypervisor], process, pages)

    def close(self) -> None:
        """Let no process stay behind."""
        for process in reversed(self.processes.values()):
            process.kill()

    # Places

    def state(self, hypervisor: str) -> StateLayout:
        return StateLayout.at(self.root / hypervisor)

    def folder(self, device: str) -> Path:
        """Return where a device is; the test looks into it directly."""
        return self.root / "devices" / device

    def file(self, device: str, volume: str) -> Path:
        return self.folder(device) / "volumes" / volume

    # Through the VIOS

    @asynccontextmanager
    async def control(self, vios: str) -> AsyncIterator[ControlClient]:
        async with ControlClient(f"unix:{self.root}/{vios}/control.sock", who=f"VIOS {vios}") as client:
            yield client

    async def definition(self, vios: str = "vios1") -> Definition:
        return await self.vioses[vios].definition()

    async def device(self, name: str) -> str:
        """Return a device's identifier in the definition, by its name."""
        for identifier, record in (await self.definition()).devices.items():
            if record.name == name:
                return identifier
        raise AssertionError(f"{name} is no device of the definition")

    async def store(self, definition: Definition) -> None:
        """Store a definition in every VIOS, as a hypervisor does."""
        for name in self.vioses:
            async with self.control(name) as vios:
                current = await vios.get("/v1/definition", Definition)
                params = {"expected_revision": current.revision}
                await vios.put("/v1/definition", definition, Definition, params=params)

    async def until_stored(self, definition: Definition) -> None:
        """Wait until every VIOS stores a definition."""
        async with asyncio.timeout(DEADLINE_SECONDS):
            for vios in self.vioses.values():
                while await vios.definition() != definition:
                    await asyncio.sleep(0.05)

    async def create_volume(self, vios: str, name: str, device: str, size_bytes: int) -> VolumeInfo:
        async with self.control(vios) as client:
            wanted = VolumeCreate(name=name, device=device, size_bytes=size_bytes)
            return await client.post("/v1/volumes", wanted, VolumeInfo)

    async def delete_volume(self, vios: str, name: str) -> None:
        async with self.control(vios) as client:
            await client.delete(f"/v1/volumes/{name}")

    async def volume(self, vios: str, name: str) -> VolumeInfo:
        """Return a volume as a VIOS describes it."""
        (found,) = [volume for volume in await self.vioses[vios].volumes() if volume.name == name]
        return found

    async def copy(self, name: str, device: str) -> CopyStatus:
        """Return how far a volume is that is copied to a device of the first VIOS."""
        async with self.control("vios1") as client:
            return await client.get(f"/v1/volumes/{name}/copy", CopyStatus, params={"device": device})

    async def reads_of(self, vios: str, volume: str) -> float:
        """Return how many reads of a volume a VIOS has carried out."""
        return (await self.scrape(vios)).value("farpage_volume_reads_total", volume=volume)

    async def used_bytes(self, vios: str, device: str) -> int:
        """Return how much of a device is in use."""
        (found,) = [info for info in await self.vioses[vios].devices() if info.id == device]
        assert found.used_bytes is not None
        return found.used_bytes

    async def connect(self, vios: str, export: str) -> Connection:
        """Open an export on the VIOS's own host."""
        host = self.host_of(vios)
        with host.entered():
            return await Connection.open(parse_address(host.tcp(DATA_PORT)), export)

    async def scrape(self, vios: str) -> Scrape:
        return await Scrape.of(f"unix:{self.root}/{vios}/control.sock")


@asynccontextmanager
async def scene() -> AsyncIterator[Scene]:
    """Run the two VIOS, and hypervisor "a" beside the second one."""
    root = Path(tempfile.mkdtemp(prefix="fpcl-", dir="/tmp"))
    try:
        with hosts(HOSTS, (*LINKS, ("v1", "v2"))) as made:
            authority = trustme.CA()
            for name in HOSTS:
                certificate_folder(root / "tls" / name, authority, made[name].address)
            (root / "devices").mkdir()
            running = Scene(root, made)
            try:
                await asyncio.gather(*map(running.start_vios, PLACES))
                await running.start_hypervisor("a", "v2", tuple(PLACES))
                yield running
            finally:
                running.close()
                for control in (*running.vioses.values(), *running.hypervisors.values()):
                    await control.close()
    finally:
        shutil.rmtree(root)
