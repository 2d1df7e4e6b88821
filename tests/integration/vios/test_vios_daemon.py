from __future__ import annotations

import asyncio
import json
import resource
import signal
import socket
from pathlib import Path

import pytest

from farpage.address import parse_address
from farpage.api.remote import RemoteError
from farpage.blockio import CONNECTION_LOST, read_bytes
from farpage.definition.database import Database
from farpage.definition.model import Definition, ViosRecord
from farpage.definition.rules import next_revision
from farpage.errors import ExitStatus
from farpage.nbd.client import Connection
from farpage.vios.model import DeviceAdd, DeviceInfo, Health, VolumeCreate, VolumeInfo
from farpage.vios.remembered import RememberedDevice, RememberedDevices
from tests.support.nbdkit import Nbdkit
from tests.support.vios import ViosProcess, vios_processes
from tests.support.volumes import write


def spec(folder: Path, name: str = "disk") -> str:
    return f"dir:{folder}/{name}?size=16M"


def log_lines(vios: ViosProcess) -> list[dict[str, object]]:
    return [json.loads(line) for line in vios.log().splitlines()]


async def test_it_says_when_it_is_ready_and_ends_in_order_on_a_signal(folder: Path) -> None:
    with vios_processes(folder, "one", devices=[spec(folder)]) as (vios,):
        await vios.create("vm1")
        connection = await vios.connect("vm1@1")
        assert await write(connection, 0, b"a" * 4096) == 0
        vios.signal(signal.SIGINT)
        assert vios.wait() == 0
        assert await write(connection, 0, b"a" * 4096) == CONNECTION_LOST
        await connection.close()
        lines = log_lines(vios)
    ready = [line for line in lines if line["event"] == "ready"]
    assert [(line["control"], line["data"]) for line in ready] == [([vios.control], [str(vios.data)])]
    assert lines[-1]["event"] == "stopped"
    assert {line["vios"] for line in lines} == {"one"}
    assert {path.name for path in folder.iterdir()} == {"disk", "one", "one.log"}  # noqa: ASYNC240


@pytest.mark.parametrize("workers", [1, 2])
async def test_it_and_its_data_processes_take_as_many_descriptors_as_they_may(
    folder: Path, workers: int
) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    vios = ViosProcess(folder, "one", devices=[spec(folder)])
    vios.change = {"workers": workers}
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, hard - 1), hard))
    try:
        vios.launch()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    try:
        vios.until_ready()
        async with vios.client() as client:
            health = await client.get("/v1/health", Health)
        for pid in (vios.pid, *health.data_processes):
            assert resource.prlimit(pid, resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        vios.close()


async def test_added_devices_and_the_definition_come_back_after_a_restart(folder: Path) -> None:
    with vios_processes(folder, "one", devices=[spec(folder)]) as (vios,):
        definition = next_revision(
            Definition(), vioses={"one": ViosRecord(control=vios.control, data=(str(vios.data),))}
        )
        async with vios.client() as client:
            for wanted in (DeviceAdd(spec=spec(folder, "more"), name="more"), DeviceAdd(spec="memory:1M")):
                await client.post("/v1/devices", wanted, DeviceInfo)
            await client.put("/v1/definition", definition, Definition, params={"expected_revision": 0})
            before = await client.get("/v1/devices", tuple[DeviceInfo, ...])
        assert vios.stop() == 0
        vios.start()
        async with vios.client() as client:
            after = await client.get("/v1/devices", tuple[DeviceInfo, ...])
            assert await client.get("/v1/definition", Definition) == definition
        assert sorted(device.spec for device in after) == sorted(device.spec for device in before)
        assert {device.id for device in after if device.kind == "dir"} == {
            device.id for device in before if device.kind == "dir"
        }


@pytest.mark.parametrize("change", [{"name": "other"}, {"size_bytes": 32 << 20}])
async def test_a_served_device_that_is_added_under_another_name_or_size_stays_as_it_was_added(
    folder: Path, change: dict[str, object]
) -> None:
    with vios_processes(folder, "one", devices=[spec(folder)]) as (vios,):
        wanted = DeviceAdd(spec=f"dir:{folder}/more", name="more", size_bytes=16 << 20)
        async with vios.client() as client:
            for _ in range(2):
                await client.post("/v1/devices", wanted, DeviceInfo)
            with pytest.raises(RemoteError) as refused:
                await client.post("/v1/devices", wanted.model_copy(update=change), DeviceInfo)
        assert refused.value.exit_status is ExitStatus.CONFLICT
        vios.kill()
        vios.start()
        assert {device.name for device in await devices_of(vios)} == {"disk", "more"}


async def test_a_device_with_the_name_of_a_served_one_is_refused_before_anything_is_written(
    folder: Path,
) -> None:
    async with Nbdkit(folder / "s", "memory", "16M") as server:
        with vios_processes(folder, "one", devices=[spec(folder)]) as (vios,):
            async with vios.client() as client:
                for wanted in (f"dir:{folder}/more", server.uri, "memory:1M"):
                    with pytest.raises(RemoteError) as refused:
                        await client.post("/v1/devices", DeviceAdd(spec=wanted, name="disk"), DeviceInfo)
                    assert (refused.value.code, refused.value.exit_status) == (
                        "device_name_taken",
                        ExitStatus.CONFLICT,
                    )
                    assert spec(folder) in refused.value.cause
                assert not (folder / "more").exists()
                for wanted, name in ((f"dir:{folder}/more", "more"), (server.uri, "remote")):
                    await client.post("/v1/devices", DeviceAdd(spec=wanted, name=name), DeviceInfo)
            assert {device.name for device in await devices_of(vios)} == {"disk", "more", "remote"}


async def test_a_served_device_is_added_by_another_specification_under_its_own_name(folder: Path) -> None:
    with vios_processes(folder, "one", devices=[spec(folder)]) as (vios,):
        async with vios.client() as client:
            await client.post("/v1/devices", DeviceAdd(spec=f"dir:{folder}/disk", name="disk"), DeviceInfo)
        assert [device.spec for device in await devices_of(vios)] == [spec(folder)]


async def test_a_device_that_is_away_leaves_the_others_served(folder: Path) -> None:
    (folder / "one").mkdir()
    database = Database(folder / "one" / "vios.db")
    RememberedDevices(database).add(RememberedDevice("dir:/proc/gone/away", None, None))
    database.close()
    with vios_processes(folder, "one", devices=["dir:/proc/gone/too", spec(folder)]) as (vios,):
        assert (await vios.device()).name == "disk"
        unusable = [line["spec"] for line in log_lines(vios) if line["event"] == "device_unusable"]
        assert unusable == ["dir:/proc/gone/too", "dir:/proc/gone/away"]


async def test_a_remote_device_that_is_away_or_hangs_at_the_start_is_served_when_it_answers(
    folder: Path,
) -> None:
    server = Nbdkit(folder / "s", "memory", "16M")
    with vios_processes(folder, "one", devices=[server.uri, spec(folder)]) as (vios,):
        assert [device.name for device in await devices_of(vios)] == ["disk"]
        async with server:
            while {device.kind for device in await devices_of(vios)} != {"dir", "nbd"}:
                await asyncio.sleep(0.05)
            vios.stop()
            server.signal(signal.SIGSTOP)
            vios.start()
            assert [device.name for device in await devices_of(vios)] == ["disk"]
            server.signal(signal.SIGCONT)
            while {device.kind for device in await devices_of(vios)} != {"dir", "nbd"}:
                await asyncio.sleep(0.05)


async def devices_of(vios: ViosProcess) -> tuple[DeviceInfo, ...]:
    async with vios.client() as client:
        return await client.get("/v1/devices", tuple[DeviceInfo, ...])


async def test_a_device_that_fails_later_leaves_the_others_shown(folder: Path) -> None:
    with vios_processes(folder, "one", devices=[spec(folder, "bad"), spec(folder)]) as (vios,):
        await vios_create_on(vios, "disk")
        (folder / "bad" / "volumes").rmdir()
        async with vios.client() as client:
            devices = await client.get("/v1/devices", tuple[DeviceInfo, ...])
            assert [(device.name, device.volumes) for device in devices] == [("bad", None), ("disk", 1)]
            assert b'farpage_device_usable{device="bad"} 0.0' in await client.request("GET", "/metrics")
        connection = await vios.connect("vm1@1")
        assert await read_bytes(connection, 0, 4096) == bytes(4096)
        await connection.close()


async def vios_create_on(vios: ViosProcess, device: str) -> None:
    async with vios.client() as client:
        devices = await client.get("/v1/devices", tuple[DeviceInfo, ...])
        (identifier,) = (found.id for found in devices if found.name == device)
        wanted = VolumeCreate(name="vm1", device=identifier, size_bytes=1 << 20)
        await client.post("/v1/volumes", wanted, VolumeInfo)


async def test_it_serves_tcp_beside_unix_sockets(folder: Path) -> None:
    vios = ViosProcess(folder, "one", [spec(folder)])
    vios.extra_data = ("tcp:127.0.0.1:0",)
    try:
        vios.start()
        await vios.create("vm1")
        async with vios.client() as client:
            addresses = (await client.get("/v1/health", Health)).data
        connection = await Connection.open(parse_address(addresses[1]), "vm1@1")
        assert await write(connection, 0, b"a" * 4096) == 0
        await connection.close()
    finally:
        vios.close()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"devices": ["disk:/x"]}, "disk:/x"),
        ({"devices": ["dir:/proc/nothing/here"]}, "/proc/nothing/here"),
        ({"control": ["tcp:127.0.0.1:1"]}, "--tls DIR"),
        ({"data": ["unix:/proc/nothing/here"]}, "/proc/nothing/here"),
    ],
)
def test_settings_that_cannot_work_end_it_with_the_reason(
    folder: Path, change: dict[str, object], words: str
) -> None:
    vios = ViosProcess(folder, "one", [spec(folder)])
    vios.change = change
    try:
        vios.launch()
        assert vios.wait() != 0
        assert words in vios.log()
        assert not Path(vios.control.removeprefix("unix:")).exists()
    finally:
        vios.close()


def test_two_on_one_state_folder_are_one_too_many(vios: ViosProcess) -> None:
    second = ViosProcess(vios.folder, "one", vios.devices)
    second.control, second.log_path = f"unix:{vios.folder}/other.c", vios.folder / "other.log"
    try:
        second.launch()
        assert second.wait() != 0
        assert "already" in second.log()
    finally:
        second.close()


def test_a_socket_of_a_running_vios_is_not_taken(vios: ViosProcess) -> None:
    second = ViosProcess(vios.folder, "two", vios.devices)
    second.control = vios.control
    try:
        second.launch()
        assert second.wait() != 0
        assert "running process" in second.log()
    finally:
        second.close()
    with socket.socket(socket.AF_UNIX) as probe:
        probe.connect(vios.control.removeprefix("unix:"))


def test_a_damaged_database_is_reported_with_a_remedy(folder: Path) -> None:
    vios = ViosProcess(folder, "one", [spec(folder)])
    (folder / "one").mkdir()
    (folder / "one" / "vios.db").write_bytes(b"rubbish" * 1000)
    try:
        vios.launch()
        assert vios.wait() != 0
        assert "move the file" in vios.log()
    finally:
        vios.close()
