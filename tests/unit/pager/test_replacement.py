from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farpage.pager.replacement import PythonReplacement, Replacement, new_replacement

Make: TypeAlias = Callable[[int], Replacement]


def compiled(pages: int) -> Replacement:
    order = new_replacement(pages)
    if isinstance(order, PythonReplacement):
        pytest.skip("it was not compiled here")
    return order


@pytest.fixture(params=[PythonReplacement, compiled])
def make(request: pytest.FixtureRequest) -> Make:
    found: Make = request.param
    return found


def filled(make: Make, pages: int) -> Replacement:
    order = make(pages * 4)
    for page in range(pages):
        order.added(page)
    return order


def evict(order: Replacement, count: int) -> list[int]:
    victims = order.victims(count)
    for page in victims:
        order.evicted(page)
    return victims


def test_pages_leave_in_the_order_in_which_they_came(make: Make) -> None:
    assert evict(filled(make, 10), 4) == [0, 1, 2, 3]


def test_a_page_is_a_victim_once(make: Make) -> None:
    order = filled(make, 10)
    order.added(3)
    order.returned(3)
    assert sorted(evict(order, 100)) == list(range(10))
    assert evict(order, 100) == []


def test_a_page_that_comes_back_soon_outlives_those_that_came_before_it(make: Make) -> None:
    order = filled(make, 30)
    assert evict(order, 1) == [0]
    order.returned(0)
    assert 0 not in evict(order, 29)
    assert evict(order, 1) == [0]


def test_a_page_that_comes_back_late_gets_no_second_chance(make: Make) -> None:
    order = filled(make, 100)
    first = evict(order, 90)
    order.returned(first[0])
    assert evict(order, 11) == [*range(90, 100), 0]


def test_the_active_queue_gives_back_what_is_more_than_its_share(make: Make) -> None:
    order = filled(make, 30)
    for page in evict(order, 28):
        order.returned(page)
    assert len(evict(order, 20)) == 20


@pytest.mark.parametrize(
    "run", [(-1, 1), (-(1 << 40), 1), (8, 1), (0, 9), (7, 2), (5, -1), (1 << 62, 1 << 62)]
)
@pytest.mark.parametrize("method", ["added", "returned", "evicted"])
def test_pages_that_are_not_the_clients_are_refused(make: Make, method: str, run: tuple[int, int]) -> None:
    order = make(8)
    order.added(0, 8)
    with pytest.raises(IndexError, match=f"{run[1]} pages from {run[0]} on are not within 8"):
        getattr(order, method)(*run)
    assert order.victims(9) == list(range(8))


@pytest.mark.parametrize("method", ["added", "returned", "evicted"])
def test_an_order_of_nothing_takes_nothing(make: Make, method: str) -> None:
    """As that is of a client that is gone."""
    order = make(0)
    with pytest.raises(IndexError):
        getattr(order, method)(0)
    getattr(order, method)(0, 0)
    assert (len(order), order.victims(1)) == (0, [])


@pytest.mark.parametrize("pages", [-1, (1 << 32) + 1])
def test_an_order_has_four_bytes_for_a_page(make: Make, pages: int) -> None:
    with pytest.raises(ValueError, match="an order of"):
        make(pages)


def test_less_than_no_victims_are_none(make: Make) -> None:
    order = filled(make, 30)
    for page in evict(order, 15):
        order.returned(page)
    assert order.victims(-1) == []
    assert evict(order, 16) == [*range(15, 30), 0]


def test_a_compiled_order_is_made_once() -> None:
    order = compiled(32)
    order.added(0, 32)
    order.__init__(1)  # type: ignore[misc]
    assert order.victims(32) == list(range(32))
    with pytest.raises(TypeError):
        type(order).__new__(type(order))


@given(
    make=st.sampled_from([PythonReplacement, new_replacement]),
    steps=st.lists(st.tuples(st.sampled_from(["add", "evict"]), st.integers(0, 31)), max_size=300),
)
def test_no_page_is_lost_or_doubled(make: Make, steps: list[tuple[str, int]]) -> None:
    order = make(32)
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


Steps = st.lists(
    st.tuples(st.sampled_from(["added", "returned", "evict"]), st.integers(0, 63), st.integers(1, 8)),
    max_size=300,
)


@given(Steps)
def test_both_orders_choose_the_same_victims(steps: list[tuple[str, int, int]]) -> None:
    orders = [PythonReplacement(72), new_replacement(72)]
    for what, page, count in steps:
        if what == "evict":
            first, second = (order.victims(count) for order in orders)
            assert first == second
            for order in orders:
                for victim in first:
                    order.evicted(victim)
        else:
            for order in orders:
                getattr(order, what)(page, count)
        assert len({len(order) for order in orders}) == 1
