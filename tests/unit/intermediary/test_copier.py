"""The copy itself, in simulated time, over volumes in memory."""

from __future__ import annotations

import asyncio
import errno
import random
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farpage.blockio import CONNECTION_LOST, Feature
from farpage.definition.model import PAGE_BYTES
from farpage.intermediary.copier import Copier, reading_into
from farpage.intermediary.window import STEPS
from tests.support.blockio import ALL_FEATURES, MemoryIO
from tests.support.copying import FillIO
from tests.support.simulated_loop import run_simulated


def _page(number: int) -> bytes:
    return random.Random(number).randbytes(PAGE_BYTES)


def _source(data: list[bool], *, features: Feature = ALL_FEATURES) -> MemoryIO:
    source = MemoryIO(len(data) * PAGE_BYTES, features=features)
    for number, is_data in enumerate(data):
        if is_data:
            source.content[number * PAGE_BYTES : (number + 1) * PAGE_BYTES] = _page(number)
    return source


class _Copy:
    """A copier with what it has called."""

    def __init__(
        self,
        source: MemoryIO,
        target: FillIO,
        *,
        commands: Callable[[], int] = lambda: 0,
        bandwidth: int | None = None,
    ) -> None:
        self.complete = asyncio.Event()
        self.lost = asyncio.Event()
        self.copier = Copier(
            source,
            target,
            read=reading_into(source),
            client_commands=commands,
            bandwidth_bytes=bandwidth,
            on_complete=self.complete.set,
            on_lost=self.lost.set,
        )

    async def finish(self) -> Copier:
        self.copier.start()
        await self.complete.wait()
        return self.copier


def _simulated(main: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        await main()

    run_simulated(run)


@settings(max_examples=60)
@given(
    pages=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=80),
    maps=st.booleans(),
)
def test_whatever_is_present_and_wherever_there_are_holes_the_copy_becomes_whole(
    pages: list[tuple[bool, bool]], maps: bool
) -> None:
    async def main() -> None:
        features = ALL_FEATURES if maps else ALL_FEATURES & ~Feature.EXTENTS
        source, target = _source([data for data, _ in pages], features=features), FillIO(len(pages))
        own = bytes([7]) * PAGE_BYTES
        for number, (_, present) in enumerate(pages):
            if present:
                target.client_writes(number, own)
        copier = await _Copy(source, target).finish()
        for number, (_, present) in enumerate(pages):
            at = slice(number * PAGE_BYTES, (number + 1) * PAGE_BYTES)
            assert target.content[at] == (own if present else source.content[at])
        assert all(target.present)
        assert target.flushed
        moved = PAGE_BYTES * sum((data or not maps) and not present for data, present in pages)
        assert copier.read_bytes == copier.written_bytes == moved

    _simulated(main)


def test_a_hole_is_neither_read_nor_written_and_made_with_one_command() -> None:
    async def main() -> None:
        source, target = _source([True] * 2 + [False] * 5000 + [True]), FillIO(5003)
        await _Copy(source, target).finish()
        assert [entry for entry in target.log if entry[0] == "zero"] == [("zero", 8192, 5000 * PAGE_BYTES)]
        assert sum(int(str(entry[2])) for entry in source.log if entry[0] == "read") == 3 * PAGE_BYTES

    _simulated(main)


def test_an_old_copy_that_comes_late_does_not_go_over_what_the_client_wrote() -> None:
    async def main() -> None:
        source, target = _source([True] * 4), FillIO(4)
        target.hold = True
        copy = _Copy(source, target)
        finish = asyncio.ensure_future(copy.finish())
        await asyncio.sleep(0)
        while not any("write" in repr(step) for step in target.held):
            target.release()
            await asyncio.sleep(0)
        target.client_writes(2, bytes(PAGE_BYTES))
        target.hold = False
        target.release_all()
        await finish
        assert target.content[2 * PAGE_BYTES : 3 * PAGE_BYTES] == bytes(PAGE_BYTES)

    _simulated(main)


def test_it_keeps_to_a_bandwidth_and_to_a_new_one() -> None:
    async def main() -> None:
        source, target = _source([True] * 512), FillIO(512)
        loop = asyncio.get_running_loop()
        copy = _Copy(source, target, bandwidth=1 << 20)
        began = loop.time()
        loop.call_later(1.0, copy.copier.set_bandwidth, 512 << 10)
        await copy.finish()
        assert 2.5 < loop.time() - began < 3.1

    _simulated(main)


def test_paused_it_begins_nothing_and_resumed_it_goes_on() -> None:
    async def main() -> None:
        source, target = _source([True] * 8), FillIO(8)
        copy = _Copy(source, target)
        copy.copier.set_paused(True)
        copy.copier.start()
        await asyncio.sleep(60)
        assert (target.log, source.log) == ([], [])
        copy.copier.set_paused(False)
        await copy.complete.wait()
        assert all(target.present)

    _simulated(main)


def test_beside_a_busy_client_one_small_request_is_under_way() -> None:
    async def main() -> None:
        source, target = _source([True] * 1024), FillIO(1024)
        commands = 0

        def busy() -> int:
            nonlocal commands
            commands += 1
            return commands

        target.hold = True
        copy = _Copy(source, target, commands=busy)
        copy.copier.start()
        while not target.log:
            target.release()
            await asyncio.sleep(0)
        assert target.log == [("write", 0, STEPS[0].run_bytes)]
        assert copy.copier.commands == 1
        copy.copier.stop()

    _simulated(main)


def test_a_page_that_cannot_be_read_keeps_no_other_from_being_copied() -> None:
    async def main() -> None:
        source, target = _source([True] * 300), FillIO(300)
        bad = 137 * PAGE_BYTES
        whole = source.read

        def read(offset: int, length: int, done: Callable[..., None]) -> None:
            if offset <= bad < offset + length and not healed:
                done(errno.EIO, None)
            else:
                whole(offset, length, done)

        healed = False
        source.read = read  # type: ignore[method-assign]
        copy = _Copy(source, target)
        copy.copier.start()
        await asyncio.sleep(5)
        assert [number for number, present in enumerate(target.present) if not present] == [137]
        assert str(bad) in copy.copier.problem
        healed = True
        await copy.complete.wait()
        assert copy.copier.problem == ""
        assert target.content == source.content

    _simulated(main)


@pytest.mark.parametrize("command", ["write", "zero", "extents", "flush"])
def test_a_target_that_fails_is_tried_again_until_it_does_not(command: str) -> None:
    async def main() -> None:
        source, target = _source([True, False] * 50), FillIO(100)
        target.errors[command] = errno.ENOSPC
        copy = _Copy(source, target)
        copy.copier.start()
        await asyncio.sleep(30)
        assert not copy.complete.is_set()
        assert copy.copier.problem.endswith("No space left on device")
        assert len(target.log) < 200
        target.errors.clear()
        await copy.complete.wait()
        assert target.content == source.content

    _simulated(main)


@pytest.mark.parametrize("command", ["read", "write"])
def test_it_says_when_a_connection_is_lost_and_does_no_more(command: str) -> None:
    async def main() -> None:
        source, target = _source([True] * 4), FillIO(4)
        (source if command == "read" else target).errors[command] = CONNECTION_LOST
        copy = _Copy(source, target)
        copy.copier.start()
        await copy.lost.wait()
        done = len(target.log)
        await asyncio.sleep(60)
        assert len(target.log) == done
        assert not copy.complete.is_set()

    _simulated(main)


def test_another_copier_goes_on_from_what_is_present() -> None:
    async def main() -> None:
        source, target = _source([True] * 2048), FillIO(2048)
        first = _Copy(source, target, bandwidth=4 << 20)
        first.copier.start()
        await asyncio.sleep(1)
        first.copier.stop()
        had = sum(target.present)
        assert 512 <= had <= 1536
        second = await _Copy(source, target).finish()
        assert second.written_bytes == (2048 - had) * PAGE_BYTES
        assert target.content == source.content

    _simulated(main)
