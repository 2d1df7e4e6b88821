from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farpage.nbd.transmission import COMMANDS_IN_FLIGHT_MAX
from farpage.pager.limit import SMALLEST_LIMIT_PAGES, Limit


@given(st.integers(SMALLEST_LIMIT_PAGES, 1 << 28))
def test_the_marks_are_in_order_and_never_five_per_cent_over(pages: int) -> None:
    limit = Limit(pages)
    assert 0 < limit.low < limit.high < limit.pages <= limit.most <= pages * 1.05


@pytest.mark.parametrize("mebibytes", [1, 128, 4096])
def test_page_outs_begin_before_the_limit_is_reached(mebibytes: int) -> None:
    limit = Limit(mebibytes * 256)
    assert limit.pages - limit.high >= 16


@given(st.integers(SMALLEST_LIMIT_PAGES, 1 << 28))
def test_pages_held_back_from_a_failed_server_never_fill_the_limit(pages: int) -> None:
    limit = Limit(pages)
    assert 2 * limit.in_flight < limit.low


def test_page_outs_that_all_wait_leave_a_connection_half_of_its_commands_for_page_ins() -> None:
    assert Limit(1 << 24).in_flight <= COMMANDS_IN_FLIGHT_MAX // 2
