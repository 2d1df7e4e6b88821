from __future__ import annotations

import random
from typing import Protocol

import pytest

from farpage.pager.readahead import LARGEST_WINDOW_PAGES, STREAMS, PythonReadAhead, ReadAhead, new_read_ahead


class Make(Protocol):
    def __call__(self, largest_window_pages: int = ..., *, gaps: bool = True) -> ReadAhead: ...


def compiled(largest_window_pages: int = LARGEST_WINDOW_PAGES, *, gaps: bool = True) -> ReadAhead:
    ahead = new_read_ahead(largest_window_pages, gaps=gaps)
    if isinstance(ahead, PythonReadAhead):
        pytest.skip("it was not compiled here")
    return ahead


@pytest.fixture(params=[PythonReadAhead, compiled])
def make(request: pytest.FixtureRequest) -> Make:
    found: Make = request.param
    return found


def sweep(ahead: ReadAhead, first: int, last: int) -> list[int]:
    """Fault through a range, skipping what a window brought in; returns the windows."""
    windows = []
    page = first
    while page < last:
        windows.append(ahead.window(page))
        page += windows[-1]
    return windows


def test_a_lone_fault_gets_its_page_alone(make: Make) -> None:
    assert make().window(17) == 1


def test_the_window_doubles_along_a_stream_up_to_the_largest(make: Make) -> None:
    windows = sweep(make(), 0, 1000)
    assert windows[:8] == [1, 2, 4, 8, 16, 32, 64, 64]
    assert max(windows) == LARGEST_WINDOW_PAGES


def test_interleaved_streams_are_told_apart(make: Make) -> None:
    ahead = make()
    position = [0, 10_000, 20_000]
    for _ in range(8):
        for stream in range(3):
            position[stream] += ahead.window(position[stream])
    assert [ahead.window(page) for page in position] == [LARGEST_WINDOW_PAGES] * 3


def test_a_stream_goes_on_over_pages_that_were_in_memory(make: Make) -> None:
    ahead = make()
    sweep(ahead, 0, 100)
    assert ahead.window(127 + 10) == LARGEST_WINDOW_PAGES


def test_a_window_that_was_cut_short_does_not_end_the_stream(make: Make) -> None:
    ahead = make()
    page = 0
    for _ in range(20):
        window = ahead.window(page)
        page += min(window, 3)
    assert window == LARGEST_WINDOW_PAGES


def test_without_gaps_a_stream_ends_at_the_first_page_left_out(make: Make) -> None:
    ahead = make(gaps=False)
    assert [ahead.window(page) for page in (0, 1, 3, 7, 16)] == [1, 2, 4, 8, 1]


def test_random_faults_read_hardly_anything_in_vain(make: Make) -> None:
    ahead = make()
    rng = random.Random(1)
    windows = [ahead.window(rng.randrange(1_000_000)) for _ in range(10_000)]
    assert sum(windows) <= 1.01 * len(windows)


def test_the_stream_that_was_seen_last_longest_ago_is_forgotten(make: Make) -> None:
    ahead = make()
    first = [stream * 10_000 for stream in range(STREAMS + 1)]
    for page in first:
        ahead.window(page)
    assert [ahead.window(page + 1) for page in first[1:]] == [2] * STREAMS
    assert ahead.window(first[0] + 1) == 1


def test_both_do_the_same() -> None:
    rng = random.Random(2)
    for gaps in (True, False):
        ours, other = PythonReadAhead(32, gaps=gaps), compiled(32, gaps=gaps)
        page = 0
        for _ in range(20_000):
            page = rng.choice([page + 1, page + rng.randrange(-3, 70), rng.randrange(1_000)])
            assert ours.window(page) == other.window(page)
