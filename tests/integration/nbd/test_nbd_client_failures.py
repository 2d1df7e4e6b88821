"""What the client does when the other end is absent, slow, hostile or goes away."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from farpage.address import TcpAddress, UnixAddress
from farpage.blockio import CONNECTION_LOST, Feature
from farpage.nbd import codec, options
from farpage.nbd import protocol as p
from farpage.nbd.client import Connection, list_exports
from farpage.nbd.errors import (
    HandshakeTimedOut,
    ServerRefused,
    ServerUnreachable,
    ServerViolatedProtocol,
)
from tests.support.blockio import MemoryIO
from tests.support.commands import condition, read_bytes, wait_done, write_bytes
from tests.support.nbd import serving, short_folder

Dialogue = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]
GREETING = options.GREETING.pack(p.NBDMAGIC, p.IHAVEOPT, 3)


@asynccontextmanager
async def fake_server(dialogue: Dialogue) -> AsyncIterator[UnixAddress]:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await dialogue(reader, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    with short_folder() as folder:
        server = await asyncio.start_unix_server(serve, folder / "s")
        async with server:
            yield UnixAddress(str(folder / "s"))


async def read_option(reader: asyncio.StreamReader) -> tuple[int, bytes]:
    _, option, length = options.OPTION.unpack(await reader.readexactly(options.OPTION.size))
    return option, await reader.readexactly(length)


async def shake_hands(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    *,
    size_bytes: int = 1 << 20,
    flags: int = p.NBD_FLAG_HAS_FLAGS,
) -> None:
    """Greet and give out an export without structured replies."""
    writer.write(GREETING)
    await reader.readexactly(4)
    while True:
        option, _ = await read_option(reader)
        if option == p.NBD_OPT_GO:
            writer.write(options.encode_info_export(option, size_bytes, flags))
            writer.write(options.encode_option_reply(option, p.NBD_REP_ACK))
            return
        writer.write(options.encode_option_error(option, p.NBD_REP_ERR_UNSUP))


async def test_an_address_without_a_server_is_unreachable(tmp_path: Path) -> None:
    with pytest.raises(ServerUnreachable) as caught:
        await Connection.open(UnixAddress(str(tmp_path / "none")), "v")
    assert caught.value.export == "v"
    assert str(tmp_path / "none") in str(caught.value)
    assert "No such file" in str(caught.value)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        with pytest.raises(ServerUnreachable, match="refused"):
            await Connection.open(TcpAddress("127.0.0.1", unused.getsockname()[1]), "v")


async def test_a_server_that_does_not_answer_times_out(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "s"))
        listener.listen()
        with pytest.raises(HandshakeTimedOut, match=r"waited 0\.05 s"):
            await Connection.open(UnixAddress(str(tmp_path / "s")), "v", handshake_timeout_seconds=0.05)


async def test_a_refused_export_names_the_servers_reason() -> None:
    async with serving({"v": MemoryIO(4096)}) as serving_:
        with pytest.raises(ServerRefused, match="'w' is not available here") as caught:
            await Connection.open(serving_.address, "w")
        assert caught.value.reply == "NBD_REP_ERR_UNKNOWN"


async def test_a_server_that_hangs_up_in_the_handshake_is_unreachable() -> None:
    async def dialogue(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GREETING)
        await reader.readexactly(4)
        await read_option(reader)

    async with fake_server(dialogue) as address:
        with pytest.raises(ServerUnreachable, match="closed the connection"):
            await Connection.open(address, "v")


HANDSHAKE_VIOLATIONS = {
    "http": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "an old server": options.GREETING.pack(p.NBDMAGIC, p.CLISERV_MAGIC, 0) + bytes(200),
    "a reply to nothing": GREETING + options.encode_option_reply(99, p.NBD_REP_ACK),
    "an enormous reply": GREETING
    + options.OPTION_REPLY.pack(p.NBD_OPTION_REPLY_MAGIC, p.NBD_OPT_STRUCTURED_REPLY, 1, 1 << 31),
    "an unexpected reply": GREETING
    + options.encode_option_reply(p.NBD_OPT_STRUCTURED_REPLY, p.NBD_REP_SERVER, b"\0\0\0\0"),
}


@pytest.mark.parametrize("name", HANDSHAKE_VIOLATIONS)
async def test_a_server_that_does_not_speak_nbd_is_named_so(name: str) -> None:
    async def dialogue(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(HANDSHAKE_VIOLATIONS[name])
        await reader.read()

    async with fake_server(dialogue) as address:
        with pytest.raises(ServerViolatedProtocol, match="does not keep to the NBD protocol"):
            await Connection.open(address, "v")


@pytest.mark.parametrize(
    ("size_bytes", "flags"), [(1 << 63, p.NBD_FLAG_HAS_FLAGS), (4096, 0)], ids=["size", "flags"]
)
async def test_an_impossible_export_is_a_violation(size_bytes: int, flags: int) -> None:
    async def dialogue(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await shake_hands(reader, writer, size_bytes=size_bytes, flags=flags)
        await reader.read()

    async with fake_server(dialogue) as address:
        with pytest.raises(ServerViolatedProtocol):
            await Connection.open(address, "v")


async def test_a_server_of_the_first_newstyle_is_spoken_to() -> None:
    async def dialogue(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(options.GREETING.pack(p.NBDMAGIC, p.IHAVEOPT, 0))
        assert await reader.readexactly(4) == bytes(4)
        assert await read_option(reader) == (p.NBD_OPT_EXPORT_NAME, b"v")
        writer.write(options.EXPORT_NAME_REPLY.pack(4096, p.NBD_FLAG_HAS_FLAGS) + bytes(124))
        _, _, command, cookie, _, length = codec.REQUEST.unpack(await reader.readexactly(28))
        assert command == p.NBD_CMD_READ
        writer.write(codec.encode_simple_reply(cookie) + b"x" * length)
        await reader.read()

    async with fake_server(dialogue) as address:
        connection = await Connection.open(address, "v")
        assert connection.features == Feature.NONE
        assert await read_bytes(connection, 0, 8) == b"x" * 8
        await connection.close()


async def test_losing_the_connection_finishes_every_command_once() -> None:
    volume = MemoryIO(1 << 20)
    volume.hold = True
    events: list[object] = []
    async with serving({"v": volume}) as serving_:
        connection = await Connection.open(serving_.address, "v")
        connection.on_lost = lambda error: events.append(type(error).__name__)
        connection.read(0, 4096, lambda error, payload: events.append(("read", error, payload)))
        connection.write(0, memoryview(b"x"), lambda error: events.append(("write", error)))
        connection.push()
        await condition(lambda: len(volume.held) == 2)
        assert connection.in_flight == 2
        assert connection.oldest_inflight_seconds > 0
        serving_.server.connections[0].disconnect()
        await condition(lambda: len(events) == 3)
        assert events == ["ConnectionEnded", ("read", CONNECTION_LOST, None), ("write", CONNECTION_LOST)]
        assert connection.ended
        assert connection.in_flight == 0
        assert connection.oldest_inflight_seconds == 0
        assert await wait_done(connection.flush) == CONNECTION_LOST
        assert await write_bytes(connection, 0, b"x") == CONNECTION_LOST
        await connection.close()
        volume.release_all()


async def test_aborting_finishes_commands_and_is_not_reported_as_a_loss() -> None:
    volume = MemoryIO(1 << 20)
    volume.hold = True
    async with serving({"v": volume}) as serving_:
        connection = await Connection.open(serving_.address, "v")
        lost: list[Exception] = []
        finished: list[int] = []
        connection.on_lost = lost.append
        connection.write(0, memoryview(b"x"), finished.append)
        connection.push()
        await condition(lambda: len(volume.held) == 1)
        connection.abort()
        assert finished == [CONNECTION_LOST]
        connection.abort()
        await asyncio.sleep(0)
        assert (lost, len(finished)) == ([], 1)
        volume.release_all()


async def test_a_wrong_reply_ends_the_connection_without_data() -> None:
    async def dialogue(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await shake_hands(reader, writer)
        await reader.readexactly(28)
        writer.write(codec.encode_simple_reply(999) + b"wrong data")
        await reader.read()

    async with fake_server(dialogue) as address:
        connection = await Connection.open(address, "v")
        lost: list[Exception] = []
        connection.on_lost = lost.append
        with pytest.raises(OSError, match="ENOTCONN"):
            await read_bytes(connection, 0, 8)
        assert "does not keep to the NBD protocol: a reply to no command" in str(lost[0])


async def test_a_server_that_stops_reading_does_not_block_the_client() -> None:
    release = asyncio.Event()
    received = bytearray()

    async def dialogue(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await shake_hands(reader, writer)
        await release.wait()
        while len(received) < 64 * (28 + 1 << 20):
            part = await reader.read(1 << 20)
            if not part:
                return
            received.extend(part)

    async with fake_server(dialogue) as address:
        connection = await Connection.open(address, "v")
        finished: list[int] = []
        data = memoryview(bytes(1 << 20))
        for _ in range(64):
            connection.write(0, data, finished.append)
        connection.push()
        await asyncio.sleep(0)
        assert connection.in_flight == 64
        release.set()
        await condition(lambda: len(received) == 64 * (28 + (1 << 20)))
        assert received[28 + (1 << 20) :][:4] == b"\x25\x60\x95\x13"
        connection.abort()
        assert finished == [CONNECTION_LOST] * 64


async def test_a_server_without_a_list_refuses_it() -> None:
    async def dialogue(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(GREETING)
        await reader.readexactly(4)
        option, _ = await read_option(reader)
        writer.write(options.encode_option_error(option, p.NBD_REP_ERR_POLICY, "not\x1b[31m here"))
        await reader.read()

    async with fake_server(dialogue) as address:
        with pytest.raises(ServerRefused) as caught:
            await list_exports(address)
        assert caught.value.reason == "not [31m here"


async def test_unknown_errors_of_a_server_are_einval() -> None:
    async def dialogue(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await shake_hands(reader, writer)
        _, _, _, cookie, _, _ = codec.REQUEST.unpack(await reader.readexactly(28))
        writer.write(codec.encode_simple_reply(cookie, CONNECTION_LOST))
        await reader.read()

    async with fake_server(dialogue) as address:
        connection = await Connection.open(address, "v")
        with pytest.raises(OSError, match="EINVAL") as caught:
            await read_bytes(connection, 0, 8)
        assert caught.value.errno == errno.EINVAL
        connection.abort()


async def test_a_loss_handler_that_raises_does_not_keep_commands_waiting() -> None:
    volume = MemoryIO(1 << 20)
    volume.hold = True
    async with serving({"v": volume}) as serving_:
        connection = await Connection.open(serving_.address, "v")

        def fail(error: Exception) -> None:
            raise RuntimeError("a bug")

        reported: list[object] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: reported.append(context))
        connection.on_lost = fail
        finished: list[int] = []
        connection.write(0, memoryview(b"x"), finished.append)
        connection.push()
        await condition(lambda: len(volume.held) == 1)
        serving_.server.connections[0].disconnect()
        await condition(lambda: finished == [CONNECTION_LOST])
        assert len(reported) == 1
        volume.release_all()
