"""What a replica has missed."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from farpage.volume.dirty import DirtyMap, MemoryDirtyStore

PAGES = 64


def empty() -> DirtyMap:
    return DirtyMap(memoryview(bytearray(PAGES)))


@given(st.lists(st.tuples(st.booleans(), st.integers(0, PAGES - 1), st.integers(1, 16))))
def test_it_counts_what_was_marked_and_not_cleared(steps: list[tuple[bool, int, int]]) -> None:
    dirty, model = empty(), set[int]()
    for marks, first, longest in steps:
        count = min(longest, PAGES - first)
        pages = range(first, first + count)
        if marks:
            dirty.mark(first, count)
            model.update(pages)
        else:
            dirty.clear(first, count)
            model.difference_update(pages)
        assert dirty.count == len(model)
        assert dirty.any(first, count) == bool(model & set(pages))


@given(
    st.sets(st.integers(0, PAGES - 1)),
    st.sets(st.integers(0, PAGES - 1)),
    st.integers(0, PAGES),
    st.integers(1, 8),
)
def test_a_run_is_missed_whole_skips_nothing_it_should_and_is_found_if_there_is_one(
    missed: set[int], skip: set[int], start: int, longest: int
) -> None:
    dirty = empty()
    for page in missed:
        dirty.mark(page, 1)
    found = dirty.next_run(start, longest, skip)
    if found is None:
        assert not missed - skip
        return
    first, count = found
    assert 0 < count <= longest
    assert set(range(first, first + count)) <= missed - skip


def test_what_nobody_will_read_is_forgotten() -> None:
    dirty = empty()
    dirty.mark(0, PAGES)
    wanted = np.zeros(PAGES, dtype=np.bool_)
    wanted[3:5] = True
    dirty.keep(wanted)
    assert (dirty.count, dirty.next_run(0, 8, set())) == (2, (3, 2))


def test_a_map_is_found_again_by_its_device_until_it_is_dropped() -> None:
    store = MemoryDirtyStore(PAGES)
    DirtyMap(store.dirty_map("d")).mark(7, 1)
    assert DirtyMap(store.dirty_map("d", missed=True)).count == 1
    store.drop_dirty_map("d")
    assert store.dirty_maps == ()
    assert DirtyMap(store.dirty_map("d", missed=True)).count == PAGES
