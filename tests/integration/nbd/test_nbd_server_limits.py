"""What the server does with clients that err, lie, dawdle or want too much."""

from __future__ import annotations

import asyncio
import errno
import socket
from pathlib import Path

import pytest

from farpage.address import UnixAddress
from farpage.blockio import Allocation, BlockLimits, Extent, Feature
from farpage.nbd import codec, options
from farpage.nbd import protocol as p
from farpage.nbd.client import Connection
from farpage.nbd.server import ListenFailed, Server
from farpage.nbd.transmission import (
    COMMANDS_IN_FLIGHT_MAX,
    DISCARDED_PAYLOAD_MAX_BYTES,
    PAYLOAD_IN_FLIGHT_MAX_BYTES,
    TURN_COST_MAX,
)
from tests.support.blockio import MemoryIO
from tests.support.commands import condition, read_bytes
from tests.support.nbd import Exports, RawClient, Serving, serving

SIZE = 1 << 20


async def entered(serving_: Serving, *, structured: bool = False) -> RawClient:
    client = await RawClient.connect(serving_.unix_path)
    await client.go("v", structured=structured)
    return client


def files_in(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


async def test_an_unknown_export_is_refused_with_the_providers_words() -> None:
    async with serving({"v": MemoryIO(SIZE)}) as serving_:
        client = await RawClient.connect(serving_.unix_path)
        await client.greet()
        request = options.encode_info_request(options.InfoRequest("nothing", ()))
        for option in (p.NBD_OPT_GO, p.NBD_OPT_INFO):
            reply, message, _ = await client.option(option, request)
            assert reply == p.NBD_REP_ERR_UNKNOWN
            assert b"'nothing' is not available" in message
        client.send(options.encode_option(p.NBD_OPT_EXPORT_NAME, b"nothing"))
        assert await client.at_end()
        await client.close()
        assert serving_.provider.opened == []


async def test_info_opens_nothing() -> None:
    async with serving({"v": MemoryIO(SIZE)}) as serving_:
        client = await RawClient.connect(serving_.unix_path)
        await client.greet()
        reply, _, _ = await client.option(
            p.NBD_OPT_INFO, options.encode_info_request(options.InfoRequest("v", ()))
        )
        assert reply == p.NBD_REP_ACK
        await client.close()
        assert serving_.provider.opened == []


async def test_export_name_enters_the_transmission() -> None:
    async with serving({"v": MemoryIO(SIZE)}) as serving_:
        client = await RawClient.connect(serving_.unix_path)
        await client.greet(p.NBD_FLAG_C_FIXED_NEWSTYLE)
        client.send(options.encode_option(p.NBD_OPT_EXPORT_NAME, b"v"))
        size, flags = options.EXPORT_NAME_REPLY.unpack(await client.reader.readexactly(10))
        assert size == SIZE
        assert flags & p.NBD_FLAG_HAS_FLAGS
        assert await client.reader.readexactly(124) == bytes(124)
        client.request(p.NBD_CMD_READ, 1, 0, 4)
        assert await client.simple_reply(4) == (0, 1, bytes(4))
        await client.close()


async def test_a_request_sent_with_the_last_option_is_answered() -> None:
    async with serving({"v": MemoryIO(SIZE)}) as serving_:
        client = await RawClient.connect(serving_.unix_path)
        await client.greet()
        client.send(
            options.encode_option(p.NBD_OPT_GO, options.encode_info_request(options.InfoRequest("v", ())))
            + codec.encode_request(p.NBD_CMD_FLUSH, 0, 9, 0, 0)
        )
        while True:
            _, _, reply, length = options.OPTION_REPLY.unpack(await client.reader.readexactly(20))
            await client.reader.readexactly(length)
            if reply == p.NBD_REP_ACK:
                break
        assert await client.simple_reply() == (0, 9, b"")
        await client.close()


REFUSED = {
    "read beyond the end": (p.NBD_CMD_READ, 0, SIZE - 4096, 8192, p.NBD_EINVAL),
    "read far beyond the end": (p.NBD_CMD_READ, 0, (1 << 64) - 4096, 4096, p.NBD_EINVAL),
    "read nothing": (p.NBD_CMD_READ, 0, 0, 0, p.NBD_EINVAL),
    "read too much": (p.NBD_CMD_READ, 0, 0, 0xFFFFFFFF, p.NBD_EINVAL),
    "read across blocks": (p.NBD_CMD_READ, 0, 100, 512, p.NBD_EINVAL),
    "read a part of a block": (p.NBD_CMD_READ, 0, 512, 100, p.NBD_EINVAL),
    "read unfragmented without structured replies": (
        p.NBD_CMD_READ,
        p.NBD_CMD_FLAG_DF,
        0,
        512,
        p.NBD_EINVAL,
    ),
    "read with an unknown flag": (p.NBD_CMD_READ, 1 << 9, 0, 512, p.NBD_EINVAL),
    "zero beyond the end": (p.NBD_CMD_WRITE_ZEROES, 0, SIZE, 512, p.NBD_ENOSPC),
    "trim beyond the end": (p.NBD_CMD_TRIM, 0, SIZE, 512, p.NBD_EINVAL),
    "trim with a zeroing flag": (p.NBD_CMD_TRIM, p.NBD_CMD_FLAG_NO_HOLE, 0, 512, p.NBD_EINVAL),
    "flush with a range": (p.NBD_CMD_FLUSH, 0, 0, 512, p.NBD_EINVAL),
    "cache beyond the end": (p.NBD_CMD_CACHE, 0, SIZE, 512, p.NBD_EINVAL),
    "block status without a context": (p.NBD_CMD_BLOCK_STATUS, 0, 0, 512, p.NBD_EINVAL),
    "an unknown command": (99, 0, 0, 512, p.NBD_EINVAL),
}


@pytest.mark.parametrize("name", REFUSED)
async def test_a_wrong_request_is_refused_and_the_connection_goes_on(name: str) -> None:
    command, flags, offset, length, error = REFUSED[name]
    volume = MemoryIO(SIZE, limits=BlockLimits(minimum=512))
    async with serving({"v": volume}) as serving_:
        client = await entered(serving_)
        client.request(command, 7, offset, length, flags=flags)
        assert await client.simple_reply() == (error, 7, b"")
        client.request(p.NBD_CMD_READ, 8, 0, 512)
        assert await client.simple_reply(512) == (0, 8, bytes(512))
        await client.close()
        assert volume.log == []
        assert serving_.provider.counters["v"].errors == 1


@pytest.mark.parametrize("length", [512, 100, 300_000, 40 << 20])
@pytest.mark.parametrize(
    ("offset", "flags", "read_only", "error"),
    [
        (SIZE, 0, False, p.NBD_ENOSPC),
        (0, 1 << 9, False, p.NBD_EINVAL),
        (0, 0, True, p.NBD_EPERM),
    ],
)
async def test_the_payload_of_a_refused_write_is_dropped(
    length: int, offset: int, flags: int, read_only: bool, error: int
) -> None:
    volume = MemoryIO(SIZE, read_only=read_only, limits=BlockLimits(minimum=4))
    async with serving({"v": volume}) as serving_:
        client = await entered(serving_)
        client.request(p.NBD_CMD_WRITE, 7, offset, length, flags=flags, payload=b"x" * length)
        assert (await client.simple_reply())[1] == 7
        client.request(p.NBD_CMD_WRITE, 8, offset, 512, flags=flags, payload=b"x" * 512)
        assert await client.simple_reply() == (error, 8, b"")
        client.request(p.NBD_CMD_READ, 9, 0, 512)
        assert await client.simple_reply(512) == (0, 9, bytes(512))
        await client.close()
        assert volume.content == bytes(SIZE)


@pytest.mark.parametrize(
    "message",
    [
        b"\0" * 28,
        b"GET / HTTP/1.1\r\nHost: example\r\n\r\n",
        codec.encode_request(p.NBD_CMD_WRITE, 0, 1, 0, DISCARDED_PAYLOAD_MAX_BYTES + 1),
    ],
    ids=["zeros", "http", "an enormous write"],
)
async def test_what_cannot_be_answered_ends_the_connection(message: bytes) -> None:
    async with serving({"v": MemoryIO(SIZE)}) as serving_:
        client = await entered(serving_)
        client.send(message)
        assert await client.at_end()
        await client.close()
        await condition(lambda: serving_.provider.closed == ["v"])


async def test_a_request_that_comes_byte_by_byte_is_carried_out_once() -> None:
    volume = MemoryIO(SIZE)
    async with serving({"v": volume}) as serving_:
        client = await entered(serving_)
        message = codec.encode_request(p.NBD_CMD_WRITE, 0, 1, 4096, 16) + b"sixteen bytes ok"
        for byte in message:
            client.send(bytes([byte]))
            await client.writer.drain()
            await asyncio.sleep(0)
        assert await client.simple_reply() == (0, 1, b"")
        assert volume.log == [("write", 4096, 16, False)]
        assert volume.content[4096:4112] == b"sixteen bytes ok"
        await client.close()


@pytest.mark.parametrize("sent", [0, 10, 100_000])
async def test_a_write_whose_payload_never_comes_changes_nothing(sent: int) -> None:
    volume = MemoryIO(SIZE)
    async with serving({"v": volume}) as serving_:
        client = await entered(serving_)
        client.request(p.NBD_CMD_WRITE, 1, 0, 200_000, payload=b"x" * sent)
        await client.writer.drain()
        await client.close()
        await condition(lambda: serving_.provider.closed == ["v"])
        assert volume.log == []
        assert volume.content == bytes(SIZE)


async def test_disconnecting_finishes_what_was_begun() -> None:
    volume = MemoryIO(SIZE)
    volume.hold = True
    async with serving({"v": volume}) as serving_:
        client = await entered(serving_)
        client.request(p.NBD_CMD_WRITE, 1, 0, 4, payload=b"abcd")
        client.request(p.NBD_CMD_DISC, 0, 0, 0)
        client.request(p.NBD_CMD_WRITE, 2, 0, 4, payload=b"efgh")
        await condition(lambda: len(volume.held) == 1)
        assert serving_.provider.closed == []
        volume.release()
        assert await client.simple_reply() == (0, 1, b"")
        assert await client.at_end()
        await client.close()
        assert volume.content[:4] == b"abcd"
        await condition(lambda: serving_.provider.closed == ["v"])


async def test_an_export_is_given_back_only_after_its_last_command() -> None:
    volume = MemoryIO(SIZE)
    volume.hold = True
    async with serving({"v": volume}) as serving_:
        client = await entered(serving_)
        client.request(p.NBD_CMD_WRITE, 1, 0, 4, payload=b"abcd")
        await condition(lambda: len(volume.held) == 1)
        (connection,) = serving_.server.connections
        connection.disconnect()
        assert await client.at_end()
        await client.close()
        assert connection.in_flight == 1
        assert serving_.provider.closed == []
        volume.release()
        await connection.wait_closed()
        assert serving_.provider.closed == ["v"]
        assert serving_.provider.counters["v"].in_flight == 0


async def test_commands_in_flight_are_limited_and_all_are_answered() -> None:
    volume = MemoryIO(SIZE)
    volume.hold = True
    count = 2 * COMMANDS_IN_FLIGHT_MAX + 500
    async with serving({"v": volume}) as serving_:
        client = await entered(serving_)
        for cookie in range(count):
            client.request(p.NBD_CMD_FLUSH, cookie, 0, 0)
        await condition(lambda: len(volume.held) == COMMANDS_IN_FLIGHT_MAX)
        answered = asyncio.create_task(client.reader.readexactly(16 * count))
        while not answered.done():
            assert len(volume.held) <= COMMANDS_IN_FLIGHT_MAX
            volume.release_all()
            await asyncio.sleep(0)
        replies = [cookie for _, _, cookie in codec.SIMPLE_REPLY.iter_unpack(answered.result())]
        assert replies == list(range(count))
        await client.close()


@pytest.mark.parametrize("at_hand", [True, False])
async def test_replies_that_nobody_reads_stop_the_reading(at_hand: bool) -> None:
    size = 1 << 20
    volume = MemoryIO(size, at_hand=at_hand, features=Feature.NONE)
    count = 200
    async with serving({"v": volume}) as serving_:
        client = await entered(serving_)
        client.writer.transport.pause_reading()  # type: ignore[attr-defined]
        for cookie in range(count):
            client.request(p.NBD_CMD_READ, cookie, 0, size if cookie % 2 else 200_000)
        (connection,) = serving_.server.connections
        await condition(lambda: serving_.provider.counters["v"].reads > 0)
        for _ in range(50):
            await asyncio.sleep(0.001)
        queued = connection._transmission._output.queued_bytes  # type: ignore[union-attr]
        assert queued <= PAYLOAD_IN_FLIGHT_MAX_BYTES + size
        assert serving_.provider.counters["v"].reads < count
        client.writer.transport.resume_reading()  # type: ignore[attr-defined]
        for cookie in range(count):
            length = size if cookie % 2 else 200_000
            assert (await client.simple_reply(length))[:2] == (0, cookie)
        await client.close()


async def test_payload_in_flight_is_limited() -> None:
    volume = MemoryIO(32 << 20, at_hand=False, features=Feature.NONE)
    volume.hold = True
    async with serving({"v": volume}) as serving_:
        client = await entered(serving_)
        for cookie in range(20):
            client.request(p.NBD_CMD_READ, cookie, 0, 32 << 20)
        await condition(lambda: len(volume.held) > 0)
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert len(volume.held) == PAYLOAD_IN_FLIGHT_MAX_BYTES // (32 << 20)
        await client.close()
        volume.release_all()


async def test_a_client_that_says_nothing_is_cut_off() -> None:
    async with serving({"v": MemoryIO(SIZE)}, handshake_timeout_seconds=0.05) as serving_:
        silent = await RawClient.connect(serving_.unix_path)
        dripping = await RawClient.connect(serving_.unix_path)
        await dripping.greet()
        dripping.send(options.OPTION.pack(p.IHAVEOPT, p.NBD_OPT_GO, 100))
        await silent.reader.readexactly(options.GREETING.size)
        assert await silent.at_end()
        assert await dripping.at_end()
        await silent.close()
        await dripping.close()


async def test_clients_beyond_the_limit_are_turned_away_and_the_others_served() -> None:
    async with serving({"v": MemoryIO(SIZE)}, connections_max=2) as serving_:
        first = await Connection.open(serving_.address, "v")
        second = await Connection.open(serving_.address, "v")
        third = await RawClient.connect(serving_.unix_path)
        assert await third.at_end()
        await third.close()
        assert await read_bytes(first, 0, 4) == bytes(4)
        await first.close()
        await condition(lambda: len(serving_.server.connections) == 1)
        fourth = await Connection.open(serving_.address, "v")
        await second.close()
        await fourth.close()


async def test_clients_that_were_hung_up_on_make_room_although_their_commands_hang() -> None:
    hung = MemoryIO(SIZE, at_hand=False)
    hung.hold = True
    async with serving({"hung": hung, "v": MemoryIO(SIZE)}, connections_max=2) as serving_:
        for _ in range(2):
            connection = await Connection.open(serving_.address, "hung")
            connection.read(0, 4096, lambda error, payload: None)
        await condition(lambda: len(hung.held) == 2)
        for server_side in serving_.server.connections:
            server_side.disconnect()
        try:
            other = await Connection.open(serving_.address, "v")
            assert await read_bytes(other, 0, 4) == bytes(4)
            await other.close()
        finally:
            hung.release_all()


async def test_long_reads_of_holes_are_answered_with_hole_chunks() -> None:
    volume = MemoryIO(SIZE)
    volume.content[65536:65540] = b"data"
    async with serving({"v": volume}) as serving_:
        client = await entered(serving_, structured=True)
        client.request(p.NBD_CMD_READ, 1, 0, 65536)
        flags, kind, _, payload = await client.chunk()
        assert (flags, kind) == (p.NBD_REPLY_FLAG_DONE, p.NBD_REPLY_TYPE_OFFSET_HOLE)
        assert codec.HOLE.unpack(payload) == (0, 65536)
        client.request(p.NBD_CMD_READ, 2, 32768, 131072)
        chunks: list[tuple[int, int, int, bytes]] = []
        while not chunks or not chunks[-1][0]:
            chunks.append(await client.chunk())
        kinds = sorted((kind, len(payload)) for _, kind, _, payload in chunks)
        assert kinds == [
            (p.NBD_REPLY_TYPE_OFFSET_DATA, 8 + 4096),
            (p.NBD_REPLY_TYPE_OFFSET_HOLE, 12),
            (p.NBD_REPLY_TYPE_OFFSET_HOLE, 12),
        ]
        client.request(p.NBD_CMD_READ, 3, 0, 131072, flags=p.NBD_CMD_FLAG_DF)
        flags, kind, _, payload = await client.chunk()
        assert (flags, kind) == (p.NBD_REPLY_FLAG_DONE, p.NBD_REPLY_TYPE_OFFSET_DATA)
        assert payload[8:] == volume.content[:131072]
        await client.close()


async def test_an_error_in_one_piece_of_a_sparse_read_fails_the_whole() -> None:
    volume = MemoryIO(SIZE)
    volume.content[65536:65540] = b"data"
    volume.errors["read"] = errno.EIO
    async with serving({"v": volume}) as serving_:
        client = await entered(serving_, structured=True)
        client.request(p.NBD_CMD_READ, 1, 0, 131072)
        while True:
            flags, kind, _, payload = await client.chunk()
            if flags:
                break
        assert kind == p.NBD_REPLY_TYPE_ERROR
        assert codec.parse_error_chunk(memoryview(payload))[0] == p.NBD_EIO
        assert serving_.provider.counters["v"].in_flight == 0
        await client.close()


async def test_a_map_that_is_not_at_hand_is_asked_for_once_only() -> None:
    volume = MemoryIO(SIZE, at_hand=False)
    volume.hold = True
    async with serving({"v": volume}) as serving_:
        client = await entered(serving_, structured=True)
        client.request(p.NBD_CMD_READ, 1, 0, 65536)
        await condition(lambda: len(volume.held) == 1)
        volume.release()  # the map
        assert (await client.chunk())[1] == p.NBD_REPLY_TYPE_OFFSET_HOLE
        client.request(p.NBD_CMD_READ, 2, 0, 65536)
        await condition(lambda: len(volume.held) == 1)
        volume.release()  # the read itself
        assert (await client.chunk())[1] == p.NBD_REPLY_TYPE_OFFSET_DATA
        await client.close()


async def test_block_status_gives_one_extent_when_one_is_asked_for() -> None:
    volume = MemoryIO(SIZE)
    volume.content[4096:4100] = b"data"
    async with serving({"v": volume}) as serving_:
        client = await RawClient.connect(serving_.unix_path)
        await client.greet()
        await client.option(p.NBD_OPT_STRUCTURED_REPLY)
        query = options.encode_context_query(options.ContextQuery("v", (p.BASE_ALLOCATION,)))
        reply, _, contexts = await client.option(p.NBD_OPT_SET_META_CONTEXT, query)
        assert (reply, len(contexts)) == (p.NBD_REP_ACK, 1)
        await client.option(p.NBD_OPT_GO, options.encode_info_request(options.InfoRequest("v", ())))
        client.request(p.NBD_CMD_BLOCK_STATUS, 1, 0, SIZE, flags=p.NBD_CMD_FLAG_REQ_ONE)
        _, _, _, payload = await client.chunk()
        _, extents = codec.parse_block_status(memoryview(payload))
        assert extents == [Extent(4096, Allocation.HOLE | Allocation.ZERO)]
        await client.close()


async def test_a_context_chosen_for_another_export_does_not_count() -> None:
    async with serving({"v": MemoryIO(SIZE), "w": MemoryIO(SIZE)}) as serving_:
        client = await RawClient.connect(serving_.unix_path)
        await client.greet()
        await client.option(p.NBD_OPT_STRUCTURED_REPLY)
        query = options.encode_context_query(options.ContextQuery("w", (p.BASE_ALLOCATION,)))
        await client.option(p.NBD_OPT_SET_META_CONTEXT, query)
        await client.option(p.NBD_OPT_GO, options.encode_info_request(options.InfoRequest("v", ())))
        client.request(p.NBD_CMD_BLOCK_STATUS, 1, 0, SIZE)
        _, kind, _, _ = await client.chunk()
        assert kind == p.NBD_REPLY_TYPE_ERROR
        await client.close()


async def test_a_socket_file_that_nobody_listens_on_is_replaced(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(path)
    server = Server(Exports({"v": MemoryIO(SIZE)}))
    await server.start([UnixAddress(path)])
    connection = await Connection.open(UnixAddress(path), "v")
    await connection.close()
    await server.close()
    assert files_in(tmp_path) == []


async def test_an_address_in_use_is_refused_and_nothing_is_left_listening(tmp_path: Path) -> None:
    used, other = UnixAddress(str(tmp_path / "used")), UnixAddress(str(tmp_path / "other"))
    first, second = Server(Exports({})), Server(Exports({}))
    await first.start([used])
    with pytest.raises(ListenFailed, match="used: another server listens there"):
        await second.start([other, used])
    assert second.addresses == ()
    assert files_in(tmp_path) == ["used"]
    await first.close()


async def test_an_export_whose_limits_the_wire_cannot_say_is_given_back() -> None:
    async with serving({"v": MemoryIO(SIZE, limits=BlockLimits(minimum=3))}) as serving_:
        for option, data in (
            (p.NBD_OPT_GO, options.encode_info_request(options.InfoRequest("v", ()))),
            (p.NBD_OPT_EXPORT_NAME, b"v"),
        ):
            client = await RawClient.connect(serving_.unix_path)
            await client.greet()
            client.send(options.encode_option(option, data))
            await client.reader.read()
            await client.close()
        await condition(lambda: serving_.provider.closed == ["v", "v"])
        assert serving_.server.connections == ()


async def test_a_client_with_many_requests_lets_anothers_read_come_between() -> None:
    class Recorded(MemoryIO):
        served: list[int] = []  # noqa: RUF012 (one object, one test)

        def read_now(self, offset: int, into: memoryview) -> bool:
            self.served.append(offset)
            return super().read_now(offset, into)

    many, apart = 4000, SIZE - 1
    volume = Recorded(SIZE)
    async with serving({"v": volume}) as serving_:
        greedy, modest = await entered(serving_), await entered(serving_)
        # The server runs in this loop, so all of it is in its sockets before it looks at any.
        for number in range(many):
            greedy.request(p.NBD_CMD_READ, number, number, 1)
        modest.request(p.NBD_CMD_READ, 0, apart, 1)
        assert await modest.simple_reply(1) == (0, 0, bytes(1))
        for number in range(many):
            assert await greedy.simple_reply(1) == (0, number, bytes(1))
        assert volume.served.index(apart) <= 2 * TURN_COST_MAX
        await greedy.close()
        await modest.close()
