"""The first claim and the abstract of US 8,099,522 B2, clause by clause, on real processes.

One set runs for all: two VIOS that reach a common device, of which one reaches a device of its own too,
a hypervisor, and a client whose memory is paged to a quarter of its size.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import sqlite3
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import pytest_asyncio

from farpage.address import parse_address
from farpage.api.client import ControlClient
from farpage.blockio import Feature, read_bytes
from farpage.definition import rules
from farpage.definition.document import canonical_json
from farpage.definition.model import (
    PAGE_BYTES,
    Definition,
    PagingCommand,
    Redundancy,
    Replica,
    ReplicaState,
    ViosRecord,
    ViosRedundancy,
)
from farpage.definition.placement import NEEDED_COMMANDS
from farpage.device.label import read_label
from farpage.hypervisor.model import ClientCreate
from farpage.nbd.client import Connection
from farpage.nbd.errors import ServerRefused
from farpage.vios.model import DeviceAdd, VolumeCreate, VolumeInfo
from farpage.volume.resolve import Direct, Indirect, Unreachable, Viewpoint, resolve
from tests.support.paged_set import PagedSet, paged_region, running_set
from tests.support.region_client import expected_words
from tests.support.scrape import Scrape
from tests.support.volumes import extents, flush, trim, write, zero

pytestmark = pytest.mark.asyncio(loop_scope="module")

PAGES = 2048
LIMIT_BYTES = PAGES * PAGE_BYTES // 4
OWN_BYTES = 64 << 20


@dataclass
class Claims:
    """The set, its client, and the folders of its two devices."""

    paged: PagedSet
    common: Path
    own: Path

    def control(self, vios: str) -> ControlClient:
        return ControlClient(self.paged.embedded.document.vioses[vios].control)

    async def definition(self) -> Definition:
        return await self.paged.embedded.vioses["vios1"].definition()

    async def device(self, folder: Path) -> str:
        """Return a device's identifier in the definition, by how its VIOS reach it."""
        for identifier, record in (await self.definition()).devices.items():
            if str(folder) in record.reached_by[0].spec:
                return identifier
        raise AssertionError(f"{folder} is no device of the definition")

    async def store(self, definition: Definition) -> None:
        """Store a definition in every VIOS, as a hypervisor does."""
        for name in self.paged.embedded.vioses:
            async with self.control(name) as vios:
                current = await vios.get("/v1/definition", Definition)
                params = {"expected_revision": current.revision}
                await vios.put("/v1/definition", definition, Definition, params=params)

    async def create_volume(self, vios: str, name: str, device: str, size_bytes: int) -> VolumeInfo:
        async with self.control(vios) as client:
            wanted = VolumeCreate(name=name, device=device, size_bytes=size_bytes)
            return await client.post("/v1/volumes", wanted, VolumeInfo)

    async def delete_volume(self, vios: str, name: str) -> None:
        async with self.control(vios) as client:
            await client.delete(f"/v1/volumes/{name}")

    async def connect(self, vios: str, export: str) -> Connection:
        data = self.paged.embedded.document.vioses[vios].data[0]
        return await Connection.open(parse_address(data), export)

    async def scrape(self, vios: str) -> Scrape:
        return await Scrape.of(self.paged.embedded.document.vioses[vios].control)

    async def paged_out(self) -> None:
        """Give every page a new version and wait until the client is within its limit."""
        await self.paged.write_all()
        await self.paged.until(lambda info: info.resident_bytes <= LIMIT_BYTES, "within the limit")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def claims() -> AsyncIterator[Claims]:
    async with running_set(workers=1) as embedded:
        own = embedded.layout.root / "own"
        spec = f"dir:{own}?size={OWN_BYTES}"
        await embedded.vioses["vios1"].add_device(DeviceAdd(spec=spec))
        await embedded.hypervisor.refresh_devices()
        async with paged_region(embedded, PAGES, LIMIT_BYTES) as paged:
            yield Claims(paged, embedded.layout.common_device, own)


def with_commands(definition: Definition, device: str, commands: tuple[PagingCommand, ...]) -> Definition:
    """Configure the commands that the VIOS accept for a device."""
    record = definition.devices[device].model_copy(update={"commands": commands})
    return rules.next_revision(definition, devices={**definition.devices, device: record})


async def test_c1_identify(claims: Claims) -> None:
    """Two devices are identified for the client; each can hold its volume and is within its reach."""
    definition = await claims.definition()
    client = rules.client_of(definition, "client")
    reached = {vios.name for vios in await claims.paged.embedded.hypervisor.vioses() if vios.reachable}
    assert len(definition.devices) >= 2
    for identifier, device in definition.devices.items():
        assert set(device.commands) >= NEEDED_COMMANDS
        for reach in device.reached_by:
            assert reach.vios in reached
            made = await claims.create_volume(reach.vios, "held", identifier, client.memory_bytes)
            assert (made.device, made.size_bytes) == (identifier, client.memory_bytes)
            await claims.delete_volume(reach.vios, "held")
    common, own = [definition.devices[await claims.device(path)] for path in (claims.common, claims.own)]
    assert (common.is_common, own.is_common) == (True, False)


async def test_c2_define(claims: Claims) -> None:
    """The definition made of the devices and the client lies in both VIOS, the same byte for byte."""
    definition = await claims.definition()
    await claims.paged.until_stored(definition)
    answered: set[bytes] = set()
    stored: set[str] = set()
    for name in claims.paged.embedded.vioses:
        async with claims.control(name) as vios:
            answered.add(await vios.request("GET", "/v1/definition"))
        database = claims.paged.embedded.layout.vios_dir(name) / "vios.db"
        with sqlite3.connect(f"file:{database}?mode=ro", uri=True) as connection:
            query = "SELECT document FROM definitions ORDER BY number DESC LIMIT 1"
            stored.add(connection.execute(query).fetchone()[0])
        connection.close()
    assert len(claims.paged.embedded.vioses) >= 2
    assert stored == {canonical_json(definition)}
    assert answered == {canonical_json(definition).encode()}
    document = json.loads(stored.pop())
    assert set(document["devices"]) == {await claims.device(claims.common), await claims.device(claims.own)}
    assert document["clients"]["client"]["volumes"][0]["replicas"][0]["device"] in document["devices"]


async def test_c3_command(claims: Claims) -> None:
    """Commands go through the first VIOS, and those that the definition does not name are refused."""
    first = await claims.paged.active()
    (second,) = set(claims.paged.embedded.vioses) - {first}
    loop = asyncio.get_running_loop()
    began = loop.time()
    before = [await claims.scrape(vios) for vios in (first, second)]
    await claims.paged_out()
    await claims.paged.verify_all()
    after = [await claims.scrape(vios) for vios in (first, second)]
    # The standby path is probed with a read, once a second.
    probes = 1 + int(loop.time() - began)
    for metric, most in (("farpage_volume_reads_total", probes), ("farpage_volume_writes_total", 0)):
        through_first, through_second = (
            now.value(metric, volume="client") - then.value(metric, volume="client")
            for then, now in zip(before, after, strict=True)
        )
        assert through_first > 10 * probes
        assert through_second <= most

    own, definition = await claims.device(claims.own), await claims.definition()
    allowed = definition.devices[own].commands
    fewer = tuple(set(allowed) - {PagingCommand.DISCARD, PagingCommand.ZERO, PagingCommand.FLUSH})
    await claims.create_volume("vios1", "restricted", own, 1 << 20)
    await claims.store(restricted := with_commands(definition, own, fewer))
    connection = await claims.connect("vios1", "restricted@1")
    assert not connection.features & (Feature.TRIM | Feature.ZERO | Feature.FLUSH)
    assert await write(connection, 0, b"a" * PAGE_BYTES) == 0
    assert await trim(connection, 0, PAGE_BYTES) == errno.ENOTSUP
    assert await zero(connection, 0, PAGE_BYTES) == errno.ENOTSUP
    assert await read_bytes(connection, 0, PAGE_BYTES) == b"a" * PAGE_BYTES
    await connection.close()
    await claims.store(shut := with_commands(restricted, own, (PagingCommand.PAGE_IN,)))
    with pytest.raises(ServerRefused, match="not configured"):
        await claims.connect("vios1", "restricted@1")
    with pytest.raises(ServerRefused, match="another owner has it at epoch"):
        await claims.connect(first, "client@1")
    await claims.store(with_commands(shut, own, allowed))
    await claims.delete_volume("vios1", "restricted")
    await claims.paged.verify_all()


async def test_c4_move(claims: Claims) -> None:
    """Pages move from the client to their place on the device, where anyone can read them, and back."""
    await claims.paged.client.do(f"write 0 {PAGES}")
    info = await claims.paged.until(
        lambda info: info.resident_bytes <= LIMIT_BYTES and info.on_device_bytes > 0, "within the limit"
    )
    file = claims.common / "volumes" / "client"
    assert file.stat().st_size == PAGES * PAGE_BYTES
    descriptor = os.open(file, os.O_RDONLY)
    content = np.frombuffer(os.pread(descriptor, PAGES * PAGE_BYTES, 0), np.uint64).reshape(PAGES, -1)
    os.close(descriptor)
    # The version that the client wrote last: the highest for which any page on the device is right.
    version = max(
        number
        for number in range(1, 100)
        if (content == expected_words(0, np.full(PAGES, number, np.uint64))).all(axis=1).any()
    )
    moved = (content == expected_words(0, np.full(PAGES, version, np.uint64))).all(axis=1)
    assert int(moved.sum()) >= info.on_device_bytes // PAGE_BYTES >= PAGES - LIMIT_BYTES // PAGE_BYTES
    before = info.counters.page_in_pages
    await claims.paged.verify_all()
    assert (await claims.paged.info()).counters.page_in_pages - before >= info.on_device_bytes // PAGE_BYTES


async def test_c5_decide(claims: Claims) -> None:
    """Whether the client has direct access is read from the definition, and the client's paths are those."""
    definition, common = await claims.definition(), await claims.device(claims.common)
    reached = set(claims.paged.embedded.vioses)
    access = resolve(definition, "client", common, Viewpoint(reached))
    assert isinstance(access, Direct)
    assert {path.vios for path in access.paths} == {path.vios for path in (await claims.paged.info()).paths}
    assert {path.volume for path in access.paths} == {"client"}
    own = resolve(definition, "client", await claims.device(claims.own), Viewpoint(reached))
    assert isinstance(own, Direct)
    assert own.source == common
    assert not isinstance(resolve(definition, "client", common, Viewpoint({"vios3"})), Direct)


async def test_c6_locate(claims: Claims) -> None:
    """Without direct access the second device is located that holds the volume in sync, and its VIOS."""
    definition, own = await claims.definition(), await claims.device(claims.own)
    view = Viewpoint(set(claims.paged.embedded.vioses))

    # A volume behind a VIOS that the hypervisor does not reach.
    far = "11111111-2222-4333-8444-555555555555"
    found = rules.FoundDevice(far, "far", "dir", "dir:/far", 1 << 30, tuple(PagingCommand))
    record = ViosRecord(control="tcp:far:7001", data=("tcp:far:7002",))
    definition = rules.register_vios(definition, "vios3", record, [found])

    def with_replica(state: ReplicaState) -> Definition:
        client = definition.clients["client"]
        volume = client.volumes[0].model_copy(update={"replicas": (Replica(device=far, state=state),)})
        clients = {**definition.clients, "client": client.model_copy(update={"volumes": (volume,)})}
        return rules.next_revision(definition, clients=clients)

    access = resolve(with_replica(ReplicaState.IN_SYNC), "client", own, view)
    assert isinstance(access, Indirect)
    assert (access.first_device, access.second_device, access.second_vios) == (own, far, "vios3")
    assert access.first_vios in view.reached_vioses
    assert access.standing.vioses == (access.first_vios,)
    assert isinstance(resolve(with_replica(ReplicaState.STALE), "client", own, view), Unreachable)


async def test_a1_identifier(claims: Claims) -> None:
    """Each device has an identifier, the same on its label, and the commands that its VIOS accept."""
    definition = await claims.definition()
    for folder in (claims.common, claims.own):
        label = read_label(folder)
        assert label is not None
        device = definition.devices[label.uuid]
        for reach in device.reached_by:
            async with claims.control(reach.vios) as vios:
                (described,) = [
                    info
                    for info in json.loads(await vios.request("GET", "/v1/devices"))
                    if info["id"] == label.uuid
                ]
            assert tuple(described["commands"]) == device.commands
    own = await claims.device(claims.own)
    assert own != await claims.device(claims.common)
    fewer = tuple(command for command in definition.devices[own].commands if command != PagingCommand.DISCARD)
    await claims.store(configured := with_commands(definition, own, fewer))
    (described,) = [info for info in await claims.paged.embedded.vioses["vios1"].devices() if info.id == own]
    assert described.commands == fewer
    await claims.store(with_commands(configured, own, definition.devices[own].commands))


async def test_a2_convert(claims: Claims) -> None:
    """Each NBD command that the VIOS gets becomes the device's own: here of the volume's file."""
    own = await claims.device(claims.own)
    await claims.create_volume("vios1", "converted", own, 1 << 20)
    file = claims.own / "volumes" / "converted"
    connection = await claims.connect("vios1", "converted@1")

    async def counted() -> tuple[float, ...]:
        scrape = await claims.scrape("vios1")
        return tuple(
            scrape.value(f"farpage_volume_{what}_total", volume="converted")
            for what in ("writes", "written_bytes", "reads", "read_bytes", "others", "errors")
        )

    content = os.urandom(4 * PAGE_BYTES)
    assert await write(connection, 8 * PAGE_BYTES, content) == 0
    assert await flush(connection) == 0
    assert await counted() == (1, len(content), 0, 0, 1, 0)
    assert file.read_bytes()[8 * PAGE_BYTES : 12 * PAGE_BYTES] == content
    assert file.stat().st_blocks * 512 == len(content)

    replaced = os.urandom(PAGE_BYTES)
    descriptor = os.open(file, os.O_WRONLY | os.O_DSYNC)
    os.pwrite(descriptor, replaced, 8 * PAGE_BYTES)
    os.close(descriptor)
    assert await read_bytes(connection, 8 * PAGE_BYTES, PAGE_BYTES) == replaced
    assert await counted() == (1, len(content), 1, PAGE_BYTES, 1, 0)

    assert await trim(connection, 8 * PAGE_BYTES, PAGE_BYTES) == 0
    assert await zero(connection, 9 * PAGE_BYTES, PAGE_BYTES) == 0
    error, map_of_volume = await extents(connection, 0, 1 << 20)
    assert (error, await counted()) == (0, (1, len(content), 1, PAGE_BYTES, 4, 0))
    assert file.read_bytes()[8 * PAGE_BYTES : 10 * PAGE_BYTES] == bytes(2 * PAGE_BYTES)
    descriptor = os.open(file, os.O_RDONLY)
    first_data = os.lseek(descriptor, 0, os.SEEK_DATA)
    os.close(descriptor)
    assert first_data == 10 * PAGE_BYTES
    assert map_of_volume is not None
    assert map_of_volume[0].length == first_data
    await connection.close()
    await claims.delete_volume("vios1", "converted")


async def test_a3_assist(claims: Claims) -> None:
    """The hypervisor sets up what a client needs: volume, definition, epoch, open exports on both VIOS."""
    hypervisor = claims.paged.embedded.hypervisor
    await hypervisor.create_client(
        ClientCreate(
            name="small",
            memory_bytes=1 << 20,
            redundancy=Redundancy.NONE,
            vios_redundancy=ViosRedundancy.NONE,
        )
    )
    assert (claims.own / "volumes" / "small").stat().st_size == 1 << 20
    await hypervisor.delete_client("small")
    assert not (claims.own / "volumes" / "small").exists()

    await claims.paged.until(
        lambda info: sorted(path.state for path in info.paths) == ["active", "standby"], "two paths"
    )
    definition = await claims.definition()
    info = await claims.paged.info()
    assert info.epoch == definition.clients["client"].epoch
    for vios in claims.paged.embedded.vioses.values():
        (volume,) = [volume for volume in await vios.volumes() if volume.name == "client"]
        assert volume.epoch == info.epoch
        assert volume.size_bytes == info.memory_bytes
    first = claims.paged.embedded.vioses[await claims.paged.active()]
    (volume,) = [volume for volume in await first.volumes() if volume.name == "client"]
    assert volume.open_connections >= 1
