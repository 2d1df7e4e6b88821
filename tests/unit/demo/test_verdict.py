from __future__ import annotations

from typing import Any

import pytest

from farpage.demo.scenario import Passes
from farpage.demo.verdict import Failover, Fault, FaultKind, find_problems, match_failovers
from farpage.hypervisor.model import FailoverInfo

LIMIT = 128 << 20


def failover(kind: FaultKind) -> Failover:
    return Failover(
        kind=kind,
        vios="vios1",
        detected_ms=5,
        longest_stall_ms=20,
        guest_longest_gap_ms=None,
        replayed_commands=0,
        quarantined_pages=0,
    )


def info(vios: str, detected_at: float, stall_ms: float = 20.0) -> FailoverInfo:
    return FailoverInfo(
        client="guest",
        from_vios=vios,
        to_vios="other",
        reason="reset",
        detected_at_seconds=detected_at,
        active_at_seconds=detected_at + 0.01,
        replayed_commands=3,
        quarantined_pages=4,
        longest_stall_ms=stall_ms,
    )


GOOD: dict[str, Any] = {
    "pages_verified": 100,
    "pages_wrong": 0,
    "resident_bytes_max": LIMIT,
    "limit_bytes": LIMIT,
    "passes": Passes(before=1, during=4, after=3),
    "failovers": [failover(FaultKind.SIGKILL), failover(FaultKind.SIGSTOP)],
}


def test_a_good_run_has_no_problems() -> None:
    assert list(find_problems(**GOOD)) == []


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"pages_wrong": 1}, "wrong"),
        ({"pages_verified": 0}, "verified nothing"),
        ({"passes": Passes(before=1, during=4, after=2)}, "2 full passes"),
        ({"passes": Passes(before=0, during=4, after=3)}, "first fault"),
        ({"resident_bytes_max": 0}, "never reached"),
        ({"resident_bytes_max": int(LIMIT * 1.05) + 1}, "above the limit"),
        ({"failovers": [failover(FaultKind.SIGKILL)]}, "SIGSTOP"),
        ({"failovers": [failover(FaultKind.SIGSTOP)]}, "SIGKILL"),
    ],
)
def test_anything_less_is_named(change: dict[str, Any], word: str) -> None:
    problems = list(find_problems(**{**GOOD, **change}))
    assert len(problems) == 1
    assert word in problems[0]


def test_five_percent_above_the_limit_is_allowed() -> None:
    assert list(find_problems(**{**GOOD, "resident_bytes_max": int(LIMIT * 1.05)})) == []


def test_a_fault_is_matched_with_the_failover_that_followed_it() -> None:
    faults = [
        Fault(kind=FaultKind.SIGKILL, vios="vios1", at_seconds=10.0),
        Fault(kind=FaultKind.SIGSTOP, vios="vios2", at_seconds=20.0),
    ]
    seen = [info("vios1", 5.0), info("vios2", 21.0, 1021.04), info("vios1", 10.0125), info("vios1", 30.0)]
    first, second = match_failovers(faults, seen, [3.21, None])
    assert (first.kind, first.detected_ms, first.guest_longest_gap_ms) == (FaultKind.SIGKILL, 12.5, 3.2)
    assert (second.kind, second.detected_ms, second.longest_stall_ms) == (FaultKind.SIGSTOP, 1000.0, 1021.0)
    assert (second.replayed_commands, second.quarantined_pages) == (3, 4)


def test_a_fault_without_a_failover_is_left_out() -> None:
    fault = Fault(kind=FaultKind.SIGKILL, vios="vios1", at_seconds=10.0)
    assert match_failovers([fault], [info("vios1", 9.0), info("vios2", 11.0)], [None]) == ()
