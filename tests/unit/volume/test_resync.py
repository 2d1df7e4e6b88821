"""The copy to a returned replica by itself, between a source and a target whose answers the test gives."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from farpage.blockio import Done, ReadDone
from farpage.volume.dirty import DirtyMap
from farpage.volume.pace import Pace
from farpage.volume.resync import READS_OF_WRONG_PAGE, RUN_PAGES, RUNS_IN_FLIGHT, Resync
from tests.support.simulated_loop import run_simulated

PAGE = 4096
PAGES = 1024


class Copy:
    """A resync whose reads and writes wait for the test, or are answered at once."""

    def __init__(self, bytes_per_second: float = 1 << 40, *, at_once: bool = False) -> None:
        self.dirty = DirtyMap(memoryview(bytearray(PAGES)))
        self.busy: set[int] = set()
        self.wrong: set[int] = set()
        """Pages that come with other content than they should."""
        self.source = bytearray(b"".join(bytes([page % 251]) * PAGE for page in range(PAGES)))
        self.target = bytearray(PAGES * PAGE)
        self.readable = True
        self.reads: list[tuple[int, int, ReadDone]] = []
        """Those that wait, by their first page and how many they are of."""
        self.writes: list[tuple[int, memoryview, Done]] = []
        self.read_pages: list[int] = []
        """Every page that was ever asked for."""
        self.started_seconds: list[float] = []
        self.at_once = at_once
        self._loop = asyncio.get_running_loop()
        self.resync = Resync(
            self.dirty,
            self.busy,
            Pace(bytes_per_second),
            read=self._read,
            write=self._write,
            wrong=lambda first, content: {
                page for page in self.wrong if first <= page < first + len(content) // PAGE
            },
            on_copied=lambda: None,
        )

    def _read(self, offset: int, length: int, done: ReadDone) -> bool:
        if not self.readable:
            return False
        first, count = offset // PAGE, length // PAGE
        self.read_pages.extend(range(first, first + count))
        self.started_seconds.append(self._loop.time())
        self.reads.append((first, count, done))
        if self.at_once:
            self._loop.call_soon(self.answer_read)
        return True

    def _write(self, offset: int, data: memoryview, done: Done) -> None:
        self.writes.append((offset // PAGE, data, done))
        if self.at_once:
            self.answer_write()

    def answer_read(self, error: int = 0) -> None:
        """Answer the oldest read."""
        first, count, done = self.reads.pop(0)
        content = memoryview(self.source)[first * PAGE : (first + count) * PAGE]
        done(error, None if error else content)

    def answer_write(self, error: int = 0) -> None:
        """Carry the oldest write out."""
        first, data, done = self.writes.pop(0)
        if not error:
            self.target[first * PAGE : first * PAGE + len(data)] = data
        done(error)

    def copied(self) -> set[int]:
        """Return the pages that the target has."""
        return {page for page in range(PAGES) if any(self.target[page * PAGE : (page + 1) * PAGE])}

    async def turns(self) -> None:
        """Let everything run that no answer is missing for."""
        await asyncio.sleep(0.01)


def with_copy(scenario: Callable[[], Coroutine[Any, Any, None]]) -> None:
    run_simulated(scenario)


def test_just_what_was_missed_is_read_and_copied() -> None:
    async def main() -> None:
        copy = Copy(at_once=True)
        missed = {3, 4, 5, 77, 500, 501}
        for page in missed:
            copy.dirty.mark(page, 1)
        copy.resync.wake()
        await copy.turns()
        assert (copy.copied(), sorted(copy.read_pages)) == (missed, sorted(missed))
        assert (copy.dirty.count, copy.resync.copied_pages) == (0, len(missed))

    with_copy(main)


def test_a_few_runs_are_under_way_and_none_twice() -> None:
    async def main() -> None:
        copy = Copy()
        copy.dirty.mark(0, PAGES)
        copy.resync.wake()
        await copy.turns()
        assert [(first, count) for first, count, _ in copy.reads] == [
            (RUN_PAGES * turn, RUN_PAGES) for turn in range(RUNS_IN_FLIGHT)
        ]
        copy.resync.wake()
        await copy.turns()
        assert len(copy.reads) == RUNS_IN_FLIGHT

    with_copy(main)


def test_a_page_counts_as_missed_until_its_copy_is_acknowledged() -> None:
    async def main() -> None:
        copy = Copy()
        copy.dirty.mark(7, 2)
        copy.resync.wake()
        await copy.turns()
        copy.answer_read()
        assert copy.dirty.count == 2
        copy.answer_write(errno.EIO)
        assert (copy.dirty.count, copy.resync.copied_pages) == (2, 0)
        await copy.turns()
        copy.answer_read()
        copy.answer_write()
        assert (copy.dirty.count, copy.resync.copied_pages) == (0, 2)

    with_copy(main)


def test_a_page_with_a_write_in_flight_is_left_alone_until_that_is_done() -> None:
    async def main() -> None:
        copy = Copy(at_once=True)
        copy.dirty.mark(10, 3)
        copy.busy.add(11)
        copy.resync.wake()
        await copy.turns()
        assert copy.copied() == {10, 12}
        copy.busy.clear()
        copy.resync.wake()
        await copy.turns()
        assert copy.copied() == {10, 11, 12}

    with_copy(main)


def test_new_data_goes_out_at_once_and_what_was_read_of_its_page_is_dropped() -> None:
    async def main() -> None:
        copy = Copy()
        copy.dirty.mark(20, 4)
        copy.resync.wake()
        await copy.turns()
        started: list[str] = []
        copy.resync.admit(21, 1, lambda: started.append("new"))
        assert started == ["new"]
        copy.answer_read()
        assert [(first, len(data) // PAGE) for first, data, _ in copy.writes] == [(20, 1), (22, 2)]

    with_copy(main)


def test_new_data_waits_for_the_copy_of_its_page_that_is_being_written() -> None:
    async def main() -> None:
        copy = Copy()
        copy.dirty.mark(20, 4)
        copy.resync.wake()
        await copy.turns()
        copy.answer_read()
        started: list[str] = []
        copy.resync.admit(23, 1, lambda: started.append("same page"))
        copy.resync.admit(24, 1, lambda: started.append("other page"))
        assert started == ["other page"]
        copy.answer_write()
        assert started == ["other page", "same page"]

    with_copy(main)


@pytest.mark.parametrize("stage", ["reading", "writing"])
def test_a_copy_that_is_stopped_holds_nothing_back_and_clears_nothing(stage: str) -> None:
    async def main() -> None:
        copy = Copy()
        copy.dirty.mark(20, 4)
        copy.resync.wake()
        await copy.turns()
        if stage == "writing":
            copy.answer_read()
        started: list[str] = []
        copy.resync.admit(21, 1, lambda: started.append("new"))
        copy.resync.stop()
        assert started == ["new"]
        if stage == "reading":
            copy.answer_read()
            assert copy.writes == []
        else:
            copy.answer_write()
        await copy.turns()
        assert (copy.dirty.count, copy.reads) == (4, [])

    with_copy(main)


def test_it_keeps_to_its_bandwidth_and_saves_none_up() -> None:
    async def main() -> None:
        per_second = 4 * RUN_PAGES * PAGE  # four runs
        copy = Copy(per_second, at_once=True)
        await asyncio.sleep(60)
        begun = asyncio.get_running_loop().time()
        copy.dirty.mark(0, PAGES)
        copy.resync.wake()
        await asyncio.sleep(1.1)
        assert copy.resync.copied_pages == 5 * RUN_PAGES
        while copy.dirty.count:
            await asyncio.sleep(0.1)
        at = [seconds - begun for seconds in copy.started_seconds]
        assert at == pytest.approx([0.25 * run for run in range(PAGES // RUN_PAGES)], abs=0.001)

    with_copy(main)


def test_without_a_source_it_waits_until_it_is_woken() -> None:
    async def main() -> None:
        copy = Copy(at_once=True)
        copy.readable = False
        copy.dirty.mark(1, 1)
        copy.resync.wake()
        await asyncio.sleep(5)
        assert copy.read_pages == []
        copy.readable = True
        copy.resync.wake()
        await copy.turns()
        assert copy.copied() == {1}

    with_copy(main)


def test_a_read_that_fails_is_repeated() -> None:
    async def main() -> None:
        copy = Copy()
        copy.dirty.mark(1, 2)
        copy.resync.wake()
        await copy.turns()
        copy.answer_read(errno.EIO)
        await copy.turns()
        copy.answer_read()
        copy.answer_write()
        assert copy.copied() == {1, 2}

    with_copy(main)


def test_content_that_is_not_what_it_should_be_is_read_again_a_few_times() -> None:
    async def main() -> None:
        copy = Copy(at_once=True)
        copy.dirty.mark(1, 3)
        copy.wrong = {2}
        copy.resync.wake()
        await copy.turns()
        assert copy.copied() == {1, 2, 3}
        assert copy.read_pages.count(2) == READS_OF_WRONG_PAGE
        assert (copy.read_pages.count(1), copy.dirty.count) == (1, 0)

    with_copy(main)
