from __future__ import annotations

from dataclasses import replace

import pytest

from farpage.demo.scenario import Action, Observation, Passes, Scenario, Stage
from farpage.volume.state import PathState

LIMIT = 1000
BOTH = {"vios1": PathState.ACTIVE, "vios2": PathState.STANDBY}
AFTER_KILL = {"vios1": PathState.FAILED, "vios2": PathState.ACTIVE}
BACK = {"vios1": PathState.STANDBY, "vios2": PathState.ACTIVE}
AFTER_HANG = {"vios1": PathState.ACTIVE, "vios2": PathState.FAILED}


def observation(passes: int, paths: dict[str, PathState] | None = None, resident: int = LIMIT) -> Observation:
    return Observation(
        filled=True, passes=passes, resident_bytes=resident, paths=BOTH if paths is None else paths
    )


def play(scenario: Scenario, *observations: Observation) -> list[Action | None]:
    return [scenario.next_action(seen) for seen in observations]


def test_the_whole_script() -> None:
    scenario = Scenario(LIMIT)
    script = [
        (replace(observation(0), filled=False), None),
        (observation(0, {}, 5000), None),
        (observation(1, {}, 5000), Action.LIMIT),
        (observation(1, BOTH, 5000), None),
        (observation(2), None),
        (observation(3), None),
        (observation(4), Action.KILL),
        (observation(5, AFTER_KILL), None),
        (observation(6, AFTER_KILL), Action.RESTART),
        (observation(7, AFTER_KILL), None),
        (observation(7, BACK), None),
        (observation(8, BACK), None),
        (observation(9, BACK), Action.HANG),
        (observation(11, BACK), None),
        (observation(11, AFTER_HANG), Action.CONTINUE),
        (observation(14, AFTER_HANG), None),
        (observation(15, AFTER_HANG), Action.FINISH),
    ]
    for step, (seen, expected) in enumerate(script):
        assert scenario.next_action(seen) is expected, f"step {step}"
    assert (scenario.killed, scenario.hung) == ("vios1", "vios2")
    assert scenario.stage is Stage.DONE
    assert scenario.passes(15) == Passes(before=1, during=7, after=3)


def test_no_fault_comes_while_no_path_could_take_over() -> None:
    scenario = Scenario(LIMIT)
    alone = {"vios1": PathState.ACTIVE, "vios2": PathState.FAILED}
    actions = play(scenario, observation(1, alone), observation(1, alone), observation(9, alone))
    assert actions == [Action.LIMIT, None, None]
    assert scenario.next_action(observation(9)) is Action.KILL


def test_the_pass_that_a_fault_falls_into_is_no_full_pass() -> None:
    scenario = Scenario(LIMIT)
    play(scenario, observation(1), observation(1), observation(3))
    assert scenario.stage is Stage.KILLED
    assert scenario.next_action(observation(4, AFTER_KILL)) is None
    assert scenario.next_action(observation(5, AFTER_KILL)) is Action.RESTART


def test_nothing_is_killed_before_the_limit_is_reached() -> None:
    scenario = Scenario(LIMIT)
    assert play(scenario, observation(1, resident=5000), observation(8, resident=1001)) == [
        Action.LIMIT,
        None,
    ]
    assert scenario.stage is Stage.SHRINKING


@pytest.mark.parametrize("completed", [0, 1, 5])
def test_passes_before_the_limit_are_not_counted(completed: int) -> None:
    assert Scenario(LIMIT).passes(completed) == Passes(before=0, during=0, after=0)
