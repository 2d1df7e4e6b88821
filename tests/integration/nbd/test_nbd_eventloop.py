"""The data plane's event loop: asyncio's own in everything but the short cut."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Coroutine
from functools import partial
from typing import Any

import pytest

from farpage.nbd.client import Connection
from farpage.nbd.eventloop import DataPlaneLoop
from tests.support.blockio import MemoryIO
from tests.support.commands import read_bytes, write_bytes
from tests.support.nbd import serving


def run(main: Coroutine[Any, Any, None]) -> None:
    with asyncio.Runner(loop_factory=DataPlaneLoop) as runner:
        runner.run(main)


def the_loop() -> DataPlaneLoop:
    loop = asyncio.get_running_loop()
    assert isinstance(loop, DataPlaneLoop)
    return loop


class Pair:
    """Two connected sockets; one is read directly."""

    def __init__(self, *, scheduled: bool) -> None:
        self.near, self.far = socket.socketpair()
        self.near.setblocking(False)
        self.scheduled = scheduled
        self.received = 0
        the_loop().add_direct_reader(self.near, self.on_readable)

    def on_readable(self) -> bool:
        self.received += len(self.near.recv(100))
        return self.scheduled

    def close(self) -> None:
        the_loop().remove_direct_reader(self.near)
        self.near.close()
        self.far.close()


def test_a_server_and_a_client_work_on_it() -> None:
    async def main() -> None:
        async with serving({"v": MemoryIO(1 << 20), "w": MemoryIO(1 << 20, at_hand=False)}) as serving_:
            for name in ("v", "w"):
                connection = await Connection.open(serving_.address, name)
                for offset in range(0, 1 << 20, 64 << 10):
                    data = bytes([offset >> 16]) * 65536
                    assert await write_bytes(connection, offset, data) == 0
                    assert await read_bytes(connection, offset, 4096) == data[:4096]
                    assert await read_bytes(connection, offset, 65536) == data
                await connection.close()

    run(main())


@pytest.mark.parametrize("scheduled", [False, True])
def test_a_timer_is_not_late_while_a_direct_reader_is_busy(scheduled: bool) -> None:
    async def main() -> None:
        pair = Pair(scheduled=scheduled)
        loop = the_loop()
        over = loop.create_future()
        echoing = True

        def echo() -> bool:
            result = Pair.on_readable(pair)
            if echoing:
                pair.far.send(b"again")
            return result

        loop.add_direct_reader(pair.near, echo)
        pair.far.send(b"begin")
        begun = loop.time()
        loop.call_later(0.03, over.set_result, None)
        await over
        echoing = False
        assert 0.03 <= loop.time() - begun < 10
        assert pair.received > 10, "the reader was not busy"
        pair.close()

    run(main())


def test_other_sockets_are_served_while_a_direct_reader_is_busy() -> None:
    async def main() -> None:
        pair = Pair(scheduled=False)
        loop = the_loop()

        def echo() -> bool:
            pair.near.recv(100)
            pair.far.send(b"again")
            return False

        loop.add_direct_reader(pair.near, echo)
        pair.far.send(b"begin")
        first, second = socket.socketpair()
        with first, second:
            first.setblocking(False)
            second.setblocking(False)
            for _ in range(20):
                await loop.sock_sendall(first, b"x")
                assert await loop.sock_recv(second, 10) == b"x"
        pair.close()

    run(main())


def test_callbacks_from_other_threads_arrive_while_nothing_else_happens() -> None:
    async def main() -> None:
        pair = Pair(scheduled=False)
        assert await asyncio.to_thread(lambda: 7) == 7
        pair.close()

    run(main())


def test_what_a_direct_reader_schedules_runs() -> None:
    async def main() -> None:
        pair = Pair(scheduled=True)
        loop = the_loop()
        ran = loop.create_future()

        def schedule() -> bool:
            pair.near.recv(100)
            loop.call_soon(ran.set_result, None)
            return True

        loop.add_direct_reader(pair.near, schedule)
        pair.far.send(b"x")
        await asyncio.wait_for(ran, 60)
        pair.close()

    run(main())


def test_what_direct_readers_defer_is_called_once_after_all_of_them() -> None:
    async def main() -> None:
        loop, calls = the_loop(), list[str]()
        done = loop.create_future()
        first, second, third = (Pair(scheduled=False) for _ in range(3))

        def reader(pair: Pair) -> None:
            pair.near.recv(100)
            calls.append("read")
            if calls == ["read"]:
                loop.defer(lambda: calls.append("deferred"))
                loop.defer(lambda: third.far.send(b"x"))

        def read_after_that() -> None:
            third.near.recv(100)
            calls.append("read after that")
            done.set_result(None)

        loop.add_direct_reader(third.near, read_after_that)
        for pair in (first, second):
            loop.add_direct_reader(pair.near, partial(reader, pair))
        first.far.send(b"x")
        second.far.send(b"x")
        await asyncio.wait_for(done, 60)
        assert calls == ["read", "read", "deferred", "read after that"]
        for pair in (first, second, third):
            pair.close()

    run(main())


def test_what_is_left_for_later_is_done_after_the_events_that_come_next() -> None:
    async def main() -> None:
        loop, calls = the_loop(), list[str]()
        done = loop.create_future()
        first, second = Pair(scheduled=False), Pair(scheduled=False)

        def read_first() -> None:
            first.near.recv(100)
            calls.append("first read")
            loop.later(lambda: calls.append("left for later"))
            loop.later(lambda: done.set_result(None))
            second.far.send(b"x")

        def read_second() -> None:
            second.near.recv(100)
            calls.append("second read")

        loop.add_direct_reader(first.near, read_first)
        loop.add_direct_reader(second.near, read_second)
        first.far.send(b"x")
        await asyncio.wait_for(done, 60)
        assert calls == ["first read", "second read", "left for later"]
        for pair in (first, second):
            pair.close()

    run(main())


@pytest.mark.parametrize("timer_seconds", [None, 60.0], ids=["without a timer", "before a timer is due"])
def test_what_is_left_for_later_is_done_although_no_event_comes(timer_seconds: float | None) -> None:
    async def main() -> None:
        loop = the_loop()
        done = loop.create_future()
        loop.later(lambda: done.set_result(None))
        async with asyncio.timeout(timer_seconds):
            await done

    run(main())


def test_what_is_left_for_later_ends_no_wait_before_its_timer() -> None:
    async def main() -> None:
        loop = the_loop()
        began = loop.time()
        loop.later(lambda: loop.later(lambda: None))
        await asyncio.sleep(0.02)
        assert loop.time() - began >= 0.02

    run(main())


def test_reading_directly_and_waiting_to_write_share_a_socket() -> None:
    async def main() -> None:
        pair = Pair(scheduled=False)
        loop = the_loop()
        writable = loop.create_future()

        def on_writable() -> None:
            loop.remove_writer(pair.near)
            writable.set_result(None)

        loop.add_writer(pair.near, on_writable)
        await asyncio.wait_for(writable, 60)
        pair.far.send(b"abc")
        await asyncio.to_thread(lambda: None)
        assert pair.received == 3
        pair.close()

    run(main())


def test_a_direct_reader_that_raises_is_reported_and_the_loop_goes_on() -> None:
    async def main() -> None:
        pair = Pair(scheduled=False)
        loop = the_loop()
        reported = loop.create_future()
        loop.set_exception_handler(lambda _, context: reported.set_result(context["exception"]))

        def fail() -> bool:
            pair.near.recv(100)
            raise RuntimeError("a bug")

        loop.add_direct_reader(pair.near, fail)
        pair.far.send(b"x")
        assert str(await asyncio.wait_for(reported, 60)) == "a bug"
        pair.close()

    run(main())


def test_registering_a_socket_twice_or_not_at_all_is_an_error() -> None:
    loop = DataPlaneLoop()
    first, second = socket.socketpair()
    with first, second:
        selector = loop._direct_selector
        key = selector.register(first, 1, "data")
        with pytest.raises(KeyError):
            selector.register(first, 1)
        assert selector.get_key(first) is key
        assert selector.modify(first, 3, "other").events == 3
        assert selector.get_map()[first.fileno()].data == "other"
        selector.unregister(first)
        with pytest.raises(KeyError):
            selector.unregister(first)
    loop.close()
