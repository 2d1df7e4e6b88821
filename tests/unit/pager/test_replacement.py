from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from farpage.pager.replacement import Replacement


def filled(pages: int) -> Replacement:
    order = Replacement(pages * 4)
    for page in range(pages):
        order.added(page)
    return order


def evict(order: Replacement, count: int) -> list[int]:
    victims = order.victims(count)
    for page in victims:
        order.evicted(page)
    return victims


def test_pages_leave_in_the_order_in_which_they_came() -> None:
    assert evict(filled(10), 4) == [0, 1, 2, 3]


def test_a_page_is_a_victim_once() -> None:
    order = filled(10)
    order.added(3)
    order.returned(3)
    assert sorted(evict(order, 100)) == list(range(10))
    assert evict(order, 100) == []


def test_a_page_that_comes_back_soon_outlives_those_that_came_before_it() -> None:
    order = filled(30)
    assert evict(order, 1) == [0]
    order.returned(0)
    assert 0 not in evict(order, 29)
    assert evict(order, 1) == [0]


def test_a_page_that_comes_back_late_gets_no_second_chance() -> None:
    order = filled(100)
    first = evict(order, 90)
    order.returned(first[0])
    assert evict(order, 11) == [*range(90, 100), 0]


def test_the_active_queue_gives_back_what_is_more_than_its_share() -> None:
    order = filled(30)
    for page in evict(order, 28):
        order.returned(page)
    assert len(evict(order, 20)) == 20


@given(st.lists(st.tuples(st.sampled_from(["add", "evict"]), st.integers(0, 31)), max_size=300))
def test_no_page_is_lost_or_doubled(steps: list[tuple[str, int]]) -> None:
    order = Replacement(32)
    inside: set[int] = set()
    out: set[int] = set()
    for what, number in steps:
        if what == "add":
            if number in out:
                order.returned(number)
            else:
                order.added(number)
            inside.add(number)
            out.discard(number)
        else:
            victims = evict(order, number)
            assert len(set(victims)) == len(victims) == min(number, len(inside))
            assert set(victims) <= inside
            inside -= set(victims)
            out |= set(victims)
    assert sorted(evict(order, 64)) == sorted(inside)
