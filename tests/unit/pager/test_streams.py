from __future__ import annotations

import random
from collections.abc import Callable
from typing import TypeAlias

import pytest

from farpage.pager.streams import (
    LARGEST_STRIDED_WINDOW_PAGES,
    LARGEST_WINDOW_PAGES,
    SMALLEST_MARKED_PAGES,
    Ahead,
    PythonStreams,
    Streams,
    new_streams,
    pieces,
)

PAGES = 1 << 20
PLENTY = 1 << 16

Make: TypeAlias = Callable[[int], Streams]


def compiled(pages: int) -> Streams:
    streams = new_streams(pages)
    if isinstance(streams, PythonStreams):
        pytest.skip("they were not compiled here")
    return streams


@pytest.fixture(params=[PythonStreams, compiled])
def make(request: pytest.FixtureRequest) -> Make:
    found: Make = request.param
    return found


class Reader:
    """A client that asks for pages, and what it has of those that were read ahead for it."""

    def __init__(self, make: Make, pages: int = PAGES) -> None:
        self.streams = make(pages)
        self.present: set[int] = set()
        self.windows: list[int] = []
        self.faults = 0

    def touch(self, page: int, most: int = PLENTY) -> None:
        if page in self.present and page not in self.streams.markers:
            return
        self.faults += page not in self.present
        found = self.streams.fault(page, most)
        self.present.add(page)
        if found:
            ahead = Ahead._make(found)
            self.windows.append(ahead.length)
            self.present.update(ahead.pages())

    @property
    def read_ahead(self) -> int:
        return sum(self.windows)


@pytest.mark.parametrize("step", [1, -1, 7, -7, 64])
def test_a_stream_of_any_step_waits_only_at_its_beginning(make: Make, step: int) -> None:
    reader = Reader(make)
    first = 0 if step > 0 else PAGES - 1
    for page in range(first, first + 5000 * step, step):
        reader.touch(page)
    assert reader.faults < 10
    neighbours = step in (1, -1)
    assert max(reader.windows) == (LARGEST_WINDOW_PAGES if neighbours else LARGEST_STRIDED_WINDOW_PAGES)


def test_the_windows_double_and_each_of_some_size_has_one_marker(make: Make) -> None:
    reader = Reader(make)
    for page in range(40):
        reader.touch(page)
        assert len(reader.streams.markers) == (reader.windows[-1:] >= [SMALLEST_MARKED_PAGES - 1])
    assert reader.windows == [1, 3, 7, 16, 32, 64]


def test_the_next_window_is_asked_for_when_the_marker_is_touched(make: Make) -> None:
    streams = make(PAGES)
    streams.fault(0, PLENTY)
    assert streams.fault(1, PLENTY) == (2, 1, 1, -1)
    assert streams.fault(3, PLENTY) == (4, 1, 3, -1)
    ahead = streams.fault(7, PLENTY)
    (marker,) = streams.markers
    assert ahead == (8, 1, 7, marker)
    assert streams.fault(marker, PLENTY) == (15, 1, 16, 15)
    assert streams.markers == {15}


def test_faults_here_and_there_read_nothing(make: Make) -> None:
    streams = make(PAGES)
    rng = random.Random(1)
    assert [streams.fault(rng.randrange(PAGES), PLENTY) for _ in range(10_000)].count(None) > 9990


@pytest.mark.parametrize("pages", [1 << 12, 1 << 17])
def test_random_faults_waste_at_most_a_tenth(make: Make, pages: int) -> None:
    reader = Reader(make, pages)
    rng = random.Random(2)
    for _ in range(20_000):
        reader.touch(rng.randrange(pages))
        if len(reader.present) > pages // 4:  # what is not in memory for good asks again
            reader.present.clear()
    assert reader.read_ahead <= reader.faults // 10


def test_streams_among_random_faults_are_followed(make: Make) -> None:
    reader = Reader(make)
    rng = random.Random(3)
    for page in range(2000):
        reader.touch(page)
        reader.streams.fault(rng.randrange(PAGES // 2, PAGES), PLENTY)
    assert max(reader.windows) == LARGEST_WINDOW_PAGES


def test_several_streams_are_told_apart(make: Make) -> None:
    reader = Reader(make)
    for page in range(2000):
        for first in range(4):
            reader.touch(first * 100_000 + page)
    assert reader.faults < 40


def test_what_no_stream_came_to_is_counted_and_makes_windows_smaller(make: Make) -> None:
    reader = Reader(make)
    rng = random.Random(4)
    for _ in range(400):
        first = rng.randrange(PAGES)
        for page in range(first, first + 12):
            reader.touch(page)
    used = 400 * 12
    assert 0 < reader.streams.wasted_pages < used // 4
    assert max(reader.windows[-50:]) <= 4


def test_a_long_stream_gets_large_windows_after_short_ones_wasted_theirs(make: Make) -> None:
    reader = Reader(make)
    for number in range(50):
        for page in range(12):
            reader.touch(number * 1000 + page)
    for page in range(100_000, 110_000):
        reader.touch(page)
    assert max(reader.windows) == LARGEST_WINDOW_PAGES


def test_no_more_is_read_than_there_is_room_for_and_than_the_memory_has(make: Make) -> None:
    reader = Reader(make, 100)
    for page in range(100):
        reader.touch(page, most=20)
    assert max(reader.windows) <= 20
    assert reader.present == set(range(100))
    for page in range(99, -1, -1):
        reader.present.discard(page)
    for page in range(99, -1, -1):
        reader.touch(page, most=20)
    assert reader.present == set(range(100))


def test_neighbours_are_read_in_pieces_and_others_one_by_one(make: Make) -> None:
    streams = make(PAGES)
    for page in (9, 8, 6):
        found = streams.fault(page, PLENTY)
    assert found is not None
    ahead = Ahead._make(found)
    assert list(pieces(ahead)) == [(3, 3)]
    assert list(pieces(ahead._replace(first=1000, length=100))) == [(937, 64), (901, 36)]
    assert list(pieces(ahead._replace(step=5))) == [(5, 1), (10, 1), (15, 1)]


def test_both_do_the_same() -> None:
    rng = random.Random(5)
    for pages in (300, 1 << 14):
        ours, other = PythonStreams(pages), compiled(pages)
        page, step = 0, 1
        for _ in range(50_000):
            if rng.random() < 0.03:
                page, step = rng.randrange(pages), rng.choice([1, -1, 2, 7, -7, 64, -64, 80])
            markers = sorted(ours.markers)
            other_page = rng.choice([rng.randrange(pages), *markers])
            asked = page if rng.random() < 0.8 else other_page
            most = rng.choice([PLENTY, PLENTY, 0, -3, 20])
            assert ours.fault(asked, most) == other.fault(asked, most)
            assert (set(ours.markers), ours.wasted_pages) == (set(other.markers), other.wasted_pages)
            page = min(max(page + step * rng.choice([1, 1, 1, 2, 9]), 0), pages - 1)
