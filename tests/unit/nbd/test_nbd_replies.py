"""The client's reply stream, without a socket."""

from __future__ import annotations

import asyncio
import errno
import itertools
import random
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from farpage.blockio import CONNECTION_LOST, Allocation, Extent
from farpage.nbd import codec
from farpage.nbd import protocol as p
from farpage.nbd.codec import ProtocolViolation
from farpage.nbd.inflight import Command
from farpage.nbd.replies import ReplyStream

CONTEXT = 5


class Client:
    """A reply stream with a record of what its commands finished with."""

    def __init__(self, loop: asyncio.AbstractEventLoop, *, structured: bool = True) -> None:
        self.stream = ReplyStream(loop, structured_replies=structured, context_id=CONTEXT)
        self.finished: list[tuple[int, int, object]] = []

    def command(self, cookie: int, command: int, offset: int = 0, length: int = 0) -> None:
        started = Command(command, offset, length, 0.0)

        def done(error: int, result: object = None) -> None:
            kept = bytes(result) if isinstance(result, memoryview) else result
            self.finished.append((cookie, error, kept))

        if command == p.NBD_CMD_READ:
            started.on_read = done
        elif command == p.NBD_CMD_BLOCK_STATUS:
            started.on_extents = done
        else:
            started.on_done = done
        self.stream.in_flight[cookie] = started

    def read(self, cookie: int, offset: int, length: int) -> None:
        self.command(cookie, p.NBD_CMD_READ, offset, length)

    def receive(self, data: bytes, step: int = 1 << 30) -> None:
        while data:
            room = step
            taken = 0
            for buffer in self.stream.buffers():
                part = data[taken : taken + min(len(buffer), room - taken)]
                buffer[: len(part)] = part
                taken += len(part)
            assert taken
            self.stream.received(taken)
            data = data[taken:]


@pytest.fixture(name="loop", scope="module")
def _loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def data_chunk(cookie: int, offset: int, data: bytes, *, done: bool = True) -> bytes:
    return codec.encode_data_header(cookie, offset, len(data), done=done) + data


def none_chunk(cookie: int) -> bytes:
    return codec.CHUNK.pack(p.NBD_STRUCTURED_REPLY_MAGIC, 1, p.NBD_REPLY_TYPE_NONE, cookie, 0)


def test_a_read_answered_in_one_chunk(loop: asyncio.AbstractEventLoop) -> None:
    client = Client(loop)
    client.read(1, 4096, 4)
    client.receive(data_chunk(1, 4096, b"page"))
    assert client.finished == [(1, 0, b"page")]
    assert not client.stream.in_flight


def test_replies_finish_commands_in_the_order_of_the_replies(loop: asyncio.AbstractEventLoop) -> None:
    client = Client(loop)
    for cookie in (1, 2, 3):
        client.read(cookie, cookie * 4096, 4)
    client.receive(b"".join(data_chunk(cookie, cookie * 4096, b"page") for cookie in (3, 1, 2)))
    assert [cookie for cookie, _, _ in client.finished] == [3, 1, 2]


def test_simple_replies_where_no_structured_ones_were_agreed(loop: asyncio.AbstractEventLoop) -> None:
    client = Client(loop, structured=False)
    client.read(1, 0, 4)
    client.read(2, 4, 4)
    client.command(3, p.NBD_CMD_WRITE, 0, 4)
    client.receive(
        codec.encode_simple_reply(1)
        + b"page"
        + codec.encode_simple_reply(2, p.NBD_EIO)
        + codec.encode_simple_reply(3, p.NBD_ENOSPC)
    )
    assert client.finished == [(1, 0, b"page"), (2, errno.EIO, None), (3, errno.ENOSPC, None)]


def test_an_error_chunk_finishes_with_its_error_after_the_last_chunk(loop: asyncio.AbstractEventLoop) -> None:
    client = Client(loop)
    client.read(1, 0, 8)
    client.receive(data_chunk(1, 0, b"half", done=False))
    assert client.finished == []
    client.receive(codec.encode_error_chunk(1, p.NBD_EIO, "bad sector"))
    assert client.finished == [(1, errno.EIO, None)]


def test_block_status_is_cut_to_what_was_asked(loop: asyncio.AbstractEventLoop) -> None:
    client = Client(loop)
    client.command(1, p.NBD_CMD_BLOCK_STATUS, 0, 8192)
    found = [Extent(4096, Allocation.DATA), Extent(1 << 30, Allocation.HOLE | Allocation.ZERO)]
    client.receive(codec.encode_block_status(1, CONTEXT, found))
    expected = [Extent(4096, Allocation.DATA), Extent(4096, Allocation.HOLE | Allocation.ZERO)]
    assert client.finished == [(1, 0, expected)]


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data())
def test_a_read_is_put_together_from_any_chunks_in_any_order_and_pieces(
    loop: asyncio.AbstractEventLoop, data: st.DataObject
) -> None:
    length = data.draw(st.sampled_from([1, 2, 512, 4096, 40_000, 200_000]))
    edges = sorted({0, length, *data.draw(st.lists(st.integers(0, length), max_size=6, unique=True))})
    pieces = data.draw(st.permutations(list(itertools.pairwise(edges))))
    offset = 1 << 33
    content = bytearray(random.Random(length).randbytes(length))
    chunks = []
    for index, (start, stop) in enumerate(pieces):
        last = index == len(pieces) - 1
        if data.draw(st.booleans()):
            content[start:stop] = bytes(stop - start)
            chunks.append(codec.encode_hole(1, offset + start, stop - start, done=last))
        else:
            chunks.append(data_chunk(1, offset + start, bytes(content[start:stop]), done=last))
    client = Client(loop)
    client.read(1, offset, length)
    client.read(2, 0, 4)
    client.receive(b"".join(chunks) + data_chunk(2, 0, b"next"), step=data.draw(st.integers(1000, 100_000)))
    assert client.finished == [(1, 0, bytes(content)), (2, 0, b"next")]


@pytest.mark.parametrize("structured", [True, False])
def test_replies_are_understood_byte_by_byte(loop: asyncio.AbstractEventLoop, structured: bool) -> None:
    client = Client(loop, structured=structured)
    client.read(1, 0, 50)
    client.command(2, p.NBD_CMD_FLUSH)
    content = bytes(range(50))
    reply = data_chunk(1, 0, content) if structured else codec.encode_simple_reply(1) + content
    client.receive(reply + codec.encode_simple_reply(2), step=1)
    assert client.finished == [(1, 0, content), (2, 0, None)]


def chunk(kind: int, payload: bytes, *, cookie: int = 1, done: bool = True) -> bytes:
    return codec.CHUNK.pack(p.NBD_STRUCTURED_REPLY_MAGIC, int(done), kind, cookie, len(payload)) + payload


VIOLATIONS: dict[str, bytes] = {
    "garbage": b"\xff" * 32,
    "a simple reply to a structured read": codec.encode_simple_reply(1) + bytes(8),
    "an unknown cookie": data_chunk(9, 0, b"datadata"),
    "an unknown cookie in a simple reply": codec.encode_simple_reply(9),
    "data before the range": data_chunk(1, 4, b"datadata"),
    "data behind the range": data_chunk(1, 12, b"datadata"),
    "too much data": data_chunk(1, 8, b"datadatadata"),
    "an enormous chunk": codec.DATA_CHUNK.pack(
        p.NBD_STRUCTURED_REPLY_MAGIC, 1, p.NBD_REPLY_TYPE_OFFSET_DATA, 1, 0xFFFFFFFF, 8
    ),
    "an enormous error": codec.CHUNK.pack(
        p.NBD_STRUCTURED_REPLY_MAGIC, 1, p.NBD_REPLY_TYPE_ERROR, 1, 0xFFFFFFFF
    ),
    "too little data": data_chunk(1, 8, b"data"),
    "an end without data": none_chunk(1),
    "overlapping data": data_chunk(1, 8, b"datada", done=False) + data_chunk(1, 12, b"data"),
    "data over a hole": codec.encode_hole(1, 8, 8, done=False) + data_chunk(1, 8, b"datadata"),
    "an empty data chunk": chunk(p.NBD_REPLY_TYPE_OFFSET_DATA, bytes(8)),
    "an empty hole": codec.encode_hole(1, 8, 0, done=True),
    "a short hole": chunk(p.NBD_REPLY_TYPE_OFFSET_HOLE, bytes(8)),
    "a hole behind the range": codec.encode_hole(1, 8, 9, done=True),
    "an end that is none": chunk(p.NBD_REPLY_TYPE_NONE, b"", done=False),
    "an end with a payload": chunk(p.NBD_REPLY_TYPE_NONE, b"x"),
    "an unknown type": chunk(77, b""),
    "an error without an error": chunk(p.NBD_REPLY_TYPE_ERROR, bytes(6)),
    "a short error": chunk(p.NBD_REPLY_TYPE_ERROR, bytes(5)),
    "an error with a message beyond its chunk": chunk(p.NBD_REPLY_TYPE_ERROR, b"\0\0\0\x05\0\x09abc"),
    "a status that was not asked for": codec.encode_block_status(1, CONTEXT, [Extent(8, Allocation(0))]),
    "a status of another context": codec.encode_block_status(2, 99, [Extent(8, Allocation(0))]),
    "a status with an empty extent": codec.encode_block_status(2, CONTEXT, [Extent(0, Allocation(0))]),
    "a status without extents": codec.encode_block_status(2, CONTEXT, []),
    "no status": none_chunk(2),
    "a simple reply to a block status": codec.encode_simple_reply(2),
    "data for a flush": data_chunk(3, 0, b"data"),
}


@pytest.mark.parametrize("name", VIOLATIONS)
def test_a_violation_ends_the_stream_and_hands_no_data_up(loop: asyncio.AbstractEventLoop, name: str) -> None:
    client = Client(loop)
    client.read(1, 8, 8)
    client.command(2, p.NBD_CMD_BLOCK_STATUS, 0, 8192)
    client.command(3, p.NBD_CMD_FLUSH)
    with pytest.raises(ProtocolViolation):
        client.receive(VIOLATIONS[name])
    assert client.finished == []
    client.stream.fail_all()
    assert sorted(client.finished) == [(cookie, CONNECTION_LOST, None) for cookie in (1, 2, 3)]


def test_structured_replies_that_were_not_agreed_are_a_violation(loop: asyncio.AbstractEventLoop) -> None:
    client = Client(loop, structured=False)
    client.read(1, 0, 4)
    with pytest.raises(ProtocolViolation):
        client.receive(data_chunk(1, 0, b"page"))


def test_an_unknown_error_type_is_an_error_and_no_violation(loop: asyncio.AbstractEventLoop) -> None:
    client = Client(loop)
    client.read(1, 0, 4)
    client.receive(chunk(p.NBD_REPLY_TYPE_FLAG_ERROR | 99, b"\0\0\0\x05\0\0whatever"))
    assert client.finished == [(1, errno.EIO, None)]


def test_nothing_is_handed_up_after_the_stream_was_stopped_by_a_callback(
    loop: asyncio.AbstractEventLoop,
) -> None:
    client = Client(loop)
    client.read(1, 0, 4)
    client.read(2, 4, 4)

    def stop(error: int, payload: memoryview | None) -> None:
        client.finished.append((1, error, None))
        client.stream.fail_all()

    client.stream.in_flight[1].on_read = stop
    client.receive(data_chunk(1, 0, b"page") + data_chunk(2, 4, b"page"))
    assert client.finished == [(1, 0, None), (2, CONNECTION_LOST, None)]


def test_a_callback_that_raises_does_not_hurt_the_others(loop: asyncio.AbstractEventLoop) -> None:
    client = Client(loop)
    client.read(1, 0, 4)
    client.read(2, 4, 4)
    reported: list[object] = []

    def fail(error: int, payload: memoryview | None) -> None:
        raise RuntimeError("receiver's bug")

    client.stream.in_flight[1].on_read = fail

    def report(_: asyncio.AbstractEventLoop, context: dict[str, object]) -> None:
        reported.append(context["exception"])

    loop.set_exception_handler(report)
    client.receive(data_chunk(1, 0, b"page") + data_chunk(2, 4, b"page"))
    loop.set_exception_handler(None)
    assert client.finished == [(2, 0, b"page")]
    assert len(reported) == 1


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(garbage=st.binary(min_size=1, max_size=200), structured=st.booleans())
def test_garbage_behind_any_magic_is_at_worst_a_violation(
    loop: asyncio.AbstractEventLoop, garbage: bytes, structured: bool
) -> None:
    for magic in (b"", codec.encode_simple_reply(0)[:4], none_chunk(0)[:4], none_chunk(1)[:8]):
        client = Client(loop, structured=structured)
        client.read(1, 0, 8)
        client.command(2, p.NBD_CMD_BLOCK_STATUS, 0, 8192)
        try:
            client.receive(magic + garbage)
        except ProtocolViolation:
            client.stream.fail_all()
