"""A VIOS with several data processes: one address, each volume in one process, and what a lost one leaves."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from farpage.api.remote import RemoteError
from farpage.blockio import read_bytes
from farpage.definition.model import Definition, ViosRecord
from farpage.definition.rules import FoundDevice, add_client, claim, register_vios
from farpage.device.spec import Allocate
from farpage.kernel.memory import AlignedBuffer
from farpage.nbd import options
from farpage.nbd import protocol as p
from farpage.nbd.client import Connection
from farpage.nbd.errors import ConnectFailed, ServerRefused
from farpage.vios.model import DeviceAdd, DeviceInfo, Health, VolumeCreate, VolumeInfo
from tests.support.nbd import RawClient, short_folder
from tests.support.scrape import Scrape
from tests.support.vios import ViosProcess, until
from tests.support.volumes import flush, trim, write, zero

LIMIT_SECONDS = 60.0
LEASE = "00000000000000ee"
ANNA, BERT = "00000000000000aa", "00000000000000bb"
MIB = 1 << 20


@pytest.fixture
def vios() -> Iterator[ViosProcess]:
    """A VIOS with two data processes and a directory of 64 MiB."""
    with short_folder() as folder:
        process = ViosProcess(folder, "one", [f"dir:{folder}/disk?size=64M"])
        process.change = {"workers": 2, "lease_seconds": 1.0}
        process.start()
        try:
            yield process
        finally:
            process.close()


async def health(vios: ViosProcess) -> Health:
    async with vios.client() as client:
        return await client.get("/v1/health", Health)


async def processes(vios: ViosProcess) -> tuple[int, ...]:
    return (await health(vios)).data_processes


async def opened(vios: ViosProcess, *volumes: str) -> list[Connection]:
    """Make volumes and open them for an owner."""
    connections = []
    for volume in volumes:
        await vios.create(volume)
        connections.append(await vios.connect(f"{volume}@1"))
    return connections


async def close(*connections: Connection) -> None:
    for connection in connections:
        await connection.close()


async def connected(vios: ViosProcess, export: str) -> Connection:
    """Connect as soon as somebody serves the export."""
    async with asyncio.timeout(LIMIT_SECONDS):
        while True:
            try:
                return await vios.connect(export)
            except ConnectFailed:
                await asyncio.sleep(0.01)


@asynccontextmanager
async def ending(*pids: int) -> AsyncIterator[None]:
    """Wait at the end until processes have ended."""
    pidfds = [os.pidfd_open(pid) for pid in pids]
    yield
    async with asyncio.timeout(LIMIT_SECONDS):
        for pidfd in pidfds:
            loop, gone = asyncio.get_running_loop(), asyncio.Event()
            loop.add_reader(pidfd, gone.set)
            await gone.wait()
            loop.remove_reader(pidfd)
            os.close(pidfd)


async def lost(connection: Connection) -> None:
    """Wait until a connection has ended."""
    async with asyncio.timeout(LIMIT_SECONDS):
        while await write(connection, 0, bytes(4096)) == 0:
            await asyncio.sleep(0.001)


async def test_volumes_are_served_by_several_processes_at_one_address(vios: ViosProcess) -> None:
    names = ("a", "b", "c", "d")
    connections = await opened(vios, *names)
    again = await vios.connect("a@1")
    for number, connection in enumerate(connections):
        assert await write(connection, 4096, bytes([number]) * 8192) == 0
    for number, connection in enumerate(connections):
        assert await read_bytes(connection, 4096, 8192) == bytes([number]) * 8192
    told = await health(vios)
    pids = [connection.peer_pid for connection in connections]
    assert sorted(filter(None, pids)) == sorted(told.data_processes * 2)
    assert told.pid not in told.data_processes
    assert again.peer_pid == connections[0].peer_pid
    assert told.open_exports == 5
    assert [(await vios.volume(name)).open_connections for name in names] == [2, 1, 1, 1]
    # No other VIOS gets the folder before they have ended.
    for pid in told.data_processes:
        assert any(link.name == "vios.lock" for link in open_files(pid))
    await close(*connections, again)


def open_files(pid: int) -> list[Path]:
    return [link.readlink() for link in Path(f"/proc/{pid}/fd").iterdir()]


async def test_requests_that_come_with_the_option_are_served(vios: ViosProcess) -> None:
    (connection,) = await opened(vios, "v")
    assert await write(connection, 0, b"x" * 4096) == 0
    client = await RawClient.connect(vios.data.path)
    await client.greet()
    client.send(options.encode_option(p.NBD_OPT_EXPORT_NAME, b"v"))
    client.request(p.NBD_CMD_READ, 1, 0, 4096)
    client.request(p.NBD_CMD_READ, 2, 0, 4096)
    reply = options.EXPORT_NAME_REPLY.unpack(await client.reader.readexactly(options.EXPORT_NAME_REPLY.size))
    assert reply[0] == MIB
    assert await client.simple_reply(4096) == (0, 1, b"x" * 4096)
    assert await client.simple_reply(4096) == (0, 2, b"x" * 4096)
    await client.close()
    await connection.close()


async def test_who_is_refused_may_ask_for_something_else(vios: ViosProcess) -> None:
    await vios.create("v")
    await vios.claim("v", 2)
    client = await RawClient.connect(vios.data.path)
    await client.greet()
    for name, reply in (("v@1", p.NBD_REP_ERR_POLICY), ("w", p.NBD_REP_ERR_UNKNOWN), ("v@2", p.NBD_REP_ACK)):
        request = options.encode_info_request(options.InfoRequest(name, ()))
        assert (await client.option(p.NBD_OPT_GO, request))[0] == reply
    client.request(p.NBD_CMD_READ, 1, 0, 4096)
    assert await client.simple_reply(4096) == (0, 1, bytes(4096))
    await client.close()


async def test_a_killed_process_is_replaced_while_other_volumes_go_on(vios: ViosProcess) -> None:
    one, other = await opened(vios, "one", "other")
    assert one.peer_pid is not None
    assert await write(one, 0, b"a" * 4096) == 0
    async with ending(one.peer_pid):
        os.kill(one.peer_pid, signal.SIGKILL)
        assert await write(other, 0, b"b" * 4096) == 0
    await lost(one)
    again = await connected(vios, "one@1")
    assert again.peer_pid != one.peer_pid
    assert set(await processes(vios)) == {again.peer_pid, other.peer_pid}
    assert await read_bytes(again, 0, 4096) == b"a" * 4096
    assert await read_bytes(other, 0, 4096) == b"b" * 4096
    scrape = await Scrape.of(vios.control)
    assert scrape.value("farpage_vios_data_processes") == 2
    assert scrape.value("farpage_vios_data_process_restarts_total") == 1
    await close(one, other, again)


async def test_no_write_is_lost_with_a_process_and_none_comes_after_a_later_one(vios: ViosProcess) -> None:
    (connection,) = await opened(vios, "v")
    pages, round_ = 64, 0
    acknowledged = [b""] * pages
    while round_ < 5:
        round_ += 1

        async def put(page: int, content: bytes) -> None:
            if await write(connection, page * 4096, content) == 0:  # noqa: B023 (awaited in its round)
                acknowledged[page] = content

        contents = [bytes([round_, page]) * 2048 for page in range(pages)]
        writes = [asyncio.create_task(put(page, contents[page])) for page in range(pages)]
        async with asyncio.timeout(LIMIT_SECONDS):
            while not any(acknowledged[page] == contents[page] for page in range(pages)):
                await asyncio.sleep(0)
        assert connection.peer_pid is not None
        os.kill(connection.peer_pid, signal.SIGKILL)
        await asyncio.gather(*writes)
        again = await connected(vios, "v@1")
        # What was not acknowledged is there whole or not at all; what is written from here on stays.
        for page in range(pages):
            found = await read_bytes(again, page * 4096, 4096)
            assert found in (acknowledged[page] or bytes(4096), contents[page])
            acknowledged[page] = contents[page][::-1]
            assert await write(again, page * 4096, acknowledged[page]) == 0
        for page in range(pages):
            assert await read_bytes(again, page * 4096, 4096) == acknowledged[page]
        await connection.close()
        connection = again
    await connection.close()


async def test_an_older_epoch_is_refused_and_cut_off_in_a_data_process(vios: ViosProcess) -> None:
    (older,) = await opened(vios, "v")
    newer = await vios.connect("v@2")
    assert await write(older, 0, b"x" * 4096) != 0
    with pytest.raises(ServerRefused, match="stale_epoch 2: "):
        await vios.connect("v@1")
    await vios.claim("v", 3)
    assert await write(newer, 0, b"x" * 4096) != 0
    assert await read_bytes(await vios.connect("v@3"), 0, 4096) == bytes(4096)
    with pytest.raises(RemoteError) as caught:
        await vios.claim("v", 2)
    assert caught.value.code == "stale_epoch"
    assert caught.value.details == {"volume": "v", "epoch": 2, "current": 3}
    pid = (await vios.connect("v")).peer_pid
    assert pid is not None
    async with ending(pid):
        os.kill(pid, signal.SIGKILL)
    while True:
        try:
            await vios.connect("v@2")
        except ServerRefused as refusal:
            if "stale_epoch 3: " in str(refusal):
                break
        except ConnectFailed:
            pass
        await asyncio.sleep(0.01)
    await close(older, newer)


async def put_definition(vios: ViosProcess, before: Definition, after: Definition) -> Definition:
    async with vios.client() as client:
        parameters = {"expected_revision": before.revision}
        return await client.put("/v1/definition", after, Definition, params=parameters)


async def owned(vios: ViosProcess, *volumes: str) -> Definition:
    """Store a definition in which ANNA owns volumes, and make them."""
    device = await vios.device()
    found = FoundDevice(device.id, device.name, device.kind, device.spec, device.size_bytes, device.commands)
    record = ViosRecord(control=vios.control, data=(str(vios.data),))
    definition = await put_definition(vios, Definition(), register_vios(Definition(), "one", record, [found]))
    for volume in volumes:
        added = add_client(definition, volume, memory_bytes=MIB, hypervisor="host")
        definition = await put_definition(vios, definition, added)
        definition = await put_definition(vios, definition, claim(definition, volume, ANNA, "host"))
        await vios.create(volume)
    return definition


async def test_a_definition_counts_in_the_processes_when_it_is_acknowledged(vios: ViosProcess) -> None:
    definition = await owned(vios, "v", "w")
    epochs = {volume: definition.clients[volume].epoch for volume in ("v", "w")}
    kept, taken = [await vios.connect(f"{volume}@{epoch}:{ANNA}") for volume, epoch in epochs.items()]
    await put_definition(vios, definition, claim(definition, "w", BERT, "other"))
    with pytest.raises(ServerRefused, match="another_owner"):
        await vios.connect(f"w@{epochs['w']}:{ANNA}")
    await lost(taken)
    assert await write(kept, 0, b"x" * 4096) == 0
    await close(kept, taken)


async def test_a_process_that_hangs_is_replaced_by_one_that_goes_by_the_definition(vios: ViosProcess) -> None:
    definition = await owned(vios, "v", "w")
    epochs = {volume: definition.clients[volume].epoch for volume in ("v", "w")}
    other, hung = [await vios.connect(f"{volume}@{epoch}:{ANNA}") for volume, epoch in epochs.items()]
    assert hung.peer_pid is not None
    assert hung.peer_pid != other.peer_pid
    async with ending(hung.peer_pid):
        os.kill(hung.peer_pid, signal.SIGSTOP)
        await put_definition(vios, definition, claim(definition, "w", BERT, "other"))
    assert await write(other, 0, b"x" * 4096) == 0
    again = await connected(vios, "w")
    with pytest.raises(ServerRefused, match="another_owner"):
        await vios.connect(f"w@{epochs['w']}:{ANNA}")
    await close(other, hung, again)


async def test_a_process_that_hangs_is_ended_though_nothing_is_asked_of_it(vios: ViosProcess) -> None:
    hung, other = await opened(vios, "v", "w")
    assert hung.peer_pid is not None
    async with ending(hung.peer_pid):
        os.kill(hung.peer_pid, signal.SIGSTOP)
    await lost(hung)
    assert await write(other, 0, b"x" * 4096) == 0
    await close(hung, other, await connected(vios, "v@1"))


async def test_a_killed_front_leaves_no_process_and_can_be_started_again_at_once(vios: ViosProcess) -> None:
    connections = await opened(vios, "v", "w")
    for connection in connections:
        assert await write(connection, 0, b"x" * 4096) == 0
    async with ending(*await processes(vios)):
        vios.kill()
        vios.start()
    again = [await vios.connect(f"{volume}@1") for volume in ("v", "w")]
    for connection in again:
        assert await read_bytes(connection, 0, 4096) == b"x" * 4096
    await close(*connections, *again)


async def test_it_ends_in_order_with_its_processes(vios: ViosProcess) -> None:
    (connection,) = await opened(vios, "v")
    async with ending(*await processes(vios)):
        assert vios.stop() == 0
    await lost(connection)
    await connection.close()


async def test_signals_to_a_data_process_leave_its_end_to_the_front(vios: ViosProcess) -> None:
    (connection,) = await opened(vios, "v")
    for pid in await processes(vios):
        for number in (signal.SIGTERM, signal.SIGINT):
            os.kill(pid, number)
    assert await write(connection, 0, b"x" * 4096) == 0
    await connection.close()


async def leased(vios: ViosProcess, volume: str) -> tuple[Connection, Connection]:
    """Begin a lease and open a volume under it; returns the connection of each."""
    lease = await vios.connect(f"lease:{LEASE}")
    await renew(lease)
    return lease, await vios.connect(f"{volume}@1:{ANNA}:{LEASE}")


async def renew(lease: Connection) -> None:
    nonce = (await read_bytes(lease, 0, 16))[:8]
    assert await write(lease, 0, nonce) == 0


async def test_writes_end_with_their_lease_also_while_the_front_hangs(vios: ViosProcess) -> None:
    await vios.create("v")
    lease, volume = await leased(vios, "v")
    assert await write(volume, 0, b"x" * 4096) == 0
    vios.signal(signal.SIGSTOP)
    async with asyncio.timeout(LIMIT_SECONDS):
        while (error := await write(volume, 0, b"x" * 4096)) == 0:
            await asyncio.sleep(0.01)
    assert error == errno.ESHUTDOWN
    assert await read_bytes(volume, 0, 4096) == b"x" * 4096
    vios.signal(signal.SIGCONT)
    with pytest.raises(ServerRefused, match="has run out"):
        await vios.connect(f"v@1:{ANNA}:{LEASE}")
    await close(lease, volume)


async def test_a_renewed_lease_lasts_in_every_process(vios: ViosProcess) -> None:
    await vios.create("v")
    lease, volume = await leased(vios, "v")
    loop = asyncio.get_running_loop()
    end = loop.time() + 2.0
    while loop.time() < end:
        await renew(lease)
        assert await write(volume, 0, b"x" * 4096) == 0
    await close(lease, volume)


async def test_an_owner_who_would_watch_the_front_alone_is_refused(vios: ViosProcess) -> None:
    await vios.create("v")
    lease, volume = await leased(vios, "v")
    client = await RawClient.connect(vios.data.path)
    await client.greet()
    request = options.encode_info_request(options.InfoRequest(f"v@1:{ANNA}:{LEASE}", ()))
    reply, text, _ = await client.option(p.NBD_OPT_GO, request)
    assert reply == p.NBD_REP_ERR_UNKNOWN
    assert b"use a hypervisor of the VIOS' version" in text
    await client.close()
    await close(lease, volume)


async def test_storage_is_lent_by_data_processes(vios: ViosProcess) -> None:
    if (await vios.device()).access != "direct":
        pytest.skip("no direct I/O on this file system")
    await vios.create("v")
    connection = await vios.connect("v@1", borrow=True)
    assert connection.peer_pid in await processes(vios)
    assert connection.lent is not None
    with AlignedBuffer(4096) as buffer:
        buffer.view[:] = b"x" * 4096
        assert await write(connection, 4096, buffer.view) == 0
        buffer.view[:] = bytes(4096)
        assert os.preadv(connection.lent.descriptor, [buffer.view], connection.lent.origin_bytes + 4096)
        assert bytes(buffer.view) == b"x" * 4096
    await connection.close()


async def test_metrics_are_added_up(vios: ViosProcess) -> None:
    connections = await opened(vios, "v", "w")
    for number, connection in enumerate(connections):
        for _ in range(number + 1):
            assert await write(connection, 0, bytes(4096)) == 0
    with pytest.raises(ServerRefused):
        await vios.connect("nowhere@1")
    await vios.claim("v", 2)
    with pytest.raises(ServerRefused):
        await vios.connect("v@1")
    scrape = await Scrape.of(vios.control)
    assert scrape.value("farpage_volume_writes_total", volume="v") == 1
    assert scrape.value("farpage_volume_writes_total", volume="w") == 2
    assert scrape.value("farpage_vios_opens_refused_total") == 2
    assert scrape.value("farpage_vios_connections_fenced_total") == 1
    assert scrape.value("farpage_vios_open_exports") == 1
    # What the scrape has told does not go back when a process is lost.
    pid = connections[1].peer_pid
    assert pid is not None
    async with ending(pid):
        os.kill(pid, signal.SIGKILL)
    await close(*connections, await connected(vios, "w@1"))
    assert (await Scrape.of(vios.control)).value("farpage_volume_writes_total", volume="w") == 2


async def test_a_volume_is_deleted_in_its_process_and_may_be_made_anew(vios: ViosProcess) -> None:
    (connection,) = await opened(vios, "v")
    assert await write(connection, 0, b"x" * 4096) == 0
    assert await flush(connection) == 0
    async with vios.client() as client:
        with pytest.raises(RemoteError) as caught:
            await client.delete("/v1/volumes/v")
        assert caught.value.code == "volume_in_use"
        await client.delete("/v1/volumes/v", params={"epoch": 1})
    await lost(connection)
    with pytest.raises(ServerRefused, match="v"):
        await vios.connect("v@1")
    (again,) = await opened(vios, "v")
    assert await read_bytes(again, 0, 4096) == bytes(4096)
    await close(connection, again)


async def test_a_device_that_processes_cannot_share_is_refused(vios: ViosProcess) -> None:
    async with vios.client() as client:
        for spec in ("memory:8M", "nbd://localhost/x"):
            with pytest.raises(RemoteError, match="run the VIOS without --workers") as caught:
                await client.post("/v1/devices", DeviceAdd(spec=spec), DeviceInfo)
            assert caught.value.http_status == 422
        assert [device.kind for device in await client.get("/v1/devices", tuple[DeviceInfo, ...])] == ["dir"]


async def test_a_device_that_is_added_is_served_by_the_processes(vios: ViosProcess) -> None:
    async with vios.client() as client:
        wanted = DeviceAdd(spec=f"dir:{vios.folder}/more?size=16M", name="more")
        added = await client.post("/v1/devices", wanted, DeviceInfo)
        await client.post("/v1/volumes", VolumeCreate(name="v", device=added.id, size_bytes=MIB), VolumeInfo)
    connection = await vios.connect("v@1")
    assert await write(connection, 0, b"x" * 4096) == 0
    await connection.close()


async def test_data_processes_keep_the_blocks_of_full_volumes(vios: ViosProcess) -> None:
    async with vios.client() as client:
        added = await client.post(
            "/v1/devices", DeviceAdd(spec=f"dir:{vios.folder}/full?size=8M&allocate=full"), DeviceInfo
        )
        assert added.allocate is Allocate.FULL
        wanted = VolumeCreate(name="v", device=added.id, size_bytes=MIB)
        made = await client.post("/v1/volumes", wanted, VolumeInfo)
        assert made.used_bytes >= MIB
        connection = await vios.connect("v@1")
        assert connection.peer_pid in await processes(vios)
        assert await write(connection, 0, b"x" * MIB) == 0
        assert await trim(connection, 0, MIB // 2) == 0
        assert await zero(connection, MIB // 2, MIB // 2) == 0
        assert await zero(connection, 0, MIB, fast=True) == errno.ENOTSUP
        assert await read_bytes(connection, 0, MIB) == b"x" * (MIB // 2) + bytes(MIB // 2)
        await connection.close()
        assert (await client.get("/v1/volumes/v", VolumeInfo)).used_bytes >= MIB


async def test_with_one_worker_there_is_no_other_process(vios: ViosProcess) -> None:
    vios.stop()
    vios.change = {"workers": 1}
    vios.start()
    (connection,) = await opened(vios, "v")
    assert connection.peer_pid == vios.pid
    assert await processes(vios) == ()
    await until(lambda: not list(Path(f"/proc/{vios.pid}/task/{vios.pid}/children").read_text().split()))
    await connection.close()


async def test_it_ends_at_once_while_a_process_is_being_replaced(vios: ViosProcess) -> None:
    (connection,) = await opened(vios, "v")
    pid = connection.peer_pid
    assert pid is not None
    async with ending(pid):
        os.kill(pid, signal.SIGKILL)
    waiting = asyncio.create_task(vios.connect("v@1"))
    await asyncio.sleep(0)
    assert vios.stop() == 0
    assert "not_drained" not in vios.log()
    with contextlib.suppress(ConnectFailed):
        await (await waiting).close()
    await connection.close()


@pytest.mark.parametrize("workers", ["0", "65", "two"])
def test_a_wrong_number_of_processes_is_refused_and_nothing_is_made(tmp_path: Path, workers: str) -> None:
    folder = tmp_path / "one"
    done = subprocess.run(
        [sys.executable, "-m", "farpage", "vios", "run", "one", "--dir", str(folder), "--workers", workers],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "--workers" in done.stderr
    assert not folder.exists() or not list(folder.iterdir())


def test_a_device_that_processes_cannot_share_keeps_the_vios_from_starting(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-m", "farpage", "vios", "run", "one", "--dir", str(tmp_path / "one")),
            *("--device", "memory:8M", "--workers", "2"),
        ],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "run the VIOS without --workers for it" in done.stderr
