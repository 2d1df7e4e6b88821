"""Figures of several rounds."""

from __future__ import annotations

from bench._rounds import Spread, ratio, turns


def test_a_ratio_compares_within_rounds_so_that_a_slow_round_of_both_does_not_show() -> None:
    assert ratio([10, 1, 20], [5, 0.5, 10]) == Spread(median=2, lowest=2, highest=2)


def test_there_is_no_ratio_to_nothing() -> None:
    assert ratio([1.0, 2.0], [1.0, 0.0]) is None


def test_every_contender_begins_a_round_in_turn() -> None:
    assert [turns(["a", "b", "c"], number)[0] for number in range(4)] == ["a", "b", "c", "a"]
    assert turns(["a", "b", "c"], 1) == ["b", "c", "a"]


def test_a_spread_prints_its_median_and_range() -> None:
    assert Spread.of([3, 1, 2]).text(1) == "2.0 (1.0-3.0)"
