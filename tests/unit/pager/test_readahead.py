from __future__ import annotations

import random

from farpage.pager.readahead import LARGEST_WINDOW_PAGES, ReadAhead


def sweep(ahead: ReadAhead, first: int, last: int) -> list[int]:
    """Fault through a range, skipping what a window brought in; returns the windows."""
    windows = []
    page = first
    while page < last:
        windows.append(ahead.window(page))
        page += windows[-1]
    return windows


def test_a_lone_fault_gets_its_page_alone() -> None:
    assert ReadAhead().window(17) == 1


def test_the_window_doubles_along_a_stream_up_to_the_largest() -> None:
    windows = sweep(ReadAhead(), 0, 1000)
    assert windows[:8] == [1, 2, 4, 8, 16, 32, 64, 64]
    assert max(windows) == LARGEST_WINDOW_PAGES


def test_interleaved_streams_are_told_apart() -> None:
    ahead = ReadAhead()
    position = [0, 10_000, 20_000]
    for _ in range(8):
        for stream in range(3):
            position[stream] += ahead.window(position[stream])
    assert [ahead.window(page) for page in position] == [LARGEST_WINDOW_PAGES] * 3


def test_a_stream_goes_on_over_pages_that_were_in_memory() -> None:
    ahead = ReadAhead()
    sweep(ahead, 0, 100)
    assert ahead.window(127 + 10) == LARGEST_WINDOW_PAGES


def test_a_window_that_was_cut_short_does_not_end_the_stream() -> None:
    ahead = ReadAhead()
    page = 0
    for _ in range(20):
        window = ahead.window(page)
        page += min(window, 3)
    assert window == LARGEST_WINDOW_PAGES


def test_without_gaps_a_stream_ends_at_the_first_page_left_out() -> None:
    ahead = ReadAhead(gaps=False)
    assert [ahead.window(page) for page in (0, 1, 3, 7, 16)] == [1, 2, 4, 8, 1]


def test_random_faults_read_hardly_anything_in_vain() -> None:
    ahead = ReadAhead()
    rng = random.Random(1)
    windows = [ahead.window(rng.randrange(1_000_000)) for _ in range(10_000)]
    assert sum(windows) <= 1.01 * len(windows)
