"""Runs from the client through a server, with the client's loops as machine code and as their twins."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import random
import socket
import struct
import termios
from collections.abc import Iterator

import pytest

from farpage.address import UnixAddress
from farpage.blockio import CONNECTION_LOST, BlockLimits
from farpage.nbd import codec
from farpage.nbd import protocol as p
from farpage.nbd.client import Connection
from farpage.nbd.connecting import Negotiated
from tests.support.blockio import MemoryIO
from tests.support.commands import condition, write_bytes
from tests.support.nbd import serving
from tests.support.runs import FORMS, use_form

PAGE = 4096
WRITE_BYTES = codec.REQUEST.size + PAGE


@pytest.fixture(name="form", params=FORMS, autouse=True)
def _form(request: pytest.FixtureRequest) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        use_form(request.param, patch)
        yield


@pytest.fixture(name="structured", params=[True, False], ids=["structured", "simple"])
def _structured(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def runs_at(offsets: list[int], length: int) -> list[tuple[int, memoryview]]:
    """Return a run of random bytes at each offset."""
    return [(offset, memoryview(random.Random(offset).randbytes(length))) for offset in offsets]


async def test_runs_are_written_with_a_command_each_and_done_together(structured: bool) -> None:
    volume = MemoryIO(1 << 20)
    runs = runs_at([0, 8192, 500_000], 4096)
    async with serving({"v": volume}) as serving_:
        connection = await Connection.open(serving_.address, "v", structured_replies=structured)
        volume.hold = True
        answers: list[int] = []
        connection.write_runs(runs, answers.append)
        await condition(lambda: len(volume.held) == 3)
        volume.release(1)
        volume.release(1)
        assert await write_after(volume, connection) == 0
        assert answers == []
        volume.release_all()
        await condition(lambda: answers == [0])
        assert [entry for entry in volume.log if entry[2] == 4096] == [
            ("write", offset, 4096, False) for offset in (8192, 500_000, 0)
        ]
        for offset, data in runs:
            assert volume.content[offset : offset + 4096] == data
        assert not any(volume.content[4096:8192])
        await connection.close()


async def write_after(volume: MemoryIO, connection: Connection) -> int:
    """Write something else, whose answer comes behind those to what was carried out before."""
    held, volume.held, volume.hold = volume.held, [], False
    error = await write_bytes(connection, 700_000, b"x" * 512)
    volume.held, volume.hold = held, True
    return error


async def test_of_runs_the_first_error_is_told_when_all_are_done(structured: bool) -> None:
    volume = MemoryIO(1 << 20)
    async with serving({"v": volume}) as serving_:
        connection = await Connection.open(serving_.address, "v", structured_replies=structured)
        volume.hold = True
        answers: list[int] = []
        connection.write_runs(runs_at([0, 8192, 500_000], 4096), answers.append)
        await condition(lambda: len(volume.held) == 3)
        volume.errors["write"] = errno.ENOSPC
        volume.release(1)
        del volume.errors["write"]
        assert await write_after(volume, connection) == 0
        assert answers == []
        volume.release_all()
        await condition(lambda: answers == [errno.ENOSPC])
        await connection.close()


async def test_runs_that_are_longer_than_a_command_may_be_are_split() -> None:
    volume = MemoryIO(1 << 20, limits=BlockLimits(1, 4096, 64 << 10))
    runs = runs_at([0, 200_000], 100_000)
    async with serving({"v": volume}) as serving_:
        connection = await Connection.open(serving_.address, "v")
        answers: list[int] = []
        connection.write_runs(runs, answers.append)
        await condition(lambda: bool(answers))
        assert answers == [0]
        assert sorted(entry[1:3] for entry in volume.log) == [
            (0, 65_536),
            (65_536, 34_464),
            (200_000, 65_536),
            (265_536, 34_464),
        ]
        for offset, data in runs:
            assert volume.content[offset : offset + len(data)] == data
        await connection.close()


async def test_runs_whose_connection_is_lost_end_once_with_an_unknown_outcome() -> None:
    volume = MemoryIO(1 << 20)
    volume.hold = True
    answers: list[int] = []
    async with serving({"v": volume}) as serving_:
        connection = await Connection.open(serving_.address, "v")
        connection.write_runs(runs_at([0, 8192, 500_000], 4096), answers.append)
        await condition(lambda: len(volume.held) == 3)
        connection.abort()
        assert answers == [CONNECTION_LOST]
        connection.write_runs(runs_at([0, 8192], 4096), answers.append)
        assert answers == [CONNECTION_LOST] * 2
        volume.release_all()


async def test_runs_that_may_not_be_written_are_refused_before_any_is_sent() -> None:
    volume, read_only = MemoryIO(1 << 20), MemoryIO(1 << 20, read_only=True)
    answers: list[int] = []
    async with serving({"v": volume, "r": read_only}) as serving_:
        connection = await Connection.open(serving_.address, "r")
        connection.write_runs(runs_at([0, 8192], 4096), answers.append)
        assert answers == [errno.EPERM]
        await connection.close()
        connection = await Connection.open(serving_.address, "v")
        with pytest.raises(ValueError, match="outside"):
            connection.write_runs(runs_at([0, 1 << 20], 4096), answers.append)
        assert await write_bytes(connection, 700_000, b"x") == 0
        assert [entry[1] for entry in volume.log] == [700_000]
        assert (answers, read_only.log) == ([errno.EPERM], [])
        await connection.close()


class Ends:
    """A connection that needs no handshake, and the other end of its socket."""

    def __init__(self, send_bytes: int) -> None:
        mine, self.other = socket.socketpair()
        mine.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_bytes)
        for end in mine, self.other:
            end.setblocking(False)
        negotiated = Negotiated(1 << 30, p.NBD_FLAG_HAS_FLAGS, BlockLimits(), True, None)
        self.connection = Connection(mine, UnixAddress("/nowhere"), "v", negotiated)
        self.lost: list[Exception] = []
        self.connection.on_lost = self.lost.append

    async def sent(self, length: int) -> bytes:
        """Return the next bytes that the connection sends."""
        loop, data = asyncio.get_running_loop(), b""
        while len(data) < length:
            part = await asyncio.wait_for(loop.sock_recv(self.other, length - len(data)), 10)
            assert part
            data += part
        return data

    def close(self) -> None:
        self.connection.abort()
        self.other.close()


def writes_of(runs: list[tuple[int, memoryview]], first_cookie: int) -> bytes:
    return b"".join(
        codec.encode_request(p.NBD_CMD_WRITE, 0, cookie, offset, len(data)) + bytes(data)
        for cookie, (offset, data) in enumerate(runs, first_cookie)
    )


@pytest.mark.parametrize("send_bytes", [1, 30_000, 100_000, 4 << 20])
async def test_what_the_socket_takes_in_parts_arrives_whole(send_bytes: int) -> None:
    ends = Ends(send_bytes)
    first, second = runs_at([PAGE * n for n in range(64)], PAGE), runs_at([PAGE * n for n in range(16)], 512)
    answers: list[int] = []
    ends.connection.write_runs(first, answers.append)
    ends.connection.push()
    ends.connection.write_runs(second, answers.append)
    ends.connection.flush(answers.append)  # is not offered, and comes between
    ends.connection.write(0, memoryview(b"single"), answers.append)
    expected = writes_of(first, 1) + writes_of(second, 65) + writes_of([(0, memoryview(b"single"))], 81)
    assert await ends.sent(len(expected)) == expected
    assert answers == [errno.ENOTSUP]
    ends.other.send(b"".join(codec.encode_simple_reply(cookie) for cookie in range(1, 82)))
    await condition(lambda: len(answers) == 4)
    assert (answers, ends.connection.in_flight) == ([errno.ENOTSUP, 0, 0, 0], 0)
    ends.close()


async def test_more_runs_than_one_system_call_takes_are_sent() -> None:
    ends = Ends(4 << 20)
    answers: list[int] = []
    expected = b""
    for number in range(12):
        runs = runs_at([PAGE * (64 * number + n) for n in range(64)], 512)
        ends.connection.write_runs(runs, answers.append)
        expected += writes_of(runs, 64 * number + 1)
    assert await ends.sent(len(expected)) == expected
    assert ends.connection.in_flight == 12 * 64
    ends.close()
    assert answers == [CONNECTION_LOST] * 12


async def test_much_is_sent_in_several_turns_of_the_loop() -> None:
    ends = Ends(4 << 20)
    ends.connection.write_runs(runs_at([PAGE * n for n in range(64)], PAGE), lambda error: None)
    waiting = []
    for _ in range(6):
        ends.connection.push()
        ends.connection.push()
        waiting.append(struct.unpack("i", fcntl.ioctl(ends.other, termios.FIONREAD, bytes(4)))[0])
        await asyncio.sleep(0)
    assert waiting == [16 * WRITE_BYTES * turns for turns in (1, 2, 3, 4, 4, 4)]
    ends.close()


async def test_a_reply_that_comes_twice_ends_the_connection() -> None:
    ends = Ends(4 << 20)
    answers: list[int] = []
    ends.connection.write_runs(runs_at([0, PAGE, 2 * PAGE], PAGE), answers.append)
    await ends.sent(3 * WRITE_BYTES)
    ends.other.send(b"".join(codec.encode_simple_reply(cookie) for cookie in (1, 2, 2)))
    await condition(lambda: bool(ends.lost))
    assert "a reply to no command" in str(ends.lost[0])
    assert answers == [CONNECTION_LOST]
    ends.close()


async def test_long_runs_are_refused_whole_if_one_is_out_of_range() -> None:
    volume = MemoryIO(1 << 20, limits=BlockLimits(1, 4096, 64 << 10))
    async with serving({"v": volume}) as serving_:
        connection = await Connection.open(serving_.address, "v")
        with pytest.raises(ValueError, match="outside"):
            connection.write_runs(runs_at([0, 1 << 20], 100_000), lambda error: None)
        assert connection.in_flight == 0
        await connection.close()
        assert volume.log == []
