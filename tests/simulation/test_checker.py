from __future__ import annotations

from tests.simulation.checker import History, wrong_reads


def test_a_page_that_was_never_written_reads_version_0() -> None:
    history = History()
    history.read(1, 0, history.instant())
    assert list(wrong_reads(history)) == []


def test_a_read_after_an_acknowledged_write_returns_it() -> None:
    history = History()
    history.end_write(history.begin_write(1, 1))
    history.read(1, 1, history.instant())
    assert list(wrong_reads(history)) == []


def test_a_read_of_what_was_overwritten_before_it_is_wrong() -> None:
    history = History()
    history.end_write(history.begin_write(1, 1))
    history.end_write(history.begin_write(1, 2))
    history.read(1, 1, history.instant(), "the last read")
    assert list(wrong_reads(history)) == ["page 1: the last read returned version 1, but only 2 may be there"]


def test_zeros_after_an_acknowledged_write_are_wrong() -> None:
    history = History()
    history.end_write(history.begin_write(1, 1))
    history.read(1, 0, history.instant())
    assert len(list(wrong_reads(history))) == 1


def test_a_read_during_a_write_may_return_either() -> None:
    history = History()
    history.end_write(history.begin_write(1, 1))
    write = history.begin_write(1, 2)
    began = history.instant()
    history.read(1, 1, began)
    history.read(1, 2, began)
    history.end_write(write)
    assert list(wrong_reads(history)) == []


def test_a_read_that_began_before_a_write_ended_may_return_what_was_before() -> None:
    history = History()
    began = history.instant()
    history.end_write(history.begin_write(1, 1))
    history.read(1, 0, began)
    assert list(wrong_reads(history)) == []


def test_a_write_that_was_never_acknowledged_may_be_there_or_not() -> None:
    history = History()
    history.begin_write(1, 1)
    history.read(1, 0, history.instant())
    history.read(1, 1, history.instant())
    assert list(wrong_reads(history)) == []


def test_an_unacknowledged_write_is_gone_after_a_later_acknowledged_one() -> None:
    history = History()
    history.begin_write(1, 1)
    history.end_write(history.begin_write(1, 2))
    history.read(1, 1, history.instant())
    assert len(list(wrong_reads(history))) == 1


def test_content_that_was_never_written_to_the_page_is_wrong() -> None:
    history = History()
    history.begin_write(1, 1)
    history.read(1, None, history.instant())
    (problem,) = wrong_reads(history)
    assert "foreign content" in problem


def test_pages_are_registers_of_their_own() -> None:
    history = History()
    history.end_write(history.begin_write(1, 1))
    history.read(2, 0, history.instant())
    assert list(wrong_reads(history)) == []
