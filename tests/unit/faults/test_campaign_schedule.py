from __future__ import annotations

from collections import Counter
from itertools import islice, pairwise

import pytest

from tests.faults.campaign.schedule import EXCLUSIVE, HOLDS, Kind, may_join, steps

ALL = frozenset(Kind)


def test_a_seed_decides_every_step() -> None:
    first, again, other = (list(islice(steps(seed, ALL), 200)) for seed in (7, 7, 8))
    assert first == again
    assert first != other


def test_every_kind_that_a_set_allows_comes_soon_and_no_other() -> None:
    kinds = ALL - {Kind.LINK_CUT}
    drawn = Counter(step.fault.kind for step in islice(steps(1, kinds), 40))
    assert set(drawn) == kinds


def test_faults_come_alone_and_together_in_turns() -> None:
    turns = [step.alone for step in islice(steps(3, ALL - EXCLUSIVE), 200)]
    changes = sum(before != after for before, after in pairwise(turns))
    assert 200 / 8 - 1 <= changes <= 200 / 4
    assert turns[0]


def test_damage_comes_alone_always() -> None:
    damage = [step for step in islice(steps(5, ALL), 500) if step.fault.kind in EXCLUSIVE]
    assert damage
    assert all(step.alone for step in damage)


def test_holds_are_within_their_bounds() -> None:
    for step in islice(steps(2, ALL), 500):
        shortest, longest = HOLDS[step.fault.kind]
        assert shortest <= step.fault.hold_seconds <= longest


@pytest.mark.parametrize(
    ("occupies", "in_force", "may"),
    [
        (("vios1",), (), True),
        (("vios1",), (("vios2",), ("workers",)), True),
        (("vios1",), (("vios1",),), False),
        (("hypervisor", "workers"), (("workers",),), False),
        (("vios1",), (("vios2",), ("vios3",), ("workers",)), False),
    ],
)
def test_a_fault_joins_others_that_hit_something_else_up_to_three(
    occupies: tuple[str, ...], in_force: tuple[tuple[str, ...], ...], may: bool
) -> None:
    assert may_join(occupies, in_force) is may
