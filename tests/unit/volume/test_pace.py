"""A copy keeps to its bandwidth, and tells how fast it is."""

from __future__ import annotations

import pytest

from farpage.volume.pace import Pace


def test_bytes_leave_no_faster_than_the_bandwidth() -> None:
    pace = Pace(1000)
    now = left = 0.0
    while now < 10:
        if (delay := pace.delay(now)) > 0:
            now += delay
        else:
            pace.took(100, now)
            left += 100
    assert left == pytest.approx(10_000, rel=0.02)


def test_a_pause_saves_nothing_up() -> None:
    pace = Pace(1000)
    pace.took(100, 0.0)
    assert pace.delay(0.0) == pytest.approx(0.1)
    assert pace.delay(50.0) == 0
    pace.took(100, 50.0)
    assert pace.delay(50.0) == pytest.approx(0.1)


def test_the_rate_is_that_of_the_last_seconds() -> None:
    pace = Pace(1 << 30)
    assert pace.rate(1.0) == 0
    for tick in range(100):
        pace.copied(100, 1 + tick * 0.1)
    assert pace.rate(11.0) == pytest.approx(1000, rel=0.1)
    for tick in range(100):
        pace.copied(10, 11 + tick * 0.1)
    assert pace.rate(21.0) == pytest.approx(100, rel=0.1)
