from __future__ import annotations

import pytest

from farpage.guest.reports import (
    CommandDone,
    Ended,
    Failed,
    Filled,
    PassDone,
    Progress,
    Report,
    Started,
    WrongWord,
    parse_report,
)

LINES: list[tuple[str, Report]] = [
    ("start fill_mib=300 rewrite_percent=25 passes=0 uptime_seconds=2.57", Started(300, 2.57)),
    ("fill pages=76800 seconds=2.253", Filled(76800, 2.253)),
    ("progress pass=3 pages=9600 wrong=0", Progress(3, 9600, 0)),
    (
        "pass=3 pages=76800 wrong=1 rewritten=19200 seconds=1.230 longest_stall_ms=0.41",
        PassDone(3, 76800, 1, 19200, 1.23, 0.41),
    ),
    ("wrong page=7 version=2 word=511 expected=00ff found=0000", WrongWord(7, 2, 511, "00ff", "0000")),
    ("command=2 status=137", CommandDone(2, 137)),
    ("failed cause=out_of_memory", Failed("out_of_memory")),
    ("end passes=3 wrong=0", Ended(0)),
]


@pytest.mark.parametrize(("text", "report"), LINES)
def test_a_report_is_parsed(text: str, report: Report) -> None:
    assert parse_report(f"farpage-guest {text}") == report


def test_a_report_is_found_after_other_output_on_its_line() -> None:
    assert parse_report("[    1.0] clocksource: farpage-guest end passes=0 wrong=0") == Ended(0)


@pytest.mark.parametrize(
    "line",
    [
        "",
        "login:",
        "farpage-guest ",
        "farpage-guest pass=3 pages=7",
        "farpage-guest pass=x",
        "farpage-guest what=1",
    ],
)
def test_anything_else_is_no_report(line: str) -> None:
    assert parse_report(line) is None
