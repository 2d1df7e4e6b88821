"""When an event loop polls before it sleeps."""

from __future__ import annotations

from farpage.nbd.polling import LEAST_PAUSE_WAITS, LONGEST_PAUSE_WAITS, POLL_SECONDS, Polling

SHORT, LONG = POLL_SECONDS / 2, POLL_SECONDS * 2


def polling_after(*waits: float) -> Polling:
    polling = Polling()
    for seconds in waits:
        polling.slept(seconds)
    return polling


def waits_until_worthwhile(polling: Polling) -> int:
    waits = 0
    while not polling.worthwhile:
        polling.slept(SHORT)
        waits += 1
    return waits


def test_nothing_is_polled_before_anything_is_known() -> None:
    assert not Polling().worthwhile


def test_short_waits_are_polled_from_then_on() -> None:
    assert polling_after(SHORT).worthwhile
    assert not polling_after(LONG, LONG, LONG, SHORT).worthwhile


def test_who_waits_long_polls_no_more() -> None:
    assert not polling_after(SHORT, SHORT, LONG).worthwhile


def test_each_look_in_vain_doubles_the_pause_up_to_a_bound() -> None:
    polling = polling_after(SHORT)
    pauses = []
    for _ in range(12):
        polling.missed()
        assert not polling.worthwhile
        pauses.append(waits_until_worthwhile(polling))
    assert pauses[:3] == [LEAST_PAUSE_WAITS + 1, 2 * LEAST_PAUSE_WAITS + 1, 4 * LEAST_PAUSE_WAITS + 1]
    assert pauses[-1] == LONGEST_PAUSE_WAITS + 1


def test_what_is_found_by_looking_shortens_the_next_pause() -> None:
    polling = polling_after(SHORT)
    polling.missed()
    waits_until_worthwhile(polling)
    for _ in range(LEAST_PAUSE_WAITS):
        polling.found()
    polling.missed()
    assert waits_until_worthwhile(polling) == LEAST_PAUSE_WAITS + 1
