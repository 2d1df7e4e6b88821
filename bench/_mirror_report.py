"""What `bench.mirror` found, as a document and as Markdown. No I/O."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, NamedTuple

from pydantic import BaseModel, ConfigDict

from bench._published import BenchResult, Panel, Summary
from bench._rounds import Spread, ratio

NONE: Final = "none"
MIRROR: Final = "mirror"
OUTS: Final = "page-outs a second"
INS: Final = "page-in p50"
IN_MEMORY: Final = "none, device in memory"
WITHOUT_CHECKSUMS: Final = "the same without checksums"


class Pair(NamedTuple):
    """Two contenders, and the share of the other's page-outs that the one has to reach."""

    what: str
    one: str
    other: str
    at_least: float


PAIRS: Final = {
    "mirror": Pair("`mirror` to `none`", MIRROR, NONE, 0.6),
    "checksums": Pair("with checksums to without", IN_MEMORY, WITHOUT_CHECKSUMS, 0.95),
}
"""What is compared, by what it tells the costs of."""


@dataclass
class Figures:
    """What one contender reached, one value a round."""

    page_outs_per_second: list[float] = field(default_factory=list)
    page_in_p50_us: list[float] = field(default_factory=list)


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ContenderResult(_Document):
    """One contender over the rounds."""

    contender: str
    page_outs_per_second: Spread
    page_in_p50_us: Spread


class Target(_Document):
    """A ratio, taken round by round, and what its median has to be."""

    what: str
    found: Spread | None
    at_least: float | None = None
    at_most: float | None = None

    @property
    def reached(self) -> bool:
        """Whether it is."""
        return (
            self.found is not None
            and (self.at_least is None or self.found.median >= self.at_least)
            and (self.at_most is None or self.found.median <= self.at_most)
        )

    def row(self) -> str:
        """Return it as a row of the table."""
        bound = f"at least {self.at_least}" if self.at_most is None else f"at most {self.at_most}"
        found = "none" if self.found is None else self.found.text(2)
        return f"| {self.what} | {found} | {bound} | {'reached' if self.reached else 'missed'} |"


class MirrorResult(BenchResult):
    """Everything that a run found."""

    machine: str
    placement: str
    disk: str
    rounds: int
    results: tuple[ContenderResult, ...]
    targets: tuple[Target, ...]

    @property
    def reached(self) -> bool:
        """Whether every target was."""
        return all(target.reached for target in self.targets)

    @property
    def status(self) -> int:
        """1 where a target was missed."""
        return 0 if self.reached else 1

    def as_text(self) -> str:
        """Return both tables."""
        lines = [f"{self.machine}; {self.placement}; {self.disk}; {self.rounds} rounds: median (range)", ""]
        lines += ["| | page-outs a second | page-in p50, us |", "| --- | --- | --- |"]
        lines += [
            f"| {one.contender} | {one.page_outs_per_second.text()} | {one.page_in_p50_us.text(1)} |"
            for one in self.results
        ]
        lines += ["", "| round by round | ratio | target | |", "| --- | --- | --- | --- |"]
        lines += [target.row() for target in self.targets]
        return "\n".join(lines)

    def summary(self) -> Summary:
        """Return what is published."""
        context = {"machine": self.machine, "placement": self.placement, "disk": self.disk}
        outs = {one.contender: one.page_outs_per_second for one in self.results}
        ins = {one.contender: one.page_in_p50_us for one in self.results}
        found = {target.what: target.found for target in self.targets}
        panels = (
            Panel("page-outs", "pages/s", outs, {what: one for what, one in found.items() if OUTS in what}),
            Panel("page-in, median", "us", ins, {what: one for what, one in found.items() if INS in what}, 1),
        )
        return Summary("mirror", "What mirrors and checksums cost", context, panels)


def results(figures: dict[str, Figures]) -> tuple[ContenderResult, ...]:
    """Sum up the rounds of each contender."""
    return tuple(
        ContenderResult(
            contender=name,
            page_outs_per_second=Spread.of(found.page_outs_per_second),
            page_in_p50_us=Spread.of(found.page_in_p50_us),
        )
        for name, found in figures.items()
    )


def targets(figures: dict[str, Figures]) -> tuple[Target, ...]:
    """Compare the contenders that took part with what is promised of them."""
    return tuple(target for pair in PAIRS.values() if pair.one in figures for target in _held(pair, figures))


def _held(pair: Pair, figures: dict[str, Figures]) -> tuple[Target, Target]:
    one, other = figures[pair.one], figures[pair.other]
    outs = ratio(one.page_outs_per_second, other.page_outs_per_second)
    ins = ratio(one.page_in_p50_us, other.page_in_p50_us)
    return (
        Target(what=f"{OUTS}, {pair.what}", found=outs, at_least=pair.at_least),
        Target(what=f"{INS}, {pair.what}", found=ins, at_most=1.05),
    )
