"""The rules of recovery, state by state."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farpage.pager.recovery import Recovery, recover
from farpage.pager.states import (
    CLEAN,
    DIRTY,
    IN_MEMORY,
    ON_DEVICE,
    POISONED,
    READING,
    REWRITTEN,
    STATE_COUNT,
    WRITING,
    ZERO,
)


def recovered(*pages: tuple[int, bool]) -> Recovery:
    return recover(
        np.array([state for state, _ in pages], np.uint8),
        np.array([present for _, present in pages], np.bool_),
    )


@pytest.mark.parametrize(
    ("state", "present", "expected"),
    [
        (ZERO, False, ZERO),
        (ZERO, True, DIRTY),
        (CLEAN, False, ON_DEVICE),
        (CLEAN, True, CLEAN),
        (DIRTY, False, ZERO),
        (DIRTY, True, DIRTY),
        (WRITING, False, REWRITTEN),
        (WRITING, True, REWRITTEN),
        (REWRITTEN, False, REWRITTEN),
        (REWRITTEN, True, REWRITTEN),
        (READING, False, ON_DEVICE),
        (READING, True, DIRTY),
        (ON_DEVICE, False, ON_DEVICE),
        (ON_DEVICE, True, ON_DEVICE),
        (POISONED, False, POISONED),
        (POISONED, True, POISONED),
    ],
)
def test_each_state_has_its_rule(state: int, present: bool, expected: int) -> None:
    assert recovered((state, present)).states.tolist() == [expected]


def test_pages_are_sorted_into_what_has_to_be_done_with_them() -> None:
    found = recovered(
        (ON_DEVICE, True), (DIRTY, True), (WRITING, True), (CLEAN, True), (ON_DEVICE, False), (WRITING, False)
    )
    assert found.surplus.tolist() == [0]
    assert found.in_memory.tolist() == [1, 3]
    assert found.doubtful.tolist() == [2, 5]


@given(
    st.lists(
        st.tuples(st.integers(0, STATE_COUNT - 1), st.booleans(), st.booleans()), min_size=1, max_size=50
    )
)
def test_a_recovery_that_was_cut_short_is_done_again_with_the_same_outcome(
    pages: list[tuple[int, bool, bool]],
) -> None:
    states = np.array([state for state, _, _ in pages], np.uint8)
    present = np.array([held for _, held, _ in pages], np.bool_)
    reached: npt.NDArray[np.bool_] = np.array([done for _, _, done in pages], np.bool_)
    whole = recover(states, present)
    given_back = present.copy()
    given_back[whole.surplus] &= ~reached[whole.surplus]
    again = recover(np.where(reached, whole.states, states), given_back)
    assert again.states.tolist() == whole.states.tolist()
    assert again.in_memory.tolist() == whole.in_memory.tolist()
    assert again.doubtful.tolist() == whole.doubtful.tolist()


@given(st.lists(st.tuples(st.integers(0, STATE_COUNT - 1), st.booleans()), min_size=1, max_size=50))
def test_no_page_keeps_a_command_that_nobody_waits_for(pages: list[tuple[int, bool]]) -> None:
    found = recovered(*pages)
    assert not {WRITING, READING} & set(found.states.tolist())
    taken = {page for page, state in enumerate(found.states.tolist()) if state in IN_MEMORY}
    assert taken == {*found.in_memory.tolist(), *found.doubtful.tolist()}
