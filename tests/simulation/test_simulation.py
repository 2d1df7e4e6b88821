from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulation.run import run_seed

ROOT = Path(__file__).parents[2]
SEEDS = 2000
PROCESSES = 2


def simulate(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """Run seeds in a process of their own."""
    return subprocess.Popen(
        [sys.executable, "-m", "tests.simulation", *arguments],
        cwd=ROOT,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.timeout(900)
def test_no_seed_violates_anything() -> None:
    share = SEEDS // PROCESSES
    runs = [simulate("--seeds", f"{first}-{first + share - 1}") for first in range(1, SEEDS, share)]
    results = [(run.communicate()[0], run.returncode) for run in runs]
    assert all(status == 0 for _, status in results), "\n".join(output for output, _ in results)


@pytest.mark.parametrize(
    "seed",
    [
        pytest.param(1899, id="a-change-of-which-there-is-no-note"),
        pytest.param(3090, id="a-repair-of-a-killed-pager-and-a-page-out-of-the-next-one"),
        pytest.param(3134, id="room-left-by-a-lost-page"),
        pytest.param(20969, id="room-taken-by-a-fault-that-was-answered-at-the-second-try"),
        pytest.param(21478, id="a-change-back-while-one-that-nobody-acknowledged-may-be-stored"),
        pytest.param(40302, id="a-replica-undone-while-a-worker-was-recovered"),
        pytest.param(52756, id="a-page-taken-by-a-balloon-while-it-was-mapped"),
        pytest.param(53748, id="a-page-table-that-comes-late-from-a-release-that-was-given-up"),
        pytest.param(54731, id="a-worker-killed-before-a-lost-replica-was-recorded-as-stale"),
        pytest.param(56392, id="an-owner-who-came-too-late-is-told-so"),
    ],
)
def test_a_seed_that_once_found_a_fault_finds_none(seed: int) -> None:
    assert not run_seed(seed).violations


def test_a_client_whose_owners_have_cut_each_other_off_is_claimed_anew() -> None:
    lines: list[str] = []
    outcome = run_seed(724, trace=lines.append)
    assert any("is claimed anew" in line for line in lines)
    assert not outcome.violations


def test_a_seed_replays_exactly() -> None:
    assert run_seed(7).digest == run_seed(7).digest


def test_a_seed_replays_exactly_in_another_process_with_another_order_of_hashes() -> None:
    runs = [simulate("--seeds", "1-10", "--digests", PYTHONHASHSEED=hash_seed) for hash_seed in ("1", "2")]
    outputs = [run.communicate()[0].splitlines()[:10] for run in runs]
    assert outputs[0] == outputs[1]
    assert len(set(outputs[0])) == 10


def test_a_trace_says_what_went_wrong_when() -> None:
    lines: list[str] = []
    outcome = run_seed(2, trace=lines.append)
    assert outcome.faults
    assert all(any(f"fault: {fault}" in line for line in lines) for fault in outcome.faults)
