"""What is to be copied, from the two maps."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from farpage.blockio import Allocation, Extent
from farpage.intermediary.plan import Run, absent, runs

HOLE = Allocation.HOLE | Allocation.ZERO


def _map(blocks: list[bool], marked: Allocation) -> list[Extent]:
    return [Extent(4096, marked if block else Allocation.DATA) for block in blocks]


def test_neighbouring_holes_of_the_target_are_one_absent_range() -> None:
    extents = [Extent(4096, HOLE), Extent(8192, HOLE), Extent(4096, Allocation.DATA), Extent(4096, HOLE)]
    assert absent(4096, extents) == ([(4096, 12288), (20480, 4096)], 24576)


def test_allocated_zeros_are_a_hole_and_unallocated_data_is_data() -> None:
    extents = [Extent(4096, Allocation.ZERO), Extent(4096, Allocation.HOLE)]
    assert runs([(0, 8192)], 0, extents) == ([Run(0, 4096, True), Run(4096, 4096, False)], [])


def test_what_the_map_does_not_reach_is_left_for_later() -> None:
    assert runs([(0, 8192), (12288, 4096)], 0, [Extent(4096, HOLE)]) == (
        [Run(0, 4096, True)],
        [(4096, 4096), (12288, 4096)],
    )


@given(
    pages=st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60),
    reach=st.integers(1, 60),
)
def test_every_absent_page_is_copied_once_as_what_it_is(pages: list[tuple[bool, bool]], reach: int) -> None:
    ranges, end = absent(0, _map([is_absent for is_absent, _ in pages], HOLE))
    assert end == len(pages) * 4096
    found: list[Run] = []
    while ranges:
        first = ranges[0][0] // 4096
        known, ranges = runs(
            ranges, first * 4096, _map([hole for _, hole in pages][first : first + reach], HOLE)
        )
        found += known
    planned = {page: run.hole for run in found for page in range(run.offset // 4096, run.stop // 4096)}
    assert sum(run.length for run in found) == 4096 * len(planned)
    assert planned == {page: hole for page, (is_absent, hole) in enumerate(pages) if is_absent}


@given(length=st.integers(1, 40), at_most=st.integers(1, 50), hole=st.booleans())
def test_a_run_is_split_without_a_gap(length: int, at_most: int, hole: bool) -> None:
    first, rest = Run(7, length, hole).split(at_most)
    assert first.length == min(length, at_most)
    assert first.hole == hole
    if rest is not None:
        assert (rest.offset, rest.stop, rest.hole) == (first.stop, 7 + length, hole)
    else:
        assert first == Run(7, length, hole)
