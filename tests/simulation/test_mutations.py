from __future__ import annotations

import pytest

from tests.simulation.mutations import MUTATIONS
from tests.simulation.run import run_seed

FOUND_BY = {
    "quarantine_off": 9,
    "epoch_checks_off": 8,
    "checksums_off": 101,
    "leases_off": 102,
    "stale_after_ack": 84,
    "predecessors_off": 46,
    "fills_over_present": 18,
    "relay_not_awaited": 18,
    "relays_side_by_side": 587,
    "copying_lent": 64,
    "attempts_forgotten": 180,
    "promotions_off": 9727,
    "dead_workers_heard": 201,
    "freeze_off": 17,
}
"""A seed that finds each; anew: `python -m tests.simulation --seeds 1-2000 --mutation NAME --first`."""


def test_every_mutation_is_found() -> None:
    assert FOUND_BY.keys() == MUTATIONS.keys()


@pytest.mark.parametrize("mutation", FOUND_BY)
def test_a_mutation_is_found(mutation: str) -> None:
    seed = FOUND_BY[mutation]
    assert run_seed(seed, mutation=mutation).violations
    assert not run_seed(seed).violations
