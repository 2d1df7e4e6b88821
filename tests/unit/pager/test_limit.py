from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farpage.nbd.transmission import COMMANDS_IN_FLIGHT_MAX
from farpage.pager.limit import SMALLEST_HEADROOM_PAGES, SMALLEST_LIMIT_PAGES, Limit


@given(st.integers(SMALLEST_LIMIT_PAGES, 1 << 28))
def test_the_marks_are_in_order_and_never_five_per_cent_over(pages: int) -> None:
    limit = Limit(pages)
    assert 0 < limit.low < limit.high < limit.pages <= limit.most <= pages * 1.05


@pytest.mark.parametrize("mebibytes", [1, 128, 4096])
def test_page_outs_begin_before_the_limit_is_reached(mebibytes: int) -> None:
    limit = Limit(mebibytes * 256)
    assert limit.pages - limit.high >= 16


@given(
    st.integers(SMALLEST_LIMIT_PAGES, 1 << 28),
    st.lists(st.tuples(st.integers(0, 1 << 20), st.floats(0, 60)), max_size=10),
)
def test_the_marks_stay_in_order_at_any_pace(pages: int, taken: list[tuple[int, float]]) -> None:
    limit = Limit(pages)
    for count, seconds in taken:
        limit.follow(count, seconds)
        assert 0 < limit.low < limit.high < limit.pages


def test_a_client_that_takes_little_may_have_nearly_all_of_its_limit() -> None:
    limit = Limit(1 << 15)
    for _ in range(20):
        limit.follow(100, 10.0)
    assert limit.pages - limit.high == SMALLEST_HEADROOM_PAGES


def test_page_outs_begin_early_again_once_a_client_takes_much() -> None:
    limit = Limit(1 << 15)
    widest = limit.high
    for _ in range(20):
        limit.follow(100, 10.0)
    limit.follow(1000, 0.01)
    assert limit.high == widest


def test_a_pause_does_not_take_all_of_the_headroom_at_once() -> None:
    limit = Limit(1 << 15)
    before = limit.pages - limit.high
    limit.follow(1, 60.0)
    assert before // 2 < limit.pages - limit.high < before


@given(st.integers(SMALLEST_LIMIT_PAGES, 1 << 28))
def test_pages_held_back_from_a_failed_server_never_fill_the_limit(pages: int) -> None:
    limit = Limit(pages)
    assert 2 * limit.in_flight < limit.low


def test_page_outs_that_all_wait_leave_a_connection_half_of_its_commands_for_page_ins() -> None:
    assert Limit(1 << 24).in_flight <= COMMANDS_IN_FLIGHT_MAX // 2
