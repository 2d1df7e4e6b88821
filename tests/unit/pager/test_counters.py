from __future__ import annotations

import pytest

from farpage.pager.counters import LATENCY_BUCKETS, Counters


@pytest.mark.parametrize(
    ("seconds", "bucket"), [(0.0, 0), (0.5e-6, 0), (3e-6, 2), (1e-3, 10), (3600.0, LATENCY_BUCKETS - 1)]
)
def test_a_wait_falls_into_the_bucket_of_its_power_of_two(seconds: float, bucket: int) -> None:
    counters = Counters()
    counters.waited(seconds)
    assert counters.wait_buckets.index(1) == bucket


def test_long_waits_are_counted_as_stalls_and_the_longest_is_kept() -> None:
    counters = Counters()
    for seconds in (0.01, 0.25, 0.2):
        counters.waited(seconds)
    assert counters.stalls_over_100ms == 2
    assert counters.longest_stall_ms == 250.0
