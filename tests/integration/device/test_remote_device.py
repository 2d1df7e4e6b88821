"""What becomes of commands when the server of a remote device ends, hangs, or comes back as another."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import random
import signal
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from farpage.address import TcpAddress
from farpage.blockio import BlockIO, BlockLimits, Done, Feature, read_bytes
from farpage.device import reconnect
from farpage.device.claim import Claim
from farpage.device.errors import DeviceUnusable, VolumeMissing
from farpage.device.layout import DATA_OFFSET_BYTES
from farpage.device.open import open_device
from farpage.device.remote import RemoteDevice
from tests.support.blockio import ALL_FEATURES, MemoryIO
from tests.support.commands import condition
from tests.support.nbd import Serving, serving, short_folder
from tests.support.nbdkit import Nbdkit
from tests.support.volumes import extents, flush, read_error, trim, write, zero

SIZE = 2 << 20
STORAGE = SIZE + DATA_OFFSET_BYTES


class SlowWrites(MemoryIO):
    """Holds writes to the volume back while `hold_writes` is set; commands for the header go through."""

    hold_writes = False

    def write(self, offset: int, data: memoryview, done: Done, *, fua: bool = False) -> None:
        self.hold = self.hold_writes and offset >= DATA_OFFSET_BYTES
        super().write(offset, data, done, fua=fua)
        self.hold = False


@contextlib.asynccontextmanager
async def opened(spec: str, **options: object) -> AsyncIterator[RemoteDevice]:
    device = await open_device(spec, **options)  # type: ignore[arg-type]
    assert isinstance(device, RemoteDevice)
    try:
        yield device
    finally:
        await device.close()


@contextlib.asynccontextmanager
async def volume_on(device: RemoteDevice, epoch: int | None = 1) -> AsyncIterator[BlockIO]:
    """Make the volume if it is not there, and open it."""
    try:
        await device.run(device.volume, "vm1")
    except VolumeMissing:
        await device.run(device.create_volume, "vm1", SIZE)
    if epoch is not None:
        await device.run(device.claim, "vm1", Claim(epoch))
    volume = await device.open_volume("vm1", epoch)
    try:
        yield volume
    finally:
        await volume.close()


@contextlib.asynccontextmanager
async def served(io: MemoryIO) -> AsyncIterator[tuple[Serving, RemoteDevice, BlockIO]]:
    """Have a server in this process, a device on it, and its volume open."""
    async with (
        serving({"disk": io}) as server,
        opened(server.uri("disk")) as device,
        volume_on(device) as volume,
    ):
        yield server, device, volume


def cut(server: Serving) -> None:
    """End every connection; what is in flight at the server goes on there."""
    for connection in server.server.connections:
        connection.disconnect()


def refuse_held(io: MemoryIO) -> None:
    """Have the server end the writes that it holds without carrying them out, as one that shuts down does."""
    io.errors["write"] = errno.ESHUTDOWN
    io.release_all()
    io.errors.clear()


def start(command: Callable[[Done], None]) -> asyncio.Future[int]:
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    command(future.set_result)
    return future


@pytest.fixture
def folder() -> AsyncIterator[Path]:  # type: ignore[misc]
    with short_folder() as folder:
        yield folder


@pytest.fixture
def image(tmp_path: Path) -> Path:
    with (tmp_path / "image").open("wb") as file:
        file.truncate(STORAGE)
    return tmp_path / "image"


# Ends and returns


async def test_a_server_restarted_under_writes_loses_nothing(folder: Path, image: Path) -> None:
    chance = random.Random(2)
    pages = SIZE // 4096
    model = [bytes(4096)] * pages
    async with (
        Nbdkit(folder / "s", "file", str(image)) as server,
        opened(server.uri) as device,
        volume_on(device) as volume,
    ):
        stop = asyncio.Event()

        async def keep_writing(mine: range) -> int:
            written = 0
            while not stop.is_set():
                page = chance.choice(mine)
                data = chance.randbytes(4096)
                assert await write(volume, page * 4096, data) == 0
                model[page] = data
                written += 1
            return written

        tasks = [asyncio.create_task(keep_writing(range(part, pages, 8))) for part in range(8)]
        for round_number in range(1, 6):
            before = device.reconnects
            await server.kill()
            await condition(lambda: "0 connections" in device.access)
            await server.start()
            await condition(lambda: device.reconnects > before)  # noqa: B023
            page = round_number
            await read_bytes(volume, page * 4096, 4096)
        stop.set()
        assert min(await asyncio.gather(*tasks)) > 0
        assert device.reconnects >= 5
        assert await read_bytes(volume, 0, SIZE) == b"".join(model)


async def test_commands_in_flight_are_repeated_on_another_connection() -> None:
    io = SlowWrites(STORAGE)
    async with served(io) as (server, device, volume):
        io.hold_writes = True
        data = os.urandom(4096)
        writing = asyncio.create_task(write(volume, 0, data))
        await condition(lambda: bool(io.held))
        io.hold_writes = False
        cut(server)
        assert await writing == 0
        io.release_all()
        assert device.reconnects >= 1
        assert await read_bytes(volume, 0, 4096) == data


async def test_a_repeated_write_never_undoes_a_later_one_of_the_same_range() -> None:
    io = SlowWrites(STORAGE)
    async with served(io) as (server, device, volume):
        await condition(lambda: device.access == "4 connections")
        io.hold_writes = True
        first = start(lambda done: volume.write(0, memoryview(b"1" * 8192), done))
        await condition(lambda: len(io.held) == 1)
        second = start(lambda done: volume.write(4096, memoryview(b"2" * 4096), done))
        elsewhere = start(lambda done: volume.write(65536, memoryview(b"3" * 4096), done))
        await condition(lambda: len(io.held) == 2)
        io.hold_writes = False
        cut(server)
        assert not any(await asyncio.gather(first, second, elsewhere))
        assert await read_bytes(volume, 0, 8192) == b"1" * 4096 + b"2" * 4096
        io.release_all()


@pytest.mark.parametrize("lost", [True, False], ids=["connection_lost", "server_shuts_down"])
async def test_a_write_is_not_repeated_once_a_newer_owner_has_the_volume(lost: bool) -> None:
    io = SlowWrites(STORAGE)
    async with (
        served(io) as (server, _device, old),
        opened(server.uri("disk")) as other_device,
    ):
        io.hold_writes = True
        late = start(lambda done: old.write(0, memoryview(b"1" * 4096), done))
        await condition(lambda: bool(io.held))
        io.hold_writes = False
        async with volume_on(other_device, 2) as new:
            assert await write(new, 0, b"2" * 4096) == 0
            if lost:
                cut(server)
            refuse_held(io)
            assert await late == errno.ESHUTDOWN
            assert await read_bytes(new, 0, 4096) == b"2" * 4096


async def test_a_write_is_not_repeated_once_the_lease_is_over() -> None:
    io = SlowWrites(STORAGE)
    over = False
    async with served(io) as (server, device, _volume):
        volume = await device.open_volume("vm1", 1, lambda: over)
        io.hold_writes = True
        late = start(lambda done: volume.write(0, memoryview(b"1" * 4096), done))
        await condition(lambda: bool(io.held))
        io.hold_writes = False
        over = True
        cut(server)
        refuse_held(io)
        assert await late == errno.ESHUTDOWN
        assert await read_bytes(volume, 0, 4096) == bytes(4096)
        await volume.close()


async def test_without_a_server_commands_fail_after_a_while_and_work_again_when_it_is_back(
    folder: Path, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconnect, "WAIT_SECONDS", 0.1)
    async with (
        Nbdkit(folder / "s", "file", str(image)) as server,
        opened(server.uri) as device,
        volume_on(device) as volume,
    ):
        assert await write(volume, 0, b"x" * 4096) == 0
        await server.kill()
        assert await read_error(volume, 0, 4096) == errno.EIO
        assert await write(volume, 4096, bytes(4096)) == errno.EIO
        assert await flush(volume) == errno.EIO
        with pytest.raises(DeviceUnusable):
            await device.run(device.volume, "vm1")
        with pytest.raises(DeviceUnusable):
            device.usage()
        await server.start()
        await condition(lambda: device.access != "0 connections")
        assert await read_bytes(volume, 0, 4096) == b"x" * 4096


async def test_a_server_that_returns_without_the_contents_is_not_used(
    folder: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reconnect, "WAIT_SECONDS", 0.2)
    async with (
        Nbdkit(folder / "s", "file", str(image)) as server,
        opened(server.uri) as device,
        volume_on(device) as volume,
    ):
        assert await write(volume, 0, b"x" * 4096) == 0
        await server.kill()
        await server.start("memory", str(STORAGE))
        assert await read_error(volume, 0, 4096) == errno.EIO
        with pytest.raises(DeviceUnusable, match="another label, or none"):
            device.usage()
        await server.kill()
        await server.start("memory", str(STORAGE * 2))
        assert await read_error(volume, 0, 4096) == errno.EIO
        with pytest.raises(DeviceUnusable, match=f"{STORAGE * 2} bytes now"):
            device.usage()
        await server.kill()
        await server.start("file", str(image))
        await condition(lambda: device.access != "0 connections")
        assert await read_bytes(volume, 0, 4096) == b"x" * 4096


async def test_a_server_that_hangs_holds_up_its_own_device_only(folder: Path, image: Path) -> None:
    async with (
        Nbdkit(folder / "s", "file", str(image)) as server,
        opened(server.uri) as device,
        volume_on(device) as volume,
        served(MemoryIO(STORAGE)) as (_, other, other_volume),
    ):
        server.signal(signal.SIGSTOP)
        writing = start(lambda done: volume.write(0, memoryview(b"x" * 4096), done))
        asking = asyncio.create_task(device.run(device.volume, "vm1"))
        assert await write(other_volume, 0, b"y" * 4096) == 0
        assert (await other.run(other.volume, "vm1")).size_bytes == SIZE
        # Only an answer says that the write cannot come late any more.
        assert not writing.done()
        server.signal(signal.SIGCONT)
        assert await writing == 0
        assert (await asking).size_bytes == SIZE


async def test_a_server_that_ends_is_not_taken_for_another_owner() -> None:
    io = MemoryIO(STORAGE)
    async with served(io) as (_, _device, volume):
        io.errors["write"] = errno.ESHUTDOWN
        writing = start(lambda done: volume.write(0, memoryview(b"x" * 4096), done))
        await condition(lambda: io.log.count(("write", DATA_OFFSET_BYTES, 4096, False)) >= 1)
        io.errors.clear()
        assert await writing == 0


async def test_no_server_at_the_start_is_a_clear_refusal(folder: Path) -> None:
    with pytest.raises(DeviceUnusable, match="cannot be reached") as caught:
        await open_device(f"nbd+unix:///disk?socket={folder}/s")
    assert "NBD server runs" in caught.value.advice


async def test_a_server_is_reached_over_tcp() -> None:
    async with serving({"disk": MemoryIO(STORAGE)}) as server:
        address = server.server.addresses[1]
        assert isinstance(address, TcpAddress)
        async with opened(f"nbd://{address.host}:{address.port}/disk") as device, volume_on(device) as volume:
            assert await write(volume, 0, b"x" * 4096) == 0
            assert await read_bytes(volume, 0, 4096) == b"x" * 4096


async def test_a_server_that_has_no_such_export_says_so() -> None:
    async with serving({"disk": MemoryIO(STORAGE)}) as server:
        with pytest.raises(DeviceUnusable, match="refuses it"):
            await open_device(server.uri("other"))


# What the server can do


async def test_several_connections_where_the_server_allows_them() -> None:
    async with served(MemoryIO(STORAGE)) as (server, device, _):
        await condition(lambda: device.access == "4 connections")
        await condition(lambda: len(server.server.connections) == 4)


async def test_one_connection_where_it_does_not() -> None:
    async with served(MemoryIO(STORAGE, features=ALL_FEATURES & ~Feature.MULTI_CONN)) as (
        server,
        device,
        volume,
    ):
        assert await write(volume, 0, b"x" * 4096) == 0
        assert device.access == "1 connection"
        assert len(server.server.connections) == 1
        assert Feature.MULTI_CONN in volume.features


async def test_one_connection_for_as_long_as_the_server_allows_no_more() -> None:
    io = MemoryIO(STORAGE)
    async with served(io) as (server, device, volume):
        await condition(lambda: device.access == "4 connections")
        io._features &= ~Feature.MULTI_CONN
        opened_before = len(server.provider.opened)
        cut(server)
        # Each of the four places asks for a connection, and one gets it.
        await condition(lambda: len(server.provider.opened) == opened_before + 4)
        await condition(lambda: len(server.server.connections) == 1)
        assert device.access == "1 connection"
        assert await write(volume, 0, b"x" * 4096) == 0
        io._features |= Feature.MULTI_CONN
        cut(server)
        await condition(lambda: device.access == "4 connections")


@pytest.mark.parametrize("features", [Feature.NONE, Feature.FLUSH, Feature.ZERO | Feature.FLUSH], ids=str)
async def test_what_a_server_cannot_do_is_not_offered(features: Feature) -> None:
    io = MemoryIO(STORAGE, features=features)
    async with served(io) as (_, _device, volume):
        # Block status needs no flag of the server: it is negotiated.
        offered = volume.features & ~(Feature.MULTI_CONN | Feature.EXTENTS)
        assert offered == features
        assert await write(volume, 0, b"x" * 8192) == 0
        assert await zero(volume, 0, 4096) == (0 if Feature.ZERO in features else errno.ENOTSUP)
        assert await flush(volume) == (0 if Feature.FLUSH in features else errno.ENOTSUP)
        assert await trim(volume, 0, 4096) == errno.ENOTSUP
        assert await read_bytes(volume, 4096, 4096) == b"x" * 4096


async def test_block_status_is_passed_on() -> None:
    async with served(MemoryIO(STORAGE)) as (_, _device, volume):
        assert await write(volume, 4096, b"x" * 4096) == 0
        error, found = await extents(volume, 0, 12288)
        assert error == 0
        assert found is not None
        assert [(extent.length, int(extent.allocation)) for extent in found] == [
            (4096, 3),
            (4096, 0),
            (4096, 3),
        ]


async def test_requests_are_split_at_the_servers_maximum() -> None:
    io = MemoryIO(STORAGE, limits=BlockLimits(512, 4096, 64 << 10))
    async with served(io) as (_, _device, volume):
        assert (volume.limits.minimum, volume.limits.maximum) == (512, 32 << 20)
        data = os.urandom(1 << 20)
        assert await write(volume, 0, data) == 0
        assert await read_bytes(volume, 0, 1 << 20) == data
        assert max(int(str(entry[2])) for entry in io.log if entry[0] == "write") == 64 << 10


async def test_blocks_longer_than_a_page_are_refused() -> None:
    async with serving({"disk": MemoryIO(STORAGE, limits=BlockLimits(8192, 8192))}) as server:
        with pytest.raises(DeviceUnusable, match="longer than a page"):
            await open_device(server.uri("disk"))


async def test_a_read_only_export_takes_no_owner(folder: Path, image: Path) -> None:
    async with Nbdkit(folder / "s", "-r", "file", str(image)) as server:
        with pytest.raises(DeviceUnusable, match="read-only and has no farpage label"):
            await open_device(server.uri)
        await server.kill()
        await server.start("file", str(image))
        async with opened(server.uri) as device, volume_on(device) as volume:
            assert await write(volume, 0, b"x" * 4096) == 0
        await server.kill()
        await server.start("-r", "file", str(image))
        async with opened(server.uri) as device:
            with pytest.raises(DeviceUnusable, match="read-only"):
                await device.run(device.claim, "vm1", Claim(2))
            with pytest.raises(DeviceUnusable, match="read-only"):
                await device.open_volume("vm1", 1)
            async with volume_on(device, None) as view:
                assert await read_bytes(view, 0, 4096) == b"x" * 4096
                assert await write(view, 0, bytes(4096)) == errno.EPERM


async def test_an_export_that_holds_something_is_refused_until_forced() -> None:
    io = MemoryIO(STORAGE)
    io.content[4086:4096] = b"SWAPSPACE2"
    io.content[1024:1032] = (1).to_bytes(4, "little") + (500).to_bytes(4, "little")
    async with serving({"disk": io}) as server:
        with pytest.raises(DeviceUnusable, match="blkid finds swap"):
            await open_device(server.uri("disk"))
        async with opened(server.uri("disk"), force=True):
            pass


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO])
async def test_errors_of_the_server_arrive(error: int) -> None:
    io = MemoryIO(STORAGE)
    async with served(io) as (_, _device, volume):
        io.errors["write"] = error
        assert await write(volume, 0, bytes(4096)) == error
        io.errors.clear()


async def test_many_changes_share_a_look_at_the_header() -> None:
    io = MemoryIO(STORAGE)
    async with served(io) as (_, _device, volume):
        io.log.clear()
        io.at_hand = False
        assert not any(
            await asyncio.gather(*(write(volume, page * 4096, bytes(4096)) for page in range(200)))
        )
        looks = sum(entry[:2] == ("read", 0) for entry in io.log)
        assert 1 <= looks <= 3
