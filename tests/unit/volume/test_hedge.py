"""How fast a replica is, and how many reads may be repeated."""

from __future__ import annotations

import math

from farpage.volume.hedge import ENOUGH_SAMPLES, EXTRA_READS, MOST_SAVED, HedgeBudget, Latency


def test_nothing_is_late_before_enough_was_seen() -> None:
    latency = Latency()
    for _ in range(ENOUGH_SAMPLES - 1):
        latency.answered(1e-4)
    assert latency.p99_seconds() == math.inf
    latency.answered(1e-4)
    assert 1e-4 <= latency.p99_seconds() < 1.5e-4


def test_one_answer_in_a_hundred_may_be_later_than_the_p99() -> None:
    latency = Latency()
    for number in range(1000):
        latency.answered(0.5 if number % 200 == 0 else 1e-4)
    assert latency.p99_seconds() < 1.5e-4
    for _ in range(20):
        latency.answered(0.5)
    assert latency.p99_seconds() >= 0.5


def test_newer_answers_count_more_than_older_ones() -> None:
    latency = Latency()
    for _ in range(20_000):
        latency.answered(0.1)
    for _ in range(20_000):
        latency.answered(1e-4)
    assert latency.p99_seconds() < 0.01 or latency.mean_seconds < 2e-4
    assert latency.mean_seconds < 2e-4


def test_a_replica_that_waits_counts_as_slow_at_once_and_is_forgiven_slowly() -> None:
    latency = Latency()
    latency.answered(1e-4)
    latency.waited(0.3)
    assert latency.mean_seconds == 0.3
    latency.rested(0.5)
    assert latency.mean_seconds == 0.15


def test_of_all_reads_no_more_than_the_share_are_repeated() -> None:
    budget = HedgeBudget()
    repeated = 0
    for _ in range(10_000):
        budget.read()
        repeated += budget.spend()
    assert 0 < repeated <= 10_000 * EXTRA_READS


def test_a_quiet_time_saves_up_only_so_many() -> None:
    budget = HedgeBudget()
    for _ in range(100_000):
        budget.read()
    assert sum(budget.spend() for _ in range(1000)) == MOST_SAVED
