from __future__ import annotations

from farpage.embedded.backoff import RestartBackoff


def test_pauses_double_up_to_the_longest() -> None:
    backoff = RestartBackoff(first_seconds=1, longest_seconds=5, settled_seconds=30)
    assert [backoff.pause_after(0.1) for _ in range(5)] == [1, 2, 4, 5, 5]


def test_a_long_life_begins_anew() -> None:
    backoff = RestartBackoff(first_seconds=1, longest_seconds=5, settled_seconds=30)
    assert [backoff.pause_after(0.1), backoff.pause_after(0.1), backoff.pause_after(31)] == [1, 2, 1]
    assert backoff.pause_after(0.1) == 2
