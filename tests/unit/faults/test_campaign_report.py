from __future__ import annotations

import pytest

from tests.faults.campaign.busy import Stall, WrongPage
from tests.faults.campaign.report import (
    Injected,
    Outcome,
    describe,
    longest_stall,
    longest_together,
    longest_without,
    percentile,
    restart_to_served,
    stalls_by_kind,
)
from tests.faults.campaign.schedule import Kind


def fault(kind: Kind, begin: float, end: float, *, alone: bool = True) -> Injected:
    return Injected(kind, "it", alone, 0.5, begin, end)


def stall(begin: float, end: float) -> Stall:
    return Stall("alpha", begin, end)


def test_percentiles_are_values_that_were_seen() -> None:
    values = [float(number) for number in range(1, 101)]
    assert (percentile(values, 0.5), percentile(values, 0.99), percentile(values, 1.0)) == (50, 99, 100)
    assert percentile([7.0], 0.99) == 7
    assert percentile([], 0.99) == 0


def test_a_stall_belongs_to_the_fault_that_was_in_force() -> None:
    killed, stopped = fault(Kind.VIOS_KILL, 10, 12), fault(Kind.VIOS_STOP, 14, 18)
    stalls = [stall(9.5, 10.25), stall(11, 11.5), stall(12.5, 13), stall(14.5, 15.5)]
    assert longest_stall(killed, stalls) == pytest.approx(0.75)
    assert longest_stall(stopped, stalls) == pytest.approx(1.0)
    assert longest_without([killed, stopped], stalls) == pytest.approx(0.5)


def test_kinds_are_summed_up_over_the_faults_that_came_alone_and_were_felt() -> None:
    faults = [
        fault(Kind.VIOS_STOP, 30, 32),
        fault(Kind.VIOS_KILL, 0, 2),
        fault(Kind.VIOS_KILL, 10, 12),
        fault(Kind.VIOS_KILL, 20, 22),
        fault(Kind.VIOS_KILL, 40, 42, alone=False),
    ]
    stalls = [stall(0.5, 0.625), stall(10.5, 10.75), stall(40.5, 41.5)]
    killed, stopped = stalls_by_kind(faults, stalls)
    assert (killed.kind, killed.injected, killed.alone, killed.felt_ms) == (Kind.VIOS_KILL, 4, 3, (125, 250))
    assert (killed.p50_ms, killed.p99_ms, killed.longest_ms) == (125, 250, 250)
    assert (stopped.kind, stopped.felt_ms, stopped.longest_ms) == (Kind.VIOS_STOP, (), 0)
    assert longest_together(faults, stalls) == 1.0


def test_a_restart_is_timed_until_the_first_access_that_waited_for_it_is_served() -> None:
    killed = fault(Kind.HOST_KILL, 0, 5)
    killed.restarted_seconds = 1.0
    stalls = [stall(0.5, 0.75), stall(0.5, 1.5), stall(0.25, 1.25), stall(1.125, 4)]
    assert restart_to_served([killed], stalls) == [0.25]


def test_an_outcome_fails_by_wrong_pages_hangs_and_leaks_and_says_so() -> None:
    assert not Outcome(1).failed
    for outcome in (
        Outcome(1, wrong=[WrongPage("alpha", "0 17 old 3 0 5a")]),
        Outcome(1, hangs=["an access waits"]),
        Outcome(1, leaks=["process 1"]),
    ):
        assert outcome.failed
    text = describe(Outcome(1, wrong=[WrongPage("alpha", "0 17 old 3 0 5a")]))
    assert "wrong pages: 1\n  - alpha: 0 17 old 3 0 5a\n- hangs: 0" in text


def test_each_bound_is_held_against_the_stalls_of_its_kind() -> None:
    faults = [fault(Kind.VIOS_KILL, 0, 2), fault(Kind.VIOS_STOP, 10, 12), fault(Kind.WORKER_KILL, 20, 22)]
    stalls = [stall(0.5, 0.625), stall(10.5, 11.5), stall(30, 31)]
    text = describe(Outcome(40, path_timeout_seconds=1.0, faults=faults, stalls=stalls))
    assert "| `vios_kill` | 1 | 1 | 1 | 125 | 125 | 125 | 500 | p99 at most 100 | missed |" in text
    assert "| `vios_stop` | 1 | 1 | 1 | 1000 | 1000 | 1000 | 500 | max at most 1100 | reached |" in text
    assert "| `worker_kill` | 1 | 1 | 0 | 0 | 0 | 0 | 500 | max at most 1500 | not felt |" in text
