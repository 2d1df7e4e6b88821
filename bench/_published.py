"""What a benchmark hands over: text or JSON on the terminal, with `--out` a table, JSON and a plot too."""

from __future__ import annotations

import argparse
import importlib
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from pydantic import BaseModel, ConfigDict

from bench._rounds import Spread
from farpage.errors import InvalidInput, Unsupported

PANELS_IN_A_ROW: Final = 3


@dataclass(frozen=True)
class Panel:
    """One table and one chart: a figure of every contender, and ratios between them."""

    title: str
    unit: str
    figures: Mapping[str, Spread]
    ratios: Mapping[str, Spread | None] = field(default_factory=dict)
    """By what is divided by what, as `farpage / swap-3`."""
    decimals: int = 0


@dataclass(frozen=True)
class Summary:
    """A benchmark's outcome; `context` says on which machine it was measured, and how."""

    name: str
    title: str
    context: Mapping[str, str]
    panels: Sequence[Panel]


class BenchResult(BaseModel):
    """What a benchmark found."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    @property
    def status(self) -> int:
        """The exit status."""
        return 0

    @abstractmethod
    def as_text(self) -> str:
        """Return the report for a terminal."""

    @abstractmethod
    def summary(self) -> Summary:
        """Return what is published."""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add `--json` and `--out`, which every benchmark has."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    add_out(parser)


def add_out(parser: argparse.ArgumentParser) -> None:
    """Add `--out` alone."""
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write NAME.md, NAME.json and NAME.png to this folder"
    )


def check_options(options: argparse.Namespace) -> None:
    """Refuse a folder that cannot be written to before anything is measured.

    :raise InvalidInput:
    :raise Unsupported: matplotlib is missing.
    """
    if options.out is None:
        return
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInput("--out", error.strerror or str(error), "name a folder of yours") from error
    _pyplot()


def publish(summary: Summary, text: str, document: str, options: argparse.Namespace) -> None:
    """Print what was asked for; write the table, the document and the plot where a folder is named."""
    print(document if options.json else text)
    folder = options.out
    if folder is not None:
        (folder / f"{summary.name}.md").write_text(as_markdown(summary))
        (folder / f"{summary.name}.json").write_text(document + "\n")
        plot(summary, folder / f"{summary.name}.png")


def as_markdown(summary: Summary) -> str:
    """Return the tables: a row a contender, a column a panel, then a row a ratio."""
    lines = [f"# {summary.title}", "", *(f"- {name}: {text}" for name, text in summary.context.items()), ""]
    names = list(dict.fromkeys(name for panel in summary.panels for name in panel.figures))
    ratios = list(dict.fromkeys(name for panel in summary.panels for name in panel.ratios))
    lines.append("| median (lowest-highest) | " + " | ".join(names + ratios) + " |")
    lines.append("| --- |" + " ---: |" * (len(names) + len(ratios)))
    for panel in summary.panels:
        cells = [_text(panel.figures.get(name), panel.decimals) for name in names]
        cells += [_text(panel.ratios.get(name), 2) for name in ratios]
        lines.append(f"| {panel.title}, {panel.unit} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _text(spread: Spread | None, decimals: int) -> str:
    return "-" if spread is None else spread.text(decimals)


def plot(summary: Summary, path: Path) -> None:
    """Draw a chart for each panel: bars for the medians, whiskers for the ranges.

    :raise Unsupported: matplotlib is missing.
    """
    pyplot = _pyplot()
    columns = min(len(summary.panels), PANELS_IN_A_ROW)
    rows = -(-len(summary.panels) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(4.6 * columns, 2.8 * rows + 0.6), squeeze=False)
    for axis in axes.flat[len(summary.panels) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes.flat, summary.panels, strict=False):
        spreads = list(panel.figures.values())
        medians = [spread.median for spread in spreads]
        below = [spread.median - spread.lowest for spread in spreads]
        above = [spread.highest - spread.median for spread in spreads]
        colours = [f"C{index}" for index in range(len(spreads))]
        axis.bar(list(panel.figures), medians, yerr=(below, above), color=colours, capsize=4)
        axis.set_title(panel.title, fontsize=10)
        axis.set_ylabel(panel.unit)
        axis.tick_params(axis="x", labelsize=8, labelrotation=20 if len(spreads) > 3 else 0)
        axis.set_ylim(bottom=0)
    figure.suptitle(summary.title, fontsize=11)
    figure.text(0.01, 0.005, summary.context.get("machine", ""), fontsize=7)
    figure.tight_layout(rect=(0, 0.02, 1, 1))
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def _pyplot() -> Any:
    try:
        importlib.import_module("matplotlib").use("Agg")
        return importlib.import_module("matplotlib.pyplot")
    except ImportError as error:
        remedy = "run \"pip install 'farpage[bench]'\", or leave --out away"
        raise Unsupported("the plot", str(error), remedy) from error
