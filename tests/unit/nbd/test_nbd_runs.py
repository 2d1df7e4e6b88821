"""Runs of WRITEs and their replies, without a socket: as machine code and as their twins."""

from __future__ import annotations

import asyncio
import errno
import sys
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from farpage.blockio import CONNECTION_LOST
from farpage.nbd import codec
from farpage.nbd import protocol as p
from farpage.nbd.codec import ProtocolViolation
from farpage.nbd.inflight import Command
from farpage.nbd.replies import ReplyStream
from farpage.nbd.runs import Bounds
from tests.support.runs import FORMS, use_form

PAGE = 4096
BOUNDS = Bounds(1 << 20, 512, 64 << 10)


@pytest.fixture(name="form", params=FORMS)
def _form(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        yield use_form(request.param, patch)


@pytest.fixture(name="loop", scope="module")
def _loop() -> Iterator[asyncio.AbstractEventLoop]:
    loop = asyncio.new_event_loop()
    yield loop
    loop.close()


def write_command(parts: int = 0) -> Command:
    command = Command(p.NBD_CMD_WRITE, 0, 0, 0.0)
    command.parts = parts
    return command


def page(fill: int) -> memoryview:
    return memoryview(bytes([fill]) * PAGE)


class Queue:
    """What a connection has before and after `queue_runs`."""

    def __init__(self, form: ModuleType) -> None:
        self._form = form
        self.before = write_command()
        self.command = write_command()
        self.in_flight = {9: self.before}
        self.unsent: list[bytes | memoryview] = [b"before"]

    def queue(self, runs: Any, bounds: Any = BOUNDS) -> int:
        queued: int = self._form.queue_runs(
            runs, self.command, self.in_flight, self.unsent, cookie=9, bounds=bounds
        )
        return queued

    @property
    def untouched(self) -> bool:
        return (self.in_flight, self.unsent, self.command.parts) == ({9: self.before}, [b"before"], 0)


def test_each_run_is_a_write_with_a_cookie_of_its_own(form: ModuleType) -> None:
    queue = Queue(form)
    runs = [(8192, page(1)), (0, page(2)), ((1 << 20) - PAGE, page(3))]
    assert queue.queue(runs) == 3 * (28 + PAGE)
    expected = [b"before"]
    for cookie, (offset, data) in enumerate(runs, 10):
        expected += [codec.encode_request(p.NBD_CMD_WRITE, 0, cookie, offset, PAGE), bytes(data)]
    assert [bytes(segment) for segment in queue.unsent] == expected
    assert queue.unsent[2] is runs[0][1]
    assert queue.in_flight == {9: queue.before} | dict.fromkeys((10, 11, 12), queue.command)
    assert queue.command.parts == 3


def test_runs_may_be_any_sequence(form: ModuleType) -> None:
    queue = Queue(form)
    assert queue.queue(((0, page(1)), [PAGE, page(2)])) == 2 * (28 + PAGE)


@pytest.mark.parametrize(
    "bad",
    [
        (-512, page(1)),
        (-(1 << 70), page(1)),
        (1 << 70, page(1)),
        ((1 << 63) - PAGE, page(1)),
        (1 << 20, page(1)),
        ((1 << 20) - 512, page(1)),
        (256, page(1)),
        (0, page(1)[:100]),
        (0, page(1)[:0]),
    ],
    ids=["negative", "minus huge", "huge", "2^63", "behind", "over the end", "place", "length", "empty"],
)
def test_of_runs_with_one_that_is_out_of_range_none_is_queued(
    form: ModuleType, bad: tuple[int, memoryview]
) -> None:
    queue = Queue(form)
    for runs in ([bad], [(0, page(1)), bad], [bad, (0, page(1))], [(0, memoryview(bytes(1 << 17))), bad]):
        with pytest.raises(ValueError, match="bytes at"):
            queue.queue(runs)
        assert queue.untouched


def test_of_runs_with_one_that_is_too_long_none_is_queued(form: ModuleType) -> None:
    queue = Queue(form)
    assert queue.queue([(0, page(1)), (0, memoryview(bytes(128 << 10))), (0, page(2))]) == 0
    assert queue.untouched


def released() -> memoryview:
    view = page(1)
    view.release()
    return view


ODD: dict[str, Any] = {
    "nothing": [],
    "no sequence": 7,
    "no pair": [7],
    "one": [(1,)],
    "three": [(0, page(1), page(1))],
    "a place that is no number": [("0", page(1))],
    "a place that is no integer": [(0.0, page(1))],
    "no bytes": [(0, None)],
    "text": [(0, "x" * PAGE)],
    "a view that was released": [(0, released())],
    "bytes that are not together": [(0, memoryview(bytes(2 * PAGE))[::2])],
}


@pytest.mark.parametrize("name", ODD)
def test_odd_runs_are_refused_whole(form: ModuleType, name: str) -> None:
    queue = Queue(form)
    runs = ODD[name]
    for odd in (runs, [(0, page(1)), *runs] if isinstance(runs, list) and runs else runs):
        with pytest.raises((TypeError, ValueError, AttributeError, BufferError)):
            queue.queue(odd)
        assert queue.untouched


def test_a_run_is_let_go_of_when_it_was_sent_or_refused(form: ModuleType) -> None:
    data, command = page(1), write_command()
    counts = sys.getrefcount(data), sys.getrefcount(command)
    for _ in range(3):
        queue = Queue(form)
        queue.command = command
        queued = queue.queue([(0, data), (PAGE, data)])
        form.drop_sent(queue.unsent, queued + len(b"before"))
        assert queue.unsent == []
        with pytest.raises(ValueError, match="outside"):
            queue.queue([(0, data), (-PAGE, data)])
        stream = codec.encode_simple_reply(10) + codec.encode_simple_reply(11)
        assert form.take_replies(bytearray(stream), 0, 32, queue.in_flight, command) == (32, command)
        del queue
    assert (sys.getrefcount(data), sys.getrefcount(command)) == counts


def test_whatever_part_was_sent_the_rest_stays(form: ModuleType) -> None:
    segments: list[bytes | memoryview] = [b"abc", memoryview(b"defghijk").cast("I"), b"l", memoryview(b"mn")]
    whole = b"abcdefghijklmn"
    for sent in range(len(whole) + 1):
        unsent = list(segments)
        form.drop_sent(unsent, sent)
        assert b"".join(unsent) == whole[sent:]


# Replies


def replies_to(*cookies: int) -> bytes:
    return b"".join(codec.encode_simple_reply(cookie) for cookie in cookies)


def take(
    form: ModuleType, data: bytes, in_flight: dict[int, Command], command: Command, start: int = 0
) -> tuple[int, Command | None]:
    taken: tuple[int, Command | None] = form.take_replies(
        bytearray(data), start, len(data), in_flight, command
    )
    return taken


def test_replies_are_counted_up_to_the_last_part(form: ModuleType) -> None:
    command, other = write_command(3), write_command(1)
    in_flight = dict.fromkeys((1, 2, 3), command) | {4: other}
    assert take(form, b"xx" + replies_to(2, 1, 3, 4), in_flight, command, 2) == (50, command)
    assert (command.parts, in_flight, other.parts) == (0, {4: other}, 1)


def test_replies_to_several_commands_may_come_in_any_order(form: ModuleType) -> None:
    first, second = write_command(3), write_command(2)
    in_flight = dict.fromkeys((1, 2, 3), first) | dict.fromkeys((4, 5), second)
    assert take(form, replies_to(1, 4, 2, 5, 3), in_flight, first) == (64, second)
    assert (first.parts, second.parts, in_flight) == (1, 0, {3: first})


@pytest.mark.parametrize(
    "behind",
    [
        b"",
        replies_to(2)[:15],
        replies_to(7),
        replies_to(1),
        replies_to(3),
        replies_to((1 << 64) - 1),
        codec.encode_simple_reply(2, p.NBD_EIO),
        codec.encode_error_chunk(2, p.NBD_EIO),
        bytes(32),
    ],
    ids=["end", "cut", "unknown", "again", "single", "huge", "error", "chunk", "garbage"],
)
def test_what_is_no_reply_of_that_kind_is_left(form: ModuleType, behind: bytes) -> None:
    command, single = write_command(2), write_command()
    in_flight = {1: command, 2: command, 3: single}
    assert take(form, replies_to(1) + behind, in_flight, command) == (16, None)
    assert (command.parts, in_flight) == (1, {2: command, 3: single})


@pytest.mark.parametrize(("start", "end"), [(-1, 16), (0, 17), (16, 0), (17, 33), (1 << 62, 1 << 62)])
def test_bounds_that_are_not_within_the_buffer_are_refused(form: ModuleType, start: int, end: int) -> None:
    command = write_command(1)
    with pytest.raises(ValueError, match="bounds"):
        form.take_replies(bytearray(replies_to(1)), start, end, {1: command}, command)
    assert command.parts == 1


def test_a_command_without_parts_has_no_replies_to_be_taken(form: ModuleType) -> None:
    command = write_command()
    with pytest.raises(ValueError, match="no part"):
        take(form, replies_to(1), {1: command}, command)


@pytest.mark.skipif(find_spec("farpage.nbd._runs") is None, reason="not compiled")
@given(
    data=st.lists(
        st.builds(codec.encode_simple_reply, st.integers(0, 9), st.sampled_from([0, 0, 0, 0, 0, 5]))
        | st.binary(max_size=40)
    ).map(b"".join),
    owners=st.lists(st.integers(0, 2), min_size=10, max_size=10),
    start=st.integers(0, 20),
)
def test_both_take_the_same(data: bytes, owners: list[int], start: int) -> None:
    results = []
    for name in ("farpage.nbd._runs", "farpage.nbd.runs"):
        commands = [write_command(), write_command(), write_command()]
        in_flight = {cookie: commands[owner] for cookie, owner in enumerate(owners)}
        for owner in (1, 2):
            commands[owner].parts = owners.count(owner)
        if not commands[1].parts or start > len(data):
            return
        at, ended = take(import_module(name), data, in_flight, commands[1], start)
        number = None if ended is None else commands.index(ended)
        results.append((at, number, [command.parts for command in commands], list(in_flight)))
    assert results[0] == results[1]


class Stream:
    """A reply stream with commands of several parts, and a record of what they finished with."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.stream = ReplyStream(loop, structured_replies=True, context_id=None)
        self.finished: list[tuple[str, int]] = []

    def start(self, name: str, *cookies: int, parts: bool = True) -> Command:
        command = write_command(len(cookies) if parts else 0)
        command.on_done = lambda error: self.finished.append((name, error))
        self.stream.in_flight.update(dict.fromkeys(cookies, command))
        return command

    def receive(self, data: bytes) -> None:
        self.stream.buffers()[0][: len(data)] = data
        self.stream.received(len(data))


@pytest.fixture(name="stream")
def _stream(loop: asyncio.AbstractEventLoop, form: ModuleType) -> Stream:
    return Stream(loop)


def test_a_command_is_finished_once_by_the_last_of_its_replies(stream: Stream) -> None:
    stream.start("runs", 1, 2, 3)
    stream.receive(replies_to(3, 1))
    assert stream.finished == []
    stream.receive(replies_to(2))
    assert stream.finished == [("runs", 0)]
    assert not stream.stream.in_flight


@pytest.mark.parametrize("step", [1, 7, 15, 17, 33])
def test_replies_may_be_cut_anywhere(stream: Stream, step: int) -> None:
    stream.start("runs", 1, 2, 3)
    stream.start("single", 4, parts=False)
    stream.start("more", 5, 6)
    data = replies_to(1, 2, 5, 4, 3, 6)
    for at in range(0, len(data), step):
        stream.receive(data[at : at + step])
    assert stream.finished == [("single", 0), ("runs", 0), ("more", 0)]


def test_the_first_of_several_errors_is_told_after_the_last_reply(stream: Stream) -> None:
    stream.start("runs", *range(1, 9))
    errors = codec.encode_simple_reply(3, p.NBD_ENOSPC) + codec.encode_simple_reply(4, p.NBD_EIO)
    stream.receive(replies_to(1, 2) + errors + replies_to(5, 6, 7))
    assert stream.finished == []
    stream.receive(replies_to(8))
    assert stream.finished == [("runs", errno.ENOSPC)]


def test_an_error_may_be_the_last_reply(stream: Stream) -> None:
    stream.start("runs", 1, 2)
    stream.receive(replies_to(2) + codec.encode_simple_reply(1, p.NBD_EIO))
    assert stream.finished == [("runs", errno.EIO)]


@pytest.mark.parametrize("again", [replies_to(1), codec.encode_simple_reply(1, p.NBD_EIO)])
def test_a_second_reply_to_one_part_is_a_violation(stream: Stream, again: bytes) -> None:
    stream.start("runs", 1, 2)
    with pytest.raises(ProtocolViolation, match="no command"):
        stream.receive(replies_to(1) + again + replies_to(2))
    assert stream.finished == []
    stream.stream.fail_all()
    assert stream.finished == [("runs", CONNECTION_LOST)]


def test_parts_may_be_answered_in_chunks_beside_simple_replies(stream: Stream) -> None:
    stream.start("runs", 1, 2, 3, 4)
    none = codec.CHUNK.pack(p.NBD_STRUCTURED_REPLY_MAGIC, 1, p.NBD_REPLY_TYPE_NONE, 4, 0)
    stream.receive(replies_to(1) + codec.encode_error_chunk(2, p.NBD_EIO, "bad sector") + none)
    assert stream.finished == []
    stream.receive(replies_to(3))
    assert stream.finished == [("runs", errno.EIO)]


def test_a_simple_reply_after_chunks_to_the_same_part_is_a_violation(stream: Stream) -> None:
    stream.start("runs", 1, 2)
    error = bytearray(codec.encode_error_chunk(1, p.NBD_EIO))
    error[4:6] = bytes(2)  # not the last chunk
    with pytest.raises(ProtocolViolation, match="after chunks"):
        stream.receive(bytes(error) + replies_to(1))


def test_data_for_a_part_is_a_violation(stream: Stream) -> None:
    stream.start("runs", 1, 2)
    with pytest.raises(ProtocolViolation, match="not asked for"):
        stream.receive(codec.encode_data_header(1, 0, 4, done=True) + b"data")


def test_what_was_not_answered_is_lost_once_behind_the_first_error(stream: Stream) -> None:
    stream.start("runs", 1, 2, 3)
    stream.start("failed", 4, 5, 6)
    error = bytearray(codec.encode_error_chunk(6, p.NBD_EIO))
    error[4:6] = bytes(2)
    stream.receive(replies_to(2) + codec.encode_simple_reply(5, p.NBD_ENOSPC) + bytes(error))
    stream.stream.fail_all()
    assert stream.finished == [("runs", CONNECTION_LOST), ("failed", errno.ENOSPC)]


def test_nothing_is_finished_after_a_callback_has_stopped_the_stream(stream: Stream) -> None:
    command = stream.start("runs", 1, 2)
    stream.start("more", 3, 4)

    def stop(error: int) -> None:
        stream.finished.append(("runs", error))
        stream.stream.fail_all()

    command.on_done = stop
    stream.receive(replies_to(1, 2, 3, 4))
    assert stream.finished == [("runs", 0), ("more", CONNECTION_LOST)]


def test_a_callback_that_raises_does_not_hurt_the_others(
    stream: Stream, loop: asyncio.AbstractEventLoop
) -> None:
    command = stream.start("runs", 1, 2)
    stream.start("more", 3, 4)
    reported: list[object] = []

    def fail(error: int) -> None:
        raise RuntimeError("receiver's bug")

    command.on_done = fail
    loop.set_exception_handler(lambda _, context: reported.append(context["exception"]))
    stream.receive(replies_to(1, 2, 3, 4))
    loop.set_exception_handler(None)
    assert stream.finished == [("more", 0)]
    assert len(reported) == 1


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(data=st.data())
def test_replies_in_any_order_and_pieces_finish_each_command_once(
    loop: asyncio.AbstractEventLoop, form: ModuleType, data: st.DataObject
) -> None:
    stream = Stream(loop)
    cookie = 0
    for number in range(data.draw(st.integers(1, 4))):
        count = data.draw(st.integers(1, 64))
        stream.start(str(number), *range(cookie + 1, cookie + count + 1))
        cookie += count
    commands = len(set(stream.stream.in_flight.values()))
    answers = replies_to(*data.draw(st.permutations(range(1, cookie + 1))))
    while answers:
        size = data.draw(st.integers(1, 1000))
        stream.receive(answers[:size])
        answers = answers[size:]
    assert sorted(stream.finished) == [(str(number), 0) for number in range(commands)]
