"""How a copy gives way to the client."""

from __future__ import annotations

from farpage.intermediary.window import QUIET_SECONDS, STEPS, Window


def test_a_copy_that_is_alone_is_at_full_size_from_its_start() -> None:
    assert Window().allowance(0.0, 0) == STEPS[-1]


def test_one_command_of_the_client_makes_it_as_small_as_can_be() -> None:
    window = Window()
    assert window.allowance(0.0, 1) == STEPS[0]


def test_it_grows_step_by_step_while_the_client_is_quiet() -> None:
    window = Window()
    now = 0.0
    window.allowance(now, 1)
    for step in STEPS:
        assert window.allowance(now, 1) == step
        now += QUIET_SECONDS * 1.01
    assert window.allowance(now, 2) == STEPS[0]


def test_it_stays_small_while_the_client_goes_on() -> None:
    window = Window()
    for number in range(100):
        assert window.allowance(number * QUIET_SECONDS / 2, number + 1) == STEPS[0]


def test_it_can_be_told_of_the_client() -> None:
    window = Window()
    window.disturbed(2.0)
    assert window.allowance(1.0, 0) == window.allowance(2.0, 0) == STEPS[0]
    assert window.allowance(2.0 + QUIET_SECONDS * 1.01, 0) == STEPS[1]
