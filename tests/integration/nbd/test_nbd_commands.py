"""Every command from farpage's client through farpage's server to a BlockIO."""

from __future__ import annotations

import errno
import os
import random

import pytest

from farpage.address import TcpAddress
from farpage.blockio import CONNECTION_LOST, Allocation, BlockLimits, Extent, Feature
from farpage.nbd.client import Connection, list_exports
from tests.support.blockio import ALL_FEATURES, MemoryIO
from tests.support.commands import condition, extents_of, read_bytes, wait_done, write_bytes
from tests.support.nbd import serving

HOLE = Allocation.HOLE | Allocation.ZERO


@pytest.fixture(name="structured", params=[True, False], ids=["structured", "simple"])
def _structured(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.mark.parametrize("transport", [0, 1], ids=["unix", "tcp"])
async def test_what_was_written_is_read_back(transport: int, structured: bool) -> None:
    volume = MemoryIO(8 << 20)
    async with serving({"v": volume}) as serving_:
        address = serving_.server.addresses[transport]
        connection = await Connection.open(address, "v", structured_replies=structured)
        chance = random.Random(1)
        for length in (1, 512, 4096, 65_536, 1_000_001, 5 << 20):
            offset = chance.randrange(connection.size_bytes - length)
            data = chance.randbytes(length)
            assert await write_bytes(connection, offset, data) == 0
            assert await read_bytes(connection, offset, length) == data
            assert volume.content[offset : offset + length] == data
        await connection.close()


@pytest.mark.parametrize("length", [4096, 100_000, 300_000, 3 << 20, 5 << 20])
async def test_a_read_fills_the_callers_memory_with_data_and_holes(length: int, structured: bool) -> None:
    volume = MemoryIO(8 << 20, limits=BlockLimits(1, 4096, 4 << 20))
    chance = random.Random(length)
    for at in range(0, len(volume.content), 64 << 10):
        if chance.random() < 0.5:
            volume.content[at : at + 4096] = chance.randbytes(4096)
    async with serving({"v": volume}) as serving_:
        connection = await Connection.open(serving_.address, "v", structured_replies=structured)
        into = memoryview(bytearray(b"\xff" * (length + 2)))
        offset = chance.randrange(connection.size_bytes - length)
        assert await wait_done(lambda d: connection.read_into(offset, into[1:-1], d)) == 0
        assert into[1:-1] == volume.content[offset : offset + length]
        assert (into[0], into[-1]) == (255, 255)
        await connection.close()


async def test_a_read_into_memory_that_fails_or_is_cut_off_says_so() -> None:
    volume = MemoryIO(1 << 20)
    async with serving({"v": volume}) as serving_:
        connection = await Connection.open(serving_.address, "v")
        volume.content[:] = b"x" * (1 << 20)
        volume.errors["read"] = errno.EIO
        assert (
            await wait_done(lambda d: connection.read_into(0, memoryview(bytearray(1 << 19)), d)) == errno.EIO
        )
        connection.abort()
        lost = await wait_done(lambda d: connection.read_into(0, memoryview(bytearray(4096)), d))
        assert lost == CONNECTION_LOST


async def test_commands_reach_the_volume_with_their_flags() -> None:
    volume = MemoryIO(1 << 20)
    async with serving({"v": volume}) as serving_:
        connection = await Connection.open(serving_.address, "v")
        assert connection.features == ALL_FEATURES
        assert await write_bytes(connection, 0, b"abcd", fua=True) == 0
        assert await wait_done(lambda d: connection.zero(0, 4096, d, punch=False, fast=True, fua=True)) == 0
        assert await wait_done(lambda d: connection.zero(4096, 4096, d)) == 0
        assert await wait_done(lambda d: connection.trim(8192, 4096, d, fua=True)) == 0
        assert await wait_done(lambda d: connection.cache(0, 4096, d)) == 0
        assert await wait_done(connection.flush) == 0
        assert volume.log == [
            ("write", 0, 4, True),
            ("zero", 0, 4096, False, True, True),
            ("zero", 4096, 4096, True, False, False),
            ("trim", 8192, 4096, True),
            ("cache", 0, 4096),
            ("flush",),
        ]
        await connection.close()


async def test_extents_are_reported_and_merged() -> None:
    volume = MemoryIO(1 << 20)
    volume.content[8192:8195] = b"abc"
    async with serving({"v": volume}) as serving_:
        connection = await Connection.open(serving_.address, "v")
        assert await extents_of(connection, 0, 1 << 20) == [
            Extent(8192, HOLE),
            Extent(4096, Allocation.DATA),
            Extent((1 << 20) - 12288, HOLE),
        ]
        await connection.close()


async def test_a_sparse_read_brings_the_same_bytes() -> None:
    volume = MemoryIO(1 << 20)
    for offset in (0, 100_000, 300_000, 700_000):
        volume.content[offset : offset + 5000] = os.urandom(5000)
    for at_hand in (True, False):
        volume.at_hand = at_hand
        async with serving({"v": volume}) as serving_:
            connection = await Connection.open(serving_.address, "v")
            for offset, length in ((0, 1 << 20), (40_000, 200_000), (200_000, 65_536), (300_000, 40_000)):
                assert (
                    await read_bytes(connection, offset, length) == volume.content[offset : offset + length]
                )
            await connection.close()


async def test_replies_come_in_the_order_in_which_commands_finish() -> None:
    volume = MemoryIO(1 << 20, at_hand=False)
    volume.hold = True
    finished: list[int] = []
    async with serving({"v": volume}) as serving_:
        connection = await Connection.open(serving_.address, "v")

        def start(index: int) -> None:
            connection.read(index * 4096, 4096, lambda error, payload: finished.append(index))

        for index in range(4):
            start(index)
        await condition(lambda: len(volume.held) == 4)
        for index in (3, 1, 1, 0):
            volume.release(index)
        await condition(lambda: len(finished) == 4)
        assert finished == [3, 1, 2, 0]
        await connection.close()


async def test_a_thousand_commands_started_in_one_turn_all_finish() -> None:
    volume = MemoryIO(4 << 20)
    volume.content[:] = os.urandom(4 << 20)
    async with serving({"v": volume}) as serving_:
        connection = await Connection.open(serving_.address, "v")
        wrong: list[int] = []
        finished = 0

        def expect(offset: int) -> None:
            def done(error: int, payload: memoryview | None) -> None:
                nonlocal finished
                finished += 1
                if payload is None or bytes(payload) != volume.content[offset : offset + 4096]:
                    wrong.append(offset)

            connection.read(offset, 4096, done)

        for page in range(1024):
            expect(page * 4096)
        assert connection.in_flight == 1024
        connection.push()
        await condition(lambda: finished == 1024)
        assert wrong == []
        assert serving_.provider.counters["v"].reads == 1024
        assert serving_.provider.counters["v"].read_bytes == 4 << 20
        await connection.close()


async def test_many_connections_write_at_once_without_mixing() -> None:
    volume = MemoryIO(4 << 20)
    async with serving({"v": volume}) as serving_:
        connections = [await Connection.open(serving_.address, "v") for _ in range(8)]
        left = 8 * 128

        def done(error: int) -> None:
            nonlocal left
            assert error == 0
            left -= 1

        for page in range(128):
            for index, connection in enumerate(connections):
                at = (index * 128 + page) * 4096
                connection.write(at, memoryview(bytes([index + 1]) * 4096), done)
        await condition(lambda: left == 0)
        assert bytes(volume.content) == b"".join(bytes([i + 1]) * 128 * 4096 for i in range(8))
        for connection in connections:
            await connection.close()


async def test_requests_above_the_servers_limit_are_split() -> None:
    volume = MemoryIO(1 << 20, limits=BlockLimits(512, 4096, 65536), at_hand=False)
    async with serving({"v": volume}) as serving_:
        connection = await Connection.open(serving_.address, "v", block_status=False)
        data = os.urandom(200 * 1024)
        assert await write_bytes(connection, 512, data) == 0
        assert await read_bytes(connection, 512, len(data)) == data
        assert await wait_done(lambda d: connection.zero(0, 1 << 20, d)) == 0
        assert [entry[2] for entry in volume.log if entry[0] == "write"] == [65536] * 3 + [8192]
        assert [entry[2] for entry in volume.log if entry[0] == "zero"] == [65536] * 16
        assert volume.content == bytes(1 << 20)
        await connection.close()


async def test_a_split_request_fails_with_the_first_error() -> None:
    volume = MemoryIO(1 << 20, limits=BlockLimits(1, 4096, 65536))
    volume.errors["write"] = errno.ENOSPC
    async with serving({"v": volume}) as serving_:
        connection = await Connection.open(serving_.address, "v")
        assert await write_bytes(connection, 0, bytes(1 << 20)) == errno.ENOSPC
        await connection.close()


@pytest.mark.parametrize(
    ("name", "number", "expected"),
    [
        ("read", errno.EIO, errno.EIO),
        ("write", errno.EDQUOT, errno.ENOSPC),
        ("write", errno.EREMOTEIO, errno.EIO),
        ("zero", errno.ENOTSUP, errno.EINVAL),
        ("flush", errno.EIO, errno.EIO),
    ],
)
async def test_errors_of_the_volume_reach_the_client(
    structured: bool, name: str, number: int, expected: int
) -> None:
    volume = MemoryIO(1 << 20)
    volume.errors[name] = number
    async with serving({"v": volume}) as serving_:
        connection = await Connection.open(serving_.address, "v", structured_replies=structured)
        if name == "read":
            with pytest.raises(OSError) as caught:
                await read_bytes(connection, 0, 4096)
            error = caught.value.errno
        elif name == "write":
            error = await write_bytes(connection, 0, b"abcd")
        elif name == "zero":
            error = await wait_done(lambda d: connection.zero(0, 4096, d))
        else:
            error = await wait_done(connection.flush)
        assert error == expected
        assert serving_.provider.counters["v"].errors == 1
        await connection.close()


async def test_a_fast_zero_that_is_not_fast_says_so() -> None:
    volume = MemoryIO(1 << 20)
    volume.errors["zero"] = errno.ENOTSUP
    async with serving({"v": volume}) as serving_:
        connection = await Connection.open(serving_.address, "v")
        assert await wait_done(lambda d: connection.zero(0, 4096, d, fast=True)) == errno.ENOTSUP
        await connection.close()


async def test_a_volume_that_raises_costs_one_command_and_not_the_connection() -> None:
    class Broken(MemoryIO):
        def write(self, *arguments: object, **options: object) -> None:
            raise RuntimeError("a bug")

    async with serving({"v": Broken(1 << 20)}) as serving_:
        connection = await Connection.open(serving_.address, "v")
        assert await write_bytes(connection, 0, b"abcd") == errno.EIO
        assert await read_bytes(connection, 0, 4) == bytes(4)
        await connection.close()


async def test_commands_that_were_not_offered_finish_with_enotsup() -> None:
    async with serving({"v": MemoryIO(1 << 20, features=Feature.NONE)}) as serving_:
        connection = await Connection.open(serving_.address, "v")
        assert connection.features == Feature.NONE
        assert await wait_done(connection.flush) == errno.ENOTSUP
        assert await wait_done(lambda d: connection.trim(0, 4096, d)) == errno.ENOTSUP
        assert await wait_done(lambda d: connection.zero(0, 4096, d)) == errno.ENOTSUP
        assert await wait_done(lambda d: connection.cache(0, 4096, d)) == errno.ENOTSUP
        assert await write_bytes(connection, 0, b"x", fua=True) == errno.ENOTSUP
        with pytest.raises(OSError, match="extents"):
            await extents_of(connection, 0, 4096)
        await connection.close()


async def test_a_read_only_export_refuses_writes_before_they_are_sent() -> None:
    volume = MemoryIO(1 << 20, read_only=True)
    async with serving({"v": volume}) as serving_:
        connection = await Connection.open(serving_.address, "v")
        assert connection.read_only
        assert await write_bytes(connection, 0, b"x") == errno.EPERM
        assert await wait_done(lambda d: connection.trim(0, 4096, d)) == errno.EPERM
        await connection.close()
        assert volume.log == []


async def test_a_range_outside_or_across_blocks_is_the_callers_bug() -> None:
    async with serving({"v": MemoryIO(1 << 20, limits=BlockLimits(minimum=4096))}) as serving_:
        connection = await Connection.open(serving_.address, "v")
        assert connection.limits.minimum == 4096
        for offset, length in ((1 << 20, 4096), (-4096, 4096), (0, 0), (0, 512), (512, 4096)):
            with pytest.raises(ValueError, match="bytes at"):
                connection.read(offset, length, lambda error, payload: None)
        await connection.close()


async def test_exports_are_listed() -> None:
    exports = {f"volume-{index}": MemoryIO(4096) for index in range(300)}
    async with serving(dict(exports)) as serving_:
        for address in serving_.server.addresses:
            listed = await list_exports(address)
            assert listed == [(name, f"volume {name}") for name in exports]


async def test_the_server_knows_its_peer_and_the_client_its_server() -> None:
    async with serving({"v": MemoryIO(4096)}) as serving_:
        over_unix = await Connection.open(serving_.server.addresses[0], "v")
        over_tcp = await Connection.open(serving_.server.addresses[1], "v")
        assert over_unix.peer_pid == os.getpid()
        assert over_tcp.peer_pid is None
        first, second = serving_.provider.peers
        assert (first.pid, first.uid) == (os.getpid(), os.getuid())
        assert (second.pid, second.uid) == (None, None)
        assert isinstance(serving_.server.addresses[1], TcpAddress)
        assert second.address.startswith("tcp:127.0.0.1:")
        await over_unix.close()
        await over_tcp.close()


async def test_closing_waits_for_the_commands_in_flight() -> None:
    volume = MemoryIO(1 << 20, at_hand=False)
    volume.hold = True
    async with serving({"v": volume}) as serving_:
        connection = await Connection.open(serving_.address, "v")
        finished: list[int] = []
        connection.write(0, memoryview(b"abcd"), finished.append)
        connection.push()
        await condition(lambda: len(volume.held) == 1)
        volume.hold = False
        volume.release()
        await connection.close()
        assert finished == [0]
        await condition(lambda: serving_.provider.closed == ["v"])
        assert serving_.server.connections == ()
