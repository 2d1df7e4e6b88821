"""What benchmarks write to a folder."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from bench._command import carry_out
from bench._published import BenchResult, Panel, Summary, as_markdown, check_options, publish
from bench._rounds import Spread
from farpage.errors import InvalidInput

SPREADS = {"farpage": Spread.of([3.0, 1.0, 2.0]), "swap": Spread.of([4.0, 4.0, 4.0])}
SUMMARY = Summary(
    "paging",
    "Paging",
    {"machine": "a small one"},
    [
        Panel("populate", "touches/s", SPREADS, {"farpage / swap": Spread.of([0.5])}),
        Panel("random", "us", {"farpage": SPREADS["farpage"]}, decimals=1),
    ],
)


def test_a_table_has_a_row_for_each_figure_and_says_where_it_was_measured() -> None:
    lines = as_markdown(SUMMARY).splitlines()
    assert "- machine: a small one" in lines
    assert "| populate, touches/s | 2 (1-3) | 4 (4-4) | 0.50 (0.50-0.50) |" in lines
    assert "| random, us | 2.0 (1.0-3.0) | - | - |" in lines


def test_a_folder_gets_the_table_the_document_and_the_plot(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    options = Namespace(json=False, out=tmp_path / "new")
    check_options(options)
    publish(SUMMARY, "text", "{}", options)
    assert capsys.readouterr().out == "text\n"
    assert sorted(path.name for path in options.out.iterdir()) == ["paging.json", "paging.md", "paging.png"]
    assert (options.out / "paging.png").read_bytes().startswith(b"\x89PNG")


def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInput):
        check_options(Namespace(json=False, out=tmp_path / "file"))


class Found(BenchResult):
    reached: bool

    @property
    def status(self) -> int:
        return 0 if self.reached else 1

    def as_text(self) -> str:
        return "what was found"

    def summary(self) -> Summary:
        return SUMMARY


@pytest.mark.parametrize("reached", [True, False])
def test_a_run_prints_what_was_found_and_ends_with_its_status(
    reached: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    async def run() -> Found:
        return Found(reached=reached)

    assert carry_out(Namespace(json=False, out=None), run) == (0 if reached else 1)
    assert capsys.readouterr().out == "what was found\n"
