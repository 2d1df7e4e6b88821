from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farpage.volume.path import InvalidTransition, PathEvent, PathMachine
from farpage.volume.state import PathState

OVERDUE = (PathEvent.PROBED, PathEvent.ACTIVATED, PathEvent.OVERDUE)


def after(*events: PathEvent) -> PathMachine:
    machine = PathMachine(0.0)
    for second, event in enumerate(events, 1):
        machine.apply(event, float(second), f"reason {second}")
    return machine


def test_a_new_path_is_failed_until_it_is_probed() -> None:
    assert PathMachine(0.0).state is PathState.FAILED
    assert after(PathEvent.PROBED).state is PathState.STANDBY


def test_only_a_standby_path_can_be_activated() -> None:
    assert after(PathEvent.PROBED, PathEvent.ACTIVATED).state is PathState.ACTIVE
    with pytest.raises(InvalidTransition):
        after(PathEvent.ACTIVATED)


def test_an_overdue_path_is_suspect_and_an_answer_clears_it() -> None:
    suspect = after(*OVERDUE)
    assert suspect.state is PathState.SUSPECT
    assert suspect.reason == "reason 3"
    assert suspect.apply(PathEvent.ANSWERED, 4.0)
    assert after(*OVERDUE, PathEvent.ANSWERED).state is PathState.ACTIVE


def test_the_time_and_reason_of_a_state_are_those_of_its_beginning() -> None:
    machine = after(PathEvent.PROBED, PathEvent.ACTIVATED)
    machine.apply(PathEvent.ANSWERED, 9.0)
    assert machine.since_seconds == 2.0
    machine.apply(PathEvent.LOST, 10.0, "reset")
    assert (machine.since_seconds, machine.reason) == (10.0, "reset")


def test_only_losses_of_a_path_that_carried_commands_count() -> None:
    machine = after(PathEvent.PROBED, PathEvent.LOST, PathEvent.PROBED, PathEvent.ACTIVATED, PathEvent.LOST)
    assert machine.losses == 1


def test_a_path_that_was_left_on_purpose_is_failed_without_a_loss() -> None:
    machine = after(PathEvent.PROBED, PathEvent.ACTIVATED, PathEvent.LEFT, PathEvent.LEFT)
    assert (machine.state, machine.losses, machine.reason) == (PathState.FAILED, 0, "reason 4")


@given(st.lists(st.sampled_from(list(PathEvent))))
def test_every_sequence_of_events_is_taken_or_refused_without_a_change(events: list[PathEvent]) -> None:
    machine = PathMachine(0.0)
    for event in events:
        before = machine.state
        try:
            changed = machine.apply(event, 1.0, "why")
        except InvalidTransition:
            assert machine.state is before
        else:
            assert changed == (machine.state is not before)
            assert event is not PathEvent.LOST or machine.state is PathState.FAILED
