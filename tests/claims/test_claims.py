"""The first claim and the abstract of US 8,099,522 B2, clause by clause, on real processes.

The steps are one story and run in this order. Its hosts are those of `tests.claims.scene`. Two clients run
beside hypervisor "a": `pair`, whose volume is on the common device, shows what needs two VIOS in front of one
device; `client` has its volume on the second device. It is released there, and its hypervisor from then on is
"h", which reaches the first VIOS alone.
"""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shlex
import signal
import socket
import sqlite3
import struct
import subprocess
from collections.abc import AsyncIterator, Callable
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pytest
import pytest_asyncio

from farpage.api.remote import RemoteError
from farpage.blockio import Feature, read_bytes
from farpage.definition import rules
from farpage.definition.document import canonical_json
from farpage.definition.model import (
    PAGE_BYTES,
    Access,
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
from farpage.embedded.control import HypervisorControl
from farpage.hypervisor.model import Attachment, ClientAdopt, ClientCreate, ClientRelease
from farpage.hypervisor.movement import MoveAdjust, MoveStage
from farpage.hypervisor.ways import Way
from farpage.nbd.errors import ServerRefused
from farpage.vios.model import CopyStatus
from farpage.volume.resolve import Direct, Indirect, Place, Unreachable, Viewpoint, resolve
from tests.claims.conftest import Evidence
from tests.claims.scene import CONTROL_PORT, DATA_PORT, DEADLINE_SECONDS, RELAY_PORT, Paged, Scene, scene
from tests.support.hosts import FarpageProcess
from tests.support.region_client import expected_words
from tests.support.volumes import extents, flush, trim, write, zero

Versions: TypeAlias = np.ndarray[tuple[int, ...], np.dtype[np.uint64]]

pytestmark = pytest.mark.asyncio(loop_scope="module")

PAIR_PAGES = 2048
PAIR_LIMIT_BYTES = PAIR_PAGES * PAGE_BYTES // 4
PAGES = 8192
LIMIT_BYTES = PAGES * PAGE_BYTES // 4
SMALL_LIMIT_BYTES = 1 << 20
PART = PAGES // 4
COPY_BYTES = 1 << 20
"""Copied a second while the steps look at it."""
ESTABLISHED = "01"
"""TCP_ESTABLISHED of linux/tcp_states.h, as /proc has it."""
REACHED_BY_H = "vios1 alone"


@dataclass
class Claim:
    """The scene and its clients."""

    scene: Scene
    pair: Paged
    client: Paged
    version: int = 0
    """Of every page of the client, until it gives some a new one on host h."""
    versions: Versions = field(default_factory=lambda: np.zeros(0, np.uint64))
    """Of each page, from then on."""
    in_memory: list[int] = field(default_factory=list)
    """Pages whose latest version has not been paged out."""
    intermediary: FarpageProcess | None = None

    async def definition(self) -> Definition:
        return await self.scene.definition()

    @staticmethod
    def replicas(definition: Definition) -> tuple[Replica, ...]:
        return definition.clients["client"].volumes[0].replicas


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def claim() -> AsyncIterator[Claim]:
    async with scene() as made:
        pair = await made.region("a", "v2", "pair", PAIR_PAGES, limit_bytes=PAIR_LIMIT_BYTES)
        client = await made.region("a", "v2", "client", PAGES, limit_bytes=LIMIT_BYTES)
        await client.write_all()
        claim = Claim(made, pair, client, version=1)
        try:
            yield claim
        finally:
            for paged in (claim.pair, claim.client):
                await paged.process.stop()


def with_commands(definition: Definition, device: str, commands: tuple[PagingCommand, ...]) -> Definition:
    """Configure the commands that the VIOS accept for a device."""
    record = definition.devices[device].model_copy(update={"commands": commands})
    return rules.next_revision(definition, devices={**definition.devices, device: record})


def with_replicas(definition: Definition, client: str, *replicas: Replica) -> Definition:
    """Say where a client's volume is."""
    record = definition.clients[client]
    volumes = (record.volumes[0].model_copy(update={"replicas": replicas}),)
    clients = {**definition.clients, client: record.model_copy(update={"volumes": volumes})}
    return rules.next_revision(definition, clients=clients)


def differing(content: Versions, versions: Versions) -> list[int]:
    """Return the pages that do not have the content of their version."""
    return [int(page) for page in np.flatnonzero((content != expected_words(0, versions)).any(axis=1))]


def words_of(file: Path, pages: int) -> Versions:
    """Read a volume from the device's file, past every process: a row of words for each page."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        return np.frombuffer(os.pread(descriptor, pages * PAGE_BYTES, 0), np.uint64).reshape(pages, -1)
    finally:
        os.close(descriptor)


async def hand_over(claim: Claim) -> None:
    """Release the client at "a", end "a" and its link to the first VIOS, and adopt the client at "h"."""
    scene, hypervisor = claim.scene, claim.scene.hypervisors["a"]
    assert await claim.pair.process.do("close") == "done"
    await claim.pair.process.stop()
    claim.client.process.process.send_signal(signal.SIGSTOP)
    released = await hypervisor.release("client", ClientRelease())
    assert released.attachment is Attachment.NONE
    await claim.client.process.stop()
    content = words_of(scene.file("second", "client"), PAGES)
    assert differing(content, np.full(PAGES, claim.version, np.uint64)) == []
    await scene.until_stored(await hypervisor.definition())
    await scene.stop_hypervisor("a")
    scene.hosts.unlink("v1", "v2")
    await scene.start_hypervisor("h", "h", ("vios1",))


def assert_h_reaches_the_first_vios_alone(scene: Scene, *, relay_listens: bool = False) -> None:
    """Connect from host to host: the client's host to the first VIOS, and nowhere else."""
    h, v1, i, v2 = (scene.hosts[name] for name in ("h", "v1", "i", "v2"))
    with ExitStack() as stack:
        if not relay_listens:
            with i.entered():
                stack.enter_context(socket.create_server((i.address, RELAY_PORT)))
        for port in (CONTROL_PORT, DATA_PORT):
            assert h.connect(v1, port) == ""
            assert h.connect(v2, port) == "ENETUNREACH"
            assert v1.connect(v2, port) == "ENETUNREACH"
            assert (i.connect(v1, port), i.connect(v2, port)) == ("", "")
        assert h.connect(i, RELAY_PORT) == "ENETUNREACH"
        assert v1.connect(i, RELAY_PORT) == ""


async def until_wanted(hypervisor: HypervisorControl) -> list[str]:
    """Wait until the hypervisor asks for an intermediate client, and return the command that it gives."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not (wanted := [a for a in await hypervisor.alarms() if a.kind == "intermediary_wanted"]):
            await asyncio.sleep(0.05)
    command = shlex.split(wanted[0].message.partition(": farpage ")[2])
    assert command[:3] == ["intermediary", "run", "client"]
    return command


def start_intermediary(scene: Scene, command: list[str]) -> FarpageProcess:
    """Start it on host i: with the certificates of that host, and a relay where the first VIOS reaches it."""
    tls = command.index("--tls")
    del command[tls : tls + 2]
    command[command.index("--listen") + 1] = scene.hosts["i"].tcp(RELAY_PORT)
    return scene.start("i", "intermediary", *command)


async def until_handed_over(scene: Scene, device: str) -> None:
    """Wait until the first VIOS has the page table of the client, which was stored at the second one."""
    async with asyncio.timeout(DEADLINE_SECONDS), scene.control("vios1") as vios:
        while True:
            try:
                await vios.request("GET", "/v1/volumes/client/handover", params={"device": device})
            except RemoteError:
                await asyncio.sleep(0.05)
            else:
                return


def peers(scene: Scene, host: str, port: int) -> set[str]:
    """Return the addresses that have connections to a port of a host (proc_pid_net(5), tcp)."""
    with scene.hosts[host].entered():
        lines = Path("/proc/thread-self/net/tcp").read_text().splitlines()[1:]
    found = set()
    for line in lines:
        _, local, remote, state, *_ = line.split()
        if int(local.partition(":")[2], 16) == port and state == ESTABLISHED:
            found.add(socket.inet_ntoa(struct.pack("=I", int(remote.partition(":")[0], 16))))
    return found


async def until_copy(scene: Scene, device: str, condition: Callable[[CopyStatus], bool]) -> CopyStatus:
    """Wait until the copy at the first VIOS fulfils a condition."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not condition(copy := await scene.copy("client", device)):
            await asyncio.sleep(0.05)
    return copy


async def test_c1_identify(claim: Claim, evidence: Evidence) -> None:
    """Two devices are identified for the client; each can hold its volume and is within its reach."""
    scene, definition = claim.scene, await claim.definition()
    reached = {vios.name for vios in await scene.hypervisors["a"].vioses() if vios.reachable}
    assert len(definition.devices) >= 2
    holding: dict[str, set[str]] = {"pair": set(), "client": set()}
    for client, held in holding.items():
        record = rules.client_of(definition, client)
        own = {replica.device for replica in record.volumes[0].replicas}
        for identifier, device in definition.devices.items():
            assert set(device.commands) >= NEEDED_COMMANDS
            assert {reach.vios for reach in device.reached_by} <= reached
            if device.size_bytes < record.memory_bytes:
                continue
            for reach in device.reached_by:
                if identifier in own:
                    found = await scene.volume(reach.vios, client)
                else:
                    found = await scene.create_volume(reach.vios, "held", identifier, record.memory_bytes)
                    await scene.delete_volume(reach.vios, "held")
                assert (found.device, found.size_bytes) == (identifier, record.memory_bytes)
            held.add(device.name)
    assert holding == {"pair": {"first", "second", "common"}, "client": {"first", "second"}}
    devices = [definition.devices[await scene.device(name)] for name in ("common", "first", "second")]
    assert [device.is_common for device in devices] == [True, False, False]
    evidence(f"devices {', '.join(sorted(device.name for device in devices))}, reached by {sorted(reached)}")
    evidence(f"each of {sorted(holding['client'])} holds a volume of the client's {PAGES} pages")


async def test_c2_define(claim: Claim, evidence: Evidence) -> None:
    """The definition made of the devices and the client lies in both VIOS, the same byte for byte."""
    scene, definition = claim.scene, await claim.definition()
    await scene.until_stored(definition)
    answered: set[bytes] = set()
    stored: set[str] = set()
    for name in scene.vioses:
        async with scene.control(name) as vios:
            answered.add(await vios.request("GET", "/v1/definition"))
        with closing(sqlite3.connect(f"file:{scene.root}/{name}/vios.db?mode=ro", uri=True)) as database:
            query = "SELECT document FROM definitions ORDER BY number DESC LIMIT 1"
            stored.add(database.execute(query).fetchone()[0])
    assert len(scene.vioses) >= 2
    assert stored == {canonical_json(definition)}
    assert answered == {canonical_json(definition).encode()}
    document = json.loads(stored.pop())
    assert set(document["devices"]) == {await scene.device(name) for name in ("common", "first", "second")}
    for client, device in (("pair", "common"), ("client", "second")):
        (replica,) = document["clients"][client]["volumes"][0]["replicas"]
        assert (replica["device"], replica["state"]) == (await scene.device(device), "in_sync")
    evidence(f"revision {definition.revision} in the databases of {sorted(scene.vioses)}: the same bytes")


async def test_a1_identifier(claim: Claim, evidence: Evidence) -> None:
    """Each device has an identifier, the same on its label, and the commands that its VIOS accept."""
    scene, definition = claim.scene, await claim.definition()
    for name in ("common", "first", "second"):
        label = read_label(scene.folder(name))
        assert label is not None
        device = definition.devices[label.uuid]
        assert device.name == name
        for reach in device.reached_by:
            (described,) = [
                info for info in await scene.vioses[reach.vios].devices() if info.id == label.uuid
            ]
            assert described.commands == device.commands
    first = await scene.device("first")
    assert first != await scene.device("common")
    fewer = tuple(
        command for command in definition.devices[first].commands if command != PagingCommand.DISCARD
    )
    await scene.store(configured := with_commands(definition, first, fewer))
    (described,) = [info for info in await scene.vioses["vios1"].devices() if info.id == first]
    assert described.commands == fewer
    await scene.store(with_commands(configured, first, definition.devices[first].commands))
    evidence(f"first is {first}, on its label too")
    evidence("its VIOS accepts the commands that the definition lists, without discard when that goes")


async def test_c3_command(claim: Claim, evidence: Evidence) -> None:
    """Commands go through the first VIOS, and those that the definition does not name are refused."""
    scene, pair = claim.scene, claim.pair
    through = await pair.active()
    (beside,) = set(scene.vioses) - {through}
    loop = asyncio.get_running_loop()
    began = loop.time()
    before = [await scene.scrape(vios) for vios in (through, beside)]
    await pair.write_all()
    await pair.until(lambda info: info.resident_bytes <= PAIR_LIMIT_BYTES, "within the limit")
    await pair.verify_all()
    after = [await scene.scrape(vios) for vios in (through, beside)]
    # The standby path is probed with a read, once a second.
    probes = 1 + int(loop.time() - began)
    for commands, page_bytes, most in (
        ("farpage_volume_reads_total", "farpage_volume_read_bytes_total", probes),
        ("farpage_volume_writes_total", "farpage_volume_written_bytes_total", 0),
    ):
        (by_first, by_second), (first_bytes, second_bytes) = (
            [
                now.value(metric, volume="pair") - then.value(metric, volume="pair")
                for then, now in zip(before, after, strict=True)
            ]
            for metric in (commands, page_bytes)
        )
        assert by_first > most >= by_second
        assert first_bytes > 10 * probes * PAGE_BYTES
        assert second_bytes <= most * PAGE_BYTES
        evidence(f"{commands} at {through}: {by_first:.0f}, at {beside}: {by_second:.0f} (probes)")

    first, definition = await scene.device("first"), await claim.definition()
    allowed = definition.devices[first].commands
    fewer = tuple(set(allowed) - {PagingCommand.DISCARD, PagingCommand.ZERO, PagingCommand.FLUSH})
    await scene.create_volume("vios1", "restricted", first, 1 << 20)
    await scene.store(restricted := with_commands(definition, first, fewer))
    connection = await scene.connect("vios1", "restricted@1")
    assert not connection.features & (Feature.TRIM | Feature.ZERO | Feature.FLUSH)
    assert await write(connection, 0, b"a" * PAGE_BYTES) == 0
    assert await trim(connection, 0, PAGE_BYTES) == errno.ENOTSUP
    assert await zero(connection, 0, PAGE_BYTES) == errno.ENOTSUP
    assert await read_bytes(connection, 0, PAGE_BYTES) == b"a" * PAGE_BYTES
    await connection.close()
    await scene.store(shut := with_commands(restricted, first, (PagingCommand.PAGE_IN,)))
    with pytest.raises(ServerRefused, match="not configured"):
        await scene.connect("vios1", "restricted@1")
    with pytest.raises(ServerRefused, match="another owner has it at epoch"):
        await scene.connect(through, "pair@1")
    await scene.store(with_commands(shut, first, allowed))
    await scene.delete_volume("vios1", "restricted")
    await pair.verify_all()
    evidence("refused: commands that the definition does not list, and owners that it does not name")


async def test_a2_convert(claim: Claim, evidence: Evidence) -> None:
    """Each NBD command that the VIOS gets becomes the device's own: here of the volume's file."""
    scene = claim.scene
    await scene.create_volume("vios1", "converted", await scene.device("first"), 1 << 20)
    file = scene.file("first", "converted")
    connection = await scene.connect("vios1", "converted@1")

    async def counted() -> tuple[float, ...]:
        scrape = await scene.scrape("vios1")
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
    await scene.delete_volume("vios1", "converted")
    evidence(
        "NBD write, flush, read, trim, zeroes and block status: pwrite, fdatasync, pread, holes, SEEK_DATA"
    )


async def test_a3_assist(claim: Claim, evidence: Evidence) -> None:
    """The hypervisor sets up what a client needs: volume, definition, epoch, open exports on both VIOS."""
    scene, pair = claim.scene, claim.pair
    hypervisor = scene.hypervisors["a"]
    wanted = ClientCreate(
        name="small",
        memory_bytes=1 << 20,
        redundancy=Redundancy.NONE,
        vios_redundancy=ViosRedundancy.NONE,
    )
    await hypervisor.create_client(wanted)
    definition = await claim.definition()
    (replica,) = definition.clients["small"].volumes[0].replicas
    file = scene.file(definition.devices[replica.device].name, "small")
    assert file.stat().st_size == 1 << 20
    await hypervisor.delete_client("small")
    assert not file.exists()

    await pair.until(
        lambda info: sorted(path.state for path in info.paths) == ["active", "standby"], "two paths"
    )
    definition, info = await claim.definition(), await pair.info()
    assert info.epoch == definition.clients["pair"].epoch
    for vios in scene.vioses:
        volume = await scene.volume(vios, "pair")
        assert volume.epoch == info.epoch
        assert volume.size_bytes == info.memory_bytes
    volume = await scene.volume(await pair.active(), "pair")
    assert volume.open_connections >= 1
    evidence(f"it made the volume, claimed epoch {info.epoch} at both VIOS and opened both paths")


async def test_c4_move(claim: Claim, evidence: Evidence) -> None:
    """Pages move from the client to their place on the device, where anyone can read them, and back."""
    scene, pair = claim.scene, claim.pair
    await pair.process.do(f"write 0 {PAIR_PAGES}")
    info = await pair.until(
        lambda info: info.resident_bytes <= PAIR_LIMIT_BYTES and info.on_device_bytes > 0, "within the limit"
    )
    file = scene.file("common", "pair")
    assert file.stat().st_size == PAIR_PAGES * PAGE_BYTES
    content = words_of(file, PAIR_PAGES)
    # The version that the client wrote last: the highest for which any page on the device is right.
    version = max(
        number
        for number in range(1, 100)
        if (content == expected_words(0, np.full(PAIR_PAGES, number, np.uint64))).all(axis=1).any()
    )
    moved = (content == expected_words(0, np.full(PAIR_PAGES, version, np.uint64))).all(axis=1)
    on_device_pages = info.on_device_bytes // PAGE_BYTES
    assert int(moved.sum()) >= on_device_pages >= PAIR_PAGES - PAIR_LIMIT_BYTES // PAGE_BYTES
    before = info.counters.page_in_pages
    await pair.verify_all()
    back = (await pair.info()).counters.page_in_pages - before
    assert back >= on_device_pages
    evidence(f"{int(moved.sum())} pages of {PAIR_PAGES} in the device's file at the client's latest version")
    evidence(f"{back} pages paged in again, all right")


async def test_c5_decide(claim: Claim, evidence: Evidence) -> None:
    """Whether the client has direct access is decided from the definition, and its paths are those."""
    scene, definition = claim.scene, await claim.definition()
    common, first, second = [await scene.device(name) for name in ("common", "first", "second")]
    both = Viewpoint(set(scene.vioses))
    access = resolve(definition, "pair", common, both)
    assert isinstance(access, Direct)
    assert {path.vios for path in access.paths} == {path.vios for path in (await claim.pair.info()).paths}
    assert {path.volume for path in access.paths} == {"pair"}
    away = resolve(definition, "pair", first, both)
    assert isinstance(away, Direct)
    assert away.source == common
    assert not isinstance(resolve(definition, "pair", common, Viewpoint({"vios3"})), Direct)
    at_a = await scene.hypervisors["a"].explain_path("client")
    assert (at_a.way, at_a.first_device, at_a.first_vioses) == (Way.DIRECT, "second", ("vios2",))

    await hand_over(claim)
    assert_h_reaches_the_first_vios_alone(scene)
    explained = await scene.hypervisors["h"].explain_path("client")
    assert explained.way is Way.INDIRECT
    assert [edge.taken for edge in explained.edges if edge.device == "common"] == [False, False]
    definition = await claim.definition()
    assert not isinstance(resolve(definition, "client", second, Viewpoint({"vios1"})), Direct)
    evidence(f'"a", beside the second VIOS: {at_a.summary}')
    evidence(f'"h", which reaches {REACHED_BY_H}: {explained.summary}')


async def test_c6_locate(claim: Claim, evidence: Evidence) -> None:
    """Without direct access the second device is located that holds the volume in sync, and its VIOS."""
    scene, definition = claim.scene, await claim.definition()
    first = await scene.device("first")
    explained = await scene.hypervisors["h"].explain_path("client")
    assert (explained.first_device, explained.first_vioses) == ("first", ("vios1",))
    assert (explained.second_device, explained.second_vioses) == ("second", ("vios2",))
    assert explained.intermediate is not None
    assert explained.intermediate.place is Place.ANYWHERE
    evidence("second device: second, through vios2; first device: first, through vios1")
    evidence(f"an intermediate client can run {explained.intermediate.where}")

    # A volume behind a VIOS that the hypervisor does not reach.
    far = "11111111-2222-4333-8444-555555555555"
    found = rules.FoundDevice(far, "far", "dir", "dir:/far", 1 << 30, tuple(PagingCommand))
    record = ViosRecord(control="unix:/far/control", data=("tcp:far:7002",))
    definition = rules.register_vios(definition, "vios3", record, [found])
    view = Viewpoint({"vios1"})
    in_sync = with_replicas(definition, "client", Replica(device=far, state=ReplicaState.IN_SYNC))
    access = resolve(in_sync, "client", first, view)
    assert isinstance(access, Indirect)
    assert (access.first_device, access.second_device, access.second_vios) == (first, far, "vios3")
    assert access.first_vios in view.reached_vioses
    assert access.standing.vioses == (access.second_vios,)
    stale = with_replicas(definition, "client", Replica(device=far, state=ReplicaState.STALE))
    assert isinstance(resolve(stale, "client", first, view), Unreachable)


async def test_c7_intermediate_access(claim: Claim, evidence: Evidence) -> None:
    """The client reaches its volume through both VIOS, by an intermediate client granted both devices."""
    scene, hypervisor = claim.scene, claim.scene.hypervisors["h"]
    first, second = await scene.device("first"), await scene.device("second")
    await hypervisor.adopt("client", ClientAdopt())
    # So that it lasts as long as the steps look at it.
    await hypervisor.adjust_move("client", MoveAdjust(paused=True))
    move = (await claim.definition()).moves["client"]
    assert (move.source, move.source_vios) == (second, "vios2")
    assert (move.target, move.target_vios) == (first, "vios1")
    claim.intermediary = start_intermediary(scene, await until_wanted(hypervisor))
    await claim.intermediary.until_said('"ready"')
    await until_handed_over(scene, first)
    claim.client = await scene.region(
        "h", "h", "client", PAGES, limit_bytes=LIMIT_BYTES, version=claim.version
    )

    for vios in scene.vioses:
        async with asyncio.timeout(DEADLINE_SECONDS):
            while (definition := await scene.definition(vios)) != await claim.definition():
                await asyncio.sleep(0.05)
        granted = {
            (grant.volume, grant.access, grant.device)
            for grant in definition.grants
            if grant.principal == move.principal
        }
        assert granted == {("client", Access.WRITE, second), ("client", Access.FILL, first)}
        replicas = {replica.device: replica.state for replica in claim.replicas(definition)}
        assert replicas == {second: ReplicaState.IN_SYNC, first: ReplicaState.COPYING}
    evidence(f"grants of intermediate client {move.principal} in both VIOS: write on second, fill on first")

    copy = await scene.copy("client", first)
    assert await claim.client.process.do(f"verify 0 {PART}") == "wrong 0"
    after = await scene.copy("client", first)
    assert after.relay_connected
    assert after.relayed_reads > copy.relayed_reads
    assert {path.vios for path in (await claim.client.info()).paths} == {"vios1"}
    i, v1, v2 = (scene.hosts[name].address for name in ("i", "v1", "v2"))
    assert peers(scene, "v2", DATA_PORT) == {i}
    assert peers(scene, "i", RELAY_PORT) == {v1}
    assert_h_reaches_the_first_vios_alone(scene, relay_listens=True)
    evidence(f"{PART} pages read right by host h, {after.relayed_reads - copy.relayed_reads} reads relayed")
    evidence(
        f"NBD at v2 ({v2}) comes from i ({i}) alone, at i's relay from v1 ({v1}) alone; h reaches neither"
    )

    stranger = "0123456789abcdef"
    epoch, owner = definition.clients["client"].epoch, definition.clients["client"].owner
    for vios, export in (
        ("vios2", f"client/{second}+{stranger}"),
        ("vios2", f"client/{second}@{epoch}:{owner}+{stranger}"),
        ("vios1", f"client/{first}<{second}+{stranger}"),
        ("vios1", f"client/{second}+{move.principal}"),
        ("vios2", f"client/{first}<{second}+{move.principal}"),
        ("vios1", f"client/{first}@{epoch}:{owner}"),
    ):
        with pytest.raises(ServerRefused) as refused:
            await scene.connect(vios, export)
        assert str(refused.value)
    granted_connection = await scene.connect("vios2", f"client/{second}+{move.principal}")
    await granted_connection.close()
    evidence(
        "refused: others than the one granted, other devices than granted, the half-copied volume by itself"
    )


async def test_c9_share(claim: Claim, evidence: Evidence) -> None:
    """While it copies, client and intermediate client use the same paging space on the second device."""
    scene, client, hypervisor = claim.scene, claim.client, claim.scene.hypervisors["h"]
    first = await scene.device("first")
    before, read_before = await scene.copy("client", first), await scene.reads_of("vios2", "client")
    await hypervisor.adjust_move("client", MoveAdjust(paused=False, bandwidth_bytes=COPY_BYTES))
    # The client gives the first part new content and reads the second one while others are filled.
    assert await client.process.do(f"write 0 {PART}") == "done"
    assert await client.process.do(f"verify {PART} {PART}") == "wrong 0"
    during = await until_copy(scene, first, lambda copy: copy.filled_pages > before.filled_pages)
    await hypervisor.adjust_move("client", MoveAdjust(paused=True))
    versions = np.full(PAGES, claim.version, np.uint64)
    versions[:PART] += np.uint64(1)
    await client.set_limit(SMALL_LIMIT_BYTES)
    assert await client.process.do(f"verify {PART} {PART}") == "wrong 0"
    await client.until(lambda info: info.resident_bytes <= SMALL_LIMIT_BYTES, "within its limit")
    after = await scene.copy("client", first)
    assert after.present_pages < after.total_pages
    assert after.relayed_reads > before.relayed_reads
    assert after.kept_pages > before.kept_pages
    shared = words_of(scene.file("second", "client"), PAGES)
    in_memory = differing(shared, versions)
    assert len(in_memory) <= SMALL_LIMIT_BYTES // PAGE_BYTES
    assert max(in_memory, default=0) < PART
    older = np.full(PAGES, claim.version, np.uint64)
    assert not set(in_memory) & set(differing(shared, older))
    present = words_of(scene.file("first", "client"), PAGES)
    assert (present[: 2 * PART] == shared[: 2 * PART]).all()
    reads = await scene.reads_of("vios2", "client") - read_before
    claim.versions, claim.in_memory = versions, in_memory
    evidence(f"{during.filled_pages - before.filled_pages} pages filled while the client worked; paused then")
    evidence(f"{PART - len(in_memory)} pages written meanwhile are in the second device's file too")
    evidence(f"{reads:.0f} reads there, of both; {after.kept_pages} pages that the client read were kept")


async def test_c8_copy(claim: Claim, evidence: Evidence) -> None:
    """The intermediate client copies the volume from the second device to the first, which serves then."""
    scene, hypervisor = claim.scene, claim.scene.hypervisors["h"]
    first, second = await scene.device("first"), await scene.device("second")
    assert claim.intermediary is not None
    # What the second device has at the end survives there under another name, as a witness.
    witness = scene.root / "witness"
    os.link(scene.file("second", "client"), witness)
    used_bytes = await scene.used_bytes("vios2", second)
    # Nothing is paged out until the two are compared: the client may have all of its memory.
    await claim.client.set_limit(PAGES * PAGE_BYTES)
    principal = (await claim.definition()).moves["client"].principal
    target = words_of(scene.file("first", "client"), PAGES)
    absent_pages = int((target != words_of(witness, PAGES)).any(axis=1).sum())
    assert absent_pages
    await hypervisor.adjust_move("client", MoveAdjust(paused=False, unlimited=True))
    rounds = 0
    while (await hypervisor.move_progress("client")).stage is not MoveStage.DONE:
        # What it reads is there already, so that what is not is left to the intermediate client.
        assert await claim.client.process.do(f"verify 0 {2 * PART}") == "wrong 0"
        rounds += 1
    assert await claim.intermediary.ended() == 0
    for vios in scene.vioses:
        definition = await scene.definition(vios)
        assert "client" not in definition.moves
        assert definition.grants == ()
        assert [(r.device, r.state) for r in claim.replicas(definition)] == [(first, ReplicaState.IN_SYNC)]
    compared = subprocess.run(  # noqa: ASYNC221
        ["qemu-img", "compare", "-f", "raw", "-F", "raw", witness, scene.file("first", "client")],
        check=False,
        capture_output=True,
        text=True,
    )
    assert compared.stdout == "Images are identical.\n", compared
    assert differing(words_of(scene.file("first", "client"), PAGES), claim.versions) == claim.in_memory
    (copied,) = claim.intermediary.events("copied")
    assert copied["written_bytes"] >= absent_pages * PAGE_BYTES
    evidence(f"the intermediate client copied the {absent_pages} pages that were absent still, to the end")
    evidence(f"the client read {2 * PART} pages {rounds} times meanwhile, each right")
    evidence("qemu-img compare of the second device's volume and the first one's: images are identical")

    assert not scene.file("second", "client").exists()
    assert await scene.used_bytes("vios2", second) <= used_bytes - PAGES * PAGE_BYTES
    with pytest.raises(ServerRefused):
        await scene.connect("vios1", f"client/{first}<{second}+{principal}")
    explained = await hypervisor.explain_path("client")
    assert (explained.way, explained.first_device, explained.first_vioses) == (
        Way.DIRECT,
        "first",
        ("vios1",),
    )
    await claim.client.set_limit(SMALL_LIMIT_BYTES)
    await claim.client.write_all()
    await claim.client.verify_all()
    assert (await scene.volume("vios1", "client")).open_connections >= 1
    evidence(
        "the second device's space is free, the grants are revoked, the client goes on with direct access"
    )
