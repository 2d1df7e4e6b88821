"""What `bench.move` found, as a document and as text. No I/O."""

from __future__ import annotations

import enum
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from pydantic import BaseModel, ConfigDict

from bench._published import BenchResult, Panel, Summary
from bench._rounds import Spread, ratio
from bench._toucher import Waits

MOST_P99: Final = 3.0
MOST_STALL_MS: Final = 250.0
MOST_SWITCH_MS: Final = 50.0


class Period(enum.StrEnum):
    """Where a round is."""

    BEFORE = "before"
    DURING = "during"
    AFTER = "after"


@dataclass(frozen=True)
class Span:
    """From one moment to another, by CLOCK_MONOTONIC."""

    begin_ns: int
    end_ns: int


@dataclass(frozen=True)
class Figures:
    """Of the page-ins that ended within a span; times are how long the client waited."""

    per_second: float
    p50_us: float
    p99_us: float
    longest_ms: float


def figures(waits: Waits, span: Span) -> Figures:
    """Summarize; at least one page-in has ended in that time."""
    took = waits[(waits[:, 0] >= span.begin_ns) & (waits[:, 0] < span.end_ns), 1]
    p50, p99 = np.percentile(took, (50, 99))
    seconds = (span.end_ns - span.begin_ns) / 1e9
    return Figures(len(took) / seconds, p50 / 1e3, p99 / 1e3, float(took.max()) / 1e6)


def longest_ms(waits: Waits, span: Span) -> float:
    """Return the longest wait of those that were going on at any moment of a span."""
    ends, took = waits[:, 0].astype(np.int64), waits[:, 1].astype(np.int64)
    within = took[(ends >= span.begin_ns) & (ends - took < span.end_ns)]
    return float(within.max(initial=0)) / 1e6


@dataclass(frozen=True)
class Round:
    """One move under one load."""

    periods: Mapping[Period, Figures]
    going_over_ms: float
    """Longest wait around the moment at which the client's worker goes over to the target's VIOS."""
    switch_over_ms: float
    """The same of the moment at which the target has everything and the relay is dropped."""
    move_seconds: float


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PeriodResult(_Document):
    """One period under one load, over the rounds."""

    per_second: Spread
    p50_us: Spread
    p99_us: Spread
    longest_ms: Spread

    @classmethod
    def of(cls, found: Sequence[Figures]) -> PeriodResult:
        """Summarize one period of every round."""
        return cls(
            per_second=Spread.of([one.per_second for one in found]),
            p50_us=Spread.of([one.p50_us for one in found]),
            p99_us=Spread.of([one.p99_us for one in found]),
            longest_ms=Spread.of([one.longest_ms for one in found]),
        )


class LoadResult(_Document):
    """Moves under one load."""

    load: str
    periods: dict[Period, PeriodResult]
    p99_ratio: Spread
    """Of the time during a move to the time before it, round by round."""
    going_over_ms: Spread
    switch_over_ms: Spread
    move_seconds: Spread

    @classmethod
    def of(cls, load: str, rounds: Sequence[Round]) -> LoadResult:
        """Summarize at least one round."""
        p99 = {period: [one.periods[period].p99_us for one in rounds] for period in Period}
        compared = ratio(p99[Period.DURING], p99[Period.BEFORE])
        assert compared is not None
        return cls(
            load=load,
            periods={period: PeriodResult.of([one.periods[period] for one in rounds]) for period in Period},
            p99_ratio=compared,
            going_over_ms=Spread.of([one.going_over_ms for one in rounds]),
            switch_over_ms=Spread.of([one.switch_over_ms for one in rounds]),
            move_seconds=Spread.of([one.move_seconds for one in rounds]),
        )

    @property
    def reached(self) -> bool:
        """Whether every target was: of the longest stall by every round, of the others by the median."""
        stalls = max(self.going_over_ms.median, self.switch_over_ms.median)
        return (
            self.p99_ratio.median <= MOST_P99
            and self.periods[Period.DURING].longest_ms.highest <= MOST_STALL_MS
            and stalls <= MOST_SWITCH_MS
        )


class MovingResult(BenchResult):
    """Everything that a run found."""

    machine: str
    disk: str
    placement: str
    memory_bytes: int
    limit_bytes: int
    threads: int
    rounds: int
    loads: tuple[LoadResult, ...]

    @property
    def reached(self) -> bool:
        """Whether every target was, under every load."""
        return all(load.reached for load in self.loads)

    @property
    def status(self) -> int:
        """1 where a target was missed."""
        return 0 if self.reached else 1

    def as_text(self) -> str:
        """Return two tables in Markdown."""
        lines = [
            f"{self.machine}; {self.disk}; {self.placement}; {self.memory_bytes >> 20} MiB paged to "
            f"{self.limit_bytes >> 20} MiB, {self.threads} threads, {self.rounds} rounds; median (range)",
            "",
            "| load | the move | page-ins/s | p50, us | p99, us | longest, ms |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        for load in self.loads:
            lines += [
                f"| {load.load} | {period} | {found.per_second.text()} | {found.p50_us.text()} | "
                f"{found.p99_us.text()} | {found.longest_ms.text(1)} |"
                for period, found in load.periods.items()
            ]
        lines += [
            "",
            "| load | p99 to before | longest stall, ms | going over, ms | switch-over, ms | move, s |",
            "| --- | --- | --- | --- | --- | --- |",
        ]
        lines += [
            f"| {load.load} | {load.p99_ratio.text(2)} | {load.periods[Period.DURING].longest_ms.text(1)} | "
            f"{load.going_over_ms.text(1)} | {load.switch_over_ms.text(1)} | {load.move_seconds.text(1)} |"
            for load in self.loads
        ]
        lines.append(
            f"| target | at most {MOST_P99:g} | {MOST_STALL_MS:g} | {MOST_SWITCH_MS:g} | "
            f"{MOST_SWITCH_MS:g} | {'reached' if self.reached else 'missed'} |"
        )
        return "\n".join(lines)

    def summary(self) -> Summary:
        """Return what is published."""
        context = {
            "machine": self.machine,
            "placement": self.placement,
            "disk": self.disk,
            "client": f"{self.memory_bytes >> 20} MiB paged to {self.limit_bytes >> 20} MiB, "
            f"{self.threads} threads",
            "rounds": str(self.rounds),
        }
        panels = [
            Panel(
                title=f"page-in p99, {load.load}",
                unit="us",
                figures={str(period): found.p99_us for period, found in load.periods.items()},
                ratios={"during / before": load.p99_ratio},
            )
            for load in self.loads
        ]
        panels += [
            Panel(
                title=f"longest stall, {load.load}",
                unit="ms",
                figures={
                    "during": load.periods[Period.DURING].longest_ms,
                    "going over": load.going_over_ms,
                    "switch-over": load.switch_over_ms,
                },
                decimals=1,
            )
            for load in self.loads
        ]
        return Summary("move", "Waits of a client whose volume moves", context, panels)
