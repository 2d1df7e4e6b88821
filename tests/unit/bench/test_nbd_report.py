"""What `bench.nbd` is asked to measure, and what it says of it."""

from __future__ import annotations

from bench._nbd_cases import CHOSEN, Case
from bench._nbd_contenders import RAW
from bench._nbd_report import NbdResult, case_result
from bench.nbd import parse_arguments


def test_options_that_choose_work_combine() -> None:
    settings, _ = parse_arguments(["--work", "write", "--depth", "1", "--depth", "16"])
    assert settings.cases == (Case(work="write", depth=1), Case(work="write", depth=16))
    assert parse_arguments([])[0].cases == CHOSEN
    assert (parse_arguments([])[0].client, parse_arguments(["--client", "load"])[0].client) == ("fio", "load")


def test_a_table_has_a_line_for_each_contender_and_says_what_farpage_is() -> None:
    measured = {"farpage": [30.0, 20.0], "nbdkit": [20.0, 10.0], RAW: [40.0, 40.0]}
    result = NbdResult(
        machine="m",
        placement="p",
        disk="d",
        rounds=2,
        seconds=1,
        size_bytes=1 << 20,
        missing=(),
        cases=(case_result(Case(storage="direct"), measured),),
    )
    lines = result.as_markdown().splitlines()
    assert lines[-2] == "|  | nbdkit | 15 (10-20) | 1.75 (1.50-2.00)x |"
    assert "target 0.9: missed" in result.as_text()
    assert "commands a second with fio" in result.as_text()
    (figures,) = (found for found in result.cases[0].figures if found.contender == "nbdkit")
    assert figures.target is None  # it cannot serve with O_DIRECT
