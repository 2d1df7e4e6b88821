"""Connections in a thread of their own, with the fast paths as machine code and as their twins."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from farpage.address import Address, TcpAddress, UnixAddress
from farpage.blockio import CONNECTION_LOST, BlockIO, wait_done
from farpage.device.block import BlockDevice
from farpage.device.directory import DirectoryDevice
from farpage.device.open import open_device
from farpage.errors import Unsupported
from farpage.kernel.aio import AsyncWrites
from farpage.kernel.scheduling import LONGEST_SLICE_SECONDS
from farpage.nbd import codec, directpath, fastpath, lane
from farpage.nbd import protocol as p
from farpage.nbd.client import Connection
from farpage.nbd.server import Server
from tests.support.commands import condition, read_bytes, write_bytes
from tests.support.loopdevice import loop_device
from tests.support.nbd import Exports, RawClient, short_folder
from tests.support.processes import descriptors_of, slice_of

VOLUME_BYTES = 8 << 20
COMPILED = lane.FAST_PATHS
TWINS = (fastpath.FastPath, directpath.DirectPath)


@pytest.fixture(
    name="paths",
    autouse=True,
    params=[
        pytest.param(
            COMPILED, id="compiled", marks=pytest.mark.skipif(COMPILED == TWINS, reason="not compiled")
        ),
        pytest.param(TWINS, id="twin"),
    ],
)
def _paths(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lane, "FAST_PATHS", request.param)


@pytest.fixture(name="mode", params=["buffered", "direct"])
def _mode(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@dataclass
class Served:
    server: Server
    device: DirectoryDevice
    volume: BlockIO
    provider: Exports
    addresses: tuple[Address, ...]
    over: list[bool] = field(default_factory=list)

    def in_lane(self) -> bool:
        """Whether every connection is in its lane."""
        transmissions = [connection._transmission for connection in self.server.connections]
        return bool(transmissions) and all(t is not None and t._crossing.in_lane for t in transmissions)


@asynccontextmanager
async def served(folder: Path, mode: str, over: Callable[[], bool] | None = None) -> AsyncIterator[Served]:
    device = await open_device(f"dir:{folder / 'device'}?size=32M&cache={mode}")
    assert isinstance(device, DirectoryDevice)
    if mode == "direct" and device.access != "direct":
        pytest.skip("no direct I/O on this file system")
    device.create_volume("v", VOLUME_BYTES)
    volume = await device.open_volume("v", 1) if over is None else await device.open_volume("v", 1, over)
    provider = Exports({"v": volume})
    server = Server(provider)
    with short_folder() as sockets:
        await server.start([UnixAddress(str(sockets / "s")), TcpAddress("127.0.0.1", 0)])
        try:
            yield Served(server, device, volume, provider, server.addresses)
        finally:
            await server.close()
            await volume.close()
            await device.close()


@pytest.mark.parametrize("structured", [True, False], ids=["structured", "simple"])
@pytest.mark.parametrize("transport", [0, 1], ids=["unix", "tcp"])
async def test_random_commands_leave_what_a_plain_buffer_would_hold(
    tmp_path: Path, mode: str, transport: int, structured: bool
) -> None:
    async with served(tmp_path, mode) as at:
        connection = await Connection.open(at.addresses[transport], "v", structured_replies=structured)
        chance, content = random.Random(transport), bytearray(VOLUME_BYTES)
        for _ in range(40):
            slots = chance.sample(range(16), 12)
            pending = []
            for slot in slots:
                length = chance.choice([1, 512, 4096, 4096, 16384, 300_000])
                offset = slot * 500_000 + chance.choice([0, 4096, 77])
                if chance.random() < 0.5:
                    data = chance.randbytes(length)
                    content[offset : offset + length] = data
                    pending.append(write_bytes(connection, offset, data))
                else:
                    pending.append(_reads(connection, offset, content[offset : offset + length]))
            if chance.random() < 0.1:
                pending.append(wait_done(connection.flush))
            assert set(await asyncio.gather(*pending)) == {0}
        await connection.close()
        assert await read_bytes(at.volume, 0, VOLUME_BYTES) == content


async def _reads(connection: Connection, offset: int, expected: bytes | bytearray) -> int:
    assert await read_bytes(connection, offset, len(expected)) == expected
    return 0


async def test_a_thread_that_only_writes_gives_its_core_to_whoever_wakes(tmp_path: Path, mode: str) -> None:
    if not slice_of(threading.get_native_id()):
        pytest.skip("threads have no slices of their own before Linux 6.12")
    async with served(tmp_path, mode) as at:
        before = set(threading.enumerate())
        connection = await Connection.open(at.addresses[0], "v")
        usual = slice_of(threading.get_native_id())
        assert await write_bytes(connection, 0, bytes(8192)) == 0
        await condition(at.in_lane)
        (thread,) = [thread for thread in set(threading.enumerate()) - before if thread.name == "nbd-lane"]
        number = thread.native_id
        assert number is not None
        assert slice_of(number) == usual
        end = time.monotonic() + 10
        while slice_of(number) == usual:
            assert time.monotonic() < end
            assert await write_bytes(connection, 4096, bytes(4096)) == 0
        assert slice_of(number) == LONGEST_SLICE_SECONDS
        while slice_of(number) != usual:
            assert time.monotonic() < end
            assert await read_bytes(connection, 4096, 4096) == bytes(4096)
        await connection.close()


async def test_a_connection_is_in_its_lane_again_after_enough_that_suits_it(
    tmp_path: Path, mode: str
) -> None:
    async with served(tmp_path, mode) as at:
        connection = await Connection.open(at.addresses[0], "v")
        assert await write_bytes(connection, 0, bytes(8192)) == 0
        await condition(at.in_lane)
        assert await wait_done(connection.flush) == 0
        assert not at.in_lane()
        for number in range(70):
            assert await read_bytes(connection, number * 4096, 4096) == bytes(4096)
        await condition(at.in_lane)
        counters = at.provider.counters["v"]
        before = counters.reads
        assert await read_bytes(connection, 4096, 4096) == bytes(4096)
        assert counters.reads == before + 1
        await connection.close()
    await condition(lambda: not any(thread.name == "nbd-lane" for thread in threading.enumerate()))


async def test_a_turn_that_was_due_before_the_connection_goes_over_leaves_it_alone(
    tmp_path: Path, mode: str
) -> None:
    async with served(tmp_path, mode) as at:
        connection = await Connection.open(at.addresses[0], "v")
        assert await write_bytes(connection, 0, b"a" * 8192) == 0
        await condition(at.in_lane)
        assert await wait_done(connection.flush) == 0
        (served_connection,) = at.server.connections
        transmission = served_connection._transmission
        assert transmission is not None
        transmission._crossing.suited_requests = 1 << 20
        asyncio.get_running_loop().call_soon(transmission._resume)
        transmission._consider_lane()
        await condition(at.in_lane)
        assert not transmission._reading
        for number in range(70):
            assert await read_bytes(connection, number % 2 * 4096, 4096) == b"a" * 4096
        await connection.close()


async def test_writes_of_a_lease_that_is_over_are_refused(tmp_path: Path, mode: str) -> None:
    over = [False]
    async with served(tmp_path, mode, lambda: over[0]) as at:
        connection = await Connection.open(at.addresses[0], "v")
        assert await write_bytes(connection, 0, b"x" * 4096) == 0
        await condition(at.in_lane)
        over[0] = True
        assert await write_bytes(connection, 0, b"y" * 4096) == errno.ESHUTDOWN
        assert await read_bytes(connection, 0, 4096) == b"x" * 4096
        await connection.close()


async def test_writes_of_an_older_owner_are_refused(tmp_path: Path, mode: str) -> None:
    async with served(tmp_path, mode) as at:
        connection = await Connection.open(at.addresses[0], "v")
        assert await write_bytes(connection, 0, b"x" * 4096) == 0
        await condition(at.in_lane)
        newer = at.device.volume("v").claim._replace(epoch=7)
        at.device.claim("v", newer)
        assert await write_bytes(connection, 0, b"y" * 4096) == errno.ESHUTDOWN
        assert await read_bytes(at.volume, 0, 4096) == b"x" * 4096
        await connection.close()


async def test_fencing_waits_for_a_write_that_hangs_and_lets_none_begin(tmp_path: Path, mode: str) -> None:
    held, asked = threading.Event(), threading.Event()
    hold = [False]

    def over() -> bool:
        if hold[0] and threading.current_thread().name == "nbd-lane":
            asked.set()
            held.wait(10)
        return False

    count = 80  # more than a connection has in flight
    async with served(tmp_path, mode, over) as at:
        connection = await Connection.open(at.addresses[0], "v")
        assert await write_bytes(connection, 0, b"x" * 4096) == 0
        await condition(at.in_lane)
        hold[0] = True
        errors: list[int] = []
        for number in range(count):
            connection.write(number * 4096, memoryview(b"y" * 4096), errors.append)
        connection.push()
        await condition(asked.is_set)
        (server_side,) = at.server.connections
        assert (server_side.in_flight_past_counters > 0) == (mode == "direct")
        fencing = asyncio.create_task(at.server.fence(lambda export: True))
        await asyncio.sleep(0.05)
        assert not fencing.done()
        held.set()
        await fencing
        assert at.server.connections == ()
        await condition(lambda: len(errors) == count)
        written = await read_bytes(at.volume, 0, count * 4096)
        for number in range(count):
            if errors[number]:
                place = written[number * 4096 : (number + 1) * 4096]
                assert place == (b"x" if number == 0 else b"\0") * 4096
        assert set(errors) - {0} <= {errno.ESHUTDOWN, CONNECTION_LOST}
        assert any(errors)


async def test_a_part_of_a_block_that_another_one_changes_takes_no_write_of_the_block_back(
    tmp_path: Path, mode: str
) -> None:
    async with served(tmp_path, mode) as at:
        whole, part = [await Connection.open(at.addresses[0], "v") for _ in range(2)]
        done = False

        async def change_parts() -> None:
            while not done:
                assert await write_bytes(part, 100, b"p" * 50) == 0

        changing = asyncio.create_task(change_parts())
        for number in range(150):
            block = bytes((number,)) * 4096
            assert await write_bytes(whole, 0, block) == 0
            found = await read_bytes(whole, 0, 4096)
            assert found[:100] + found[150:] == block[:100] + block[150:]
        done = True
        await changing
        await whole.close()
        await part.close()


async def test_writes_that_fail_are_reported_and_others_go_on(tmp_path: Path) -> None:
    async with served(tmp_path, "direct") as at:
        connection = await Connection.open(at.addresses[0], "v")
        assert await write_bytes(connection, 0, b"x" * 4096) == 0
        await condition(at.in_lane)
        (file,) = (tmp_path / "device" / "volumes").iterdir()
        os.truncate(file, VOLUME_BYTES // 2)
        errors = await asyncio.gather(
            *(write_bytes(connection, number * 4096, b"y" * 4096) for number in range(40))
        )
        assert set(errors) == {errno.EIO}
        os.truncate(file, VOLUME_BYTES)
        assert await write_bytes(connection, 0, b"z" * 4096) == 0
        assert await read_bytes(at.volume, 0, 4096) == b"z" * 4096
        await connection.close()


async def test_a_block_device_is_written_for_as_long_as_its_claim_is_the_writers(tmp_path: Path) -> None:
    with loop_device(tmp_path / "disk", 16 << 20) as disk:
        device = await open_device(f"block:{disk}")
        assert isinstance(device, BlockDevice)
        device.create_volume("v", VOLUME_BYTES)
        volume = await device.open_volume("v", 1)
        server = Server(Exports({"v": volume}))
        with short_folder() as sockets:
            await server.start([UnixAddress(str(sockets / "s"))])
            connection = await Connection.open(server.addresses[0], "v")
            data = [bytes((number,)) * 4096 for number in range(64)]
            writes = [write_bytes(connection, number * 4096, data[number]) for number in range(64)]
            assert set(await asyncio.gather(*writes)) == {0}
            (server_side,) = server.connections
            await condition(
                lambda: server_side._transmission is not None and server_side._transmission._crossing.in_lane
            )
            device.claim("v", device.volume("v").claim._replace(epoch=7))
            assert await write_bytes(connection, 0, b"y" * 4096) == errno.ESHUTDOWN
            assert await read_bytes(volume, 0, 64 * 4096) == b"".join(data)
            await connection.close()
            await server.close()
        await volume.close()
        await device.close()


async def test_without_a_thread_the_loop_serves(
    tmp_path: Path, mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = threading.Thread.start

    def start(thread: threading.Thread) -> None:
        if thread.name == "nbd-lane":
            raise RuntimeError("can't start new thread")
        started(thread)

    monkeypatch.setattr(threading.Thread, "start", start)
    async with served(tmp_path, mode) as at:
        before = len(descriptors_of(os.getpid()))
        connection = await Connection.open(at.addresses[0], "v")
        for number in range(70):
            assert await write_bytes(connection, number * 4096, b"x" * 4096) == 0
            assert await read_bytes(connection, number * 4096, 4096) == b"x" * 4096
        assert not at.in_lane()
        assert len(descriptors_of(os.getpid())) == before + 2  # both ends of the connection
        await connection.close()


async def test_without_asynchronous_writes_the_loop_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(entries: int, *, waits: bool) -> AsyncWrites:
        raise Unsupported("asynchronous writes", "none are left", "raise 'sysctl fs.aio-max-nr'")

    monkeypatch.setattr(lane, "AsyncWrites", refused)
    async with served(tmp_path, "direct") as at:
        connection = await Connection.open(at.addresses[0], "v")
        for number in range(70):
            assert await write_bytes(connection, number * 4096, b"x" * 4096) == 0
        assert not at.in_lane()
        for number in range(70):
            assert await read_bytes(connection, number * 4096, 4096) == b"x" * 4096
        await condition(at.in_lane)
        await connection.close()


async def test_disconnecting_lets_go_of_the_export_and_of_the_thread(tmp_path: Path, mode: str) -> None:
    async with served(tmp_path, mode) as at:
        connection = await Connection.open(at.addresses[0], "v")
        for number in range(70):
            await read_bytes(connection, number * 4096, 4096)
        await condition(at.in_lane)
        (server_side,) = at.server.connections
        server_side.disconnect()
        await server_side.wait_closed()
        assert at.provider.closed == ["v"]
    await condition(lambda: not any(thread.name == "nbd-lane" for thread in threading.enumerate()))


async def test_wrong_bytes_end_the_connection_and_nothing_else(tmp_path: Path, mode: str) -> None:
    async with served(tmp_path, mode) as at:
        other = await Connection.open(at.addresses[0], "v")
        chance = random.Random(3)
        for _ in range(20):
            address = at.addresses[0]
            assert isinstance(address, UnixAddress)
            client = await RawClient.connect(address.path)
            await client.go("v")
            good = codec.encode_request(p.NBD_CMD_READ, 0, 5, 0, 4096)
            client.send(good * chance.randrange(4) + chance.randbytes(chance.randrange(28, 200)))
            client.writer.write_eof()
            while await client.reader.read(1 << 16):
                pass
            await client.close()
        assert await read_bytes(other, 0, 4096) == bytes(4096)
        await other.close()


async def test_a_request_that_comes_byte_by_byte_is_carried_out_once(tmp_path: Path, mode: str) -> None:
    length = 64 if mode == "buffered" else 4096
    async with served(tmp_path, mode) as at:
        address = at.addresses[0]
        assert isinstance(address, UnixAddress)
        client = await RawClient.connect(address.path)
        await client.go("v")
        message = codec.encode_request(p.NBD_CMD_WRITE, 0, 9, 4096, length) + b"z" * length
        for at_byte in [*range(60), *range(60, len(message), 499)]:
            client.send(message[at_byte : at_byte + (1 if at_byte < 60 else 499)])
            await asyncio.sleep(0.001)
        assert (await client.simple_reply())[:2] == (0, 9)
        assert await read_bytes(at.volume, 4096, length) == b"z" * length
        assert at.provider.counters["v"].writes == 1
        await client.close()


async def test_replies_that_nobody_reads_hold_up_no_other_connection(tmp_path: Path, mode: str) -> None:
    async with served(tmp_path, mode) as at:
        address = at.addresses[0]
        assert isinstance(address, UnixAddress)
        client = await RawClient.connect(address.path)
        await client.go("v")
        count = 4000
        for number in range(count):
            client.send(codec.encode_request(p.NBD_CMD_READ, 0, number, number % 1000 * 4096, 4096))
        other = await Connection.open(address, "v")
        began = time.monotonic()
        for number in range(50):
            assert await read_bytes(other, number * 4096, 4096) == bytes(4096)
        assert time.monotonic() - began < 5
        await other.close()
        cookies = set()
        for _ in range(count):
            error, cookie, _ = await client.simple_reply(4096)
            assert error == 0
            cookies.add(cookie)
        assert cookies == set(range(count))
        await client.close()
