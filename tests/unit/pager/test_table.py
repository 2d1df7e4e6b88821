from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farpage.pager.states import CLEAN, DIRTY, ENTRY_BYTES, ON_DEVICE, STATE_COUNT, WRITING, ZERO
from farpage.pager.table import PageTable, runs_of

PAGES = 48
States = st.lists(st.integers(0, STATE_COUNT - 1), min_size=PAGES, max_size=PAGES)


def table_of(states: list[int]) -> PageTable:
    table = PageTable(len(states))
    for page, state in enumerate(states):
        table.put(page, state)
    return table


def test_a_new_table_is_all_zero_pages() -> None:
    table = PageTable(PAGES)
    assert table.counts[ZERO] == PAGES
    assert table.resident == 0


@given(States)
def test_the_counts_are_those_of_the_states(states: list[int]) -> None:
    table = table_of(states)
    assert table.counts.tolist() == [int(n) for n in np.bincount(table.states, minlength=STATE_COUNT)]


@given(States, st.integers(0, PAGES - 1), st.integers(1, PAGES))
def test_runs_cover_a_range_in_order_and_without_joining_states(
    states: list[int], first: int, count: int
) -> None:
    count = min(count, PAGES - first)
    runs = table_of(states).runs(first, count)
    spelled = [(page, state) for start, length, state in runs for page in range(start, start + length)]
    assert spelled == [(page, states[page]) for page in range(first, first + count)]
    assert all(a[2] != b[2] for a, b in pairwise(runs))


def test_a_run_ends_at_another_state_at_the_most_asked_for_and_at_the_end() -> None:
    table = table_of([ON_DEVICE] * 5 + [DIRTY] + [ON_DEVICE] * 2)
    assert table.run(1, 64, ON_DEVICE) == 4
    assert table.run(1, 2, ON_DEVICE) == 2
    assert table.run(6, 64, ON_DEVICE) == 2
    assert table.run(5, 64, ON_DEVICE) == 0


def test_moving_a_run_keeps_the_counts() -> None:
    table = table_of([DIRTY] * 8)
    table.move(2, 3, DIRTY, WRITING)
    table.move(7, 1, DIRTY, CLEAN)
    assert (table.counts[DIRTY], table.counts[WRITING], table.counts[CLEAN]) == (4, 3, 1)
    assert table.resident == 8


def test_a_table_over_kept_storage_has_its_states_checksums_and_counts() -> None:
    storage = memoryview(bytearray(PAGES * ENTRY_BYTES))
    before = PageTable(PAGES, storage)
    before.put(3, ON_DEVICE)
    before.checksums[3] = 0xDEADBEEF
    after = PageTable(PAGES, storage)
    assert after.state[3] == ON_DEVICE
    assert after.checksums[3] == 0xDEADBEEF
    assert after.counts == before.counts


def test_storage_of_another_size_is_refused() -> None:
    with pytest.raises(ValueError, match="need"):
        PageTable(PAGES, memoryview(bytearray(7)))


@given(st.sets(st.integers(0, 200)))
def test_runs_of_pages_are_whole_and_apart(pages: set[int]) -> None:
    runs = runs_of(sorted(pages))
    assert [page for first, count in runs for page in range(first, first + count)] == sorted(pages)
    assert all(a[0] + a[1] < b[0] for a, b in pairwise(runs))
