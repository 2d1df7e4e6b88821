"""What `bench.paging` found, as a document and as text. No I/O."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pydantic import BaseModel, ConfigDict

from bench._pagers import Measured
from bench._published import BenchResult, Panel, Summary
from bench._rounds import Spread, ratio
from bench._toucher import Phase
from farpage.errors import ExitStatus

Figure = Callable[[Measured], float]

FIGURES: dict[str, Figure] = {
    "touches_per_second": lambda measured: measured.report.touches_per_second,
    "waits_per_second": lambda measured: measured.report.waited.count / measured.report.seconds,
    "wait_p50_us": lambda measured: measured.report.waited.p50_us,
    "wait_p99_us": lambda measured: measured.report.waited.p99_us,
    "touch_p99_us": lambda measured: measured.report.all.p99_us,
    "pages_in_per_second": lambda measured: measured.page_ins / measured.report.seconds,
    "wasted_percent": lambda measured: 100 * measured.wasted / max(measured.page_ins, 1),
}
SHOWN = {
    "touches_per_second": "touches/s",
    "waits_per_second": "waits/s",
    "wait_p50_us": "wait p50 us",
    "wait_p99_us": "wait p99 us",
    "wasted_percent": "wasted %",
}
"""The figures that tables show, and their headings; the document has all."""


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class PhaseResult(_Document):
    """One contender in one phase; `figures` by the names of `FIGURES`."""

    phase: str
    threads: int
    write_percent: int
    contender: str
    figures: dict[str, Spread]


class PhaseRatio(_Document):
    """farpage's figures divided by a peer's, round by round; None where the peer's is 0."""

    phase: str
    threads: int
    against: str
    ratios: dict[str, Spread | None]


class PagingResult(BenchResult):
    """Everything that a run found."""

    machine: str
    placement: str
    cpu: int | None
    """The only one that the program ran on; None for any."""
    disk: str
    access: str
    sparse: bool
    """Whether farpage's volume was allocated as it was written."""
    memory_bytes: int
    limit_bytes: int
    ram_tier_percent: int
    seconds: float
    rounds: int
    without_swap: str
    """Why host swap could not take part; empty when it did."""
    results: tuple[PhaseResult, ...]
    ratios: tuple[PhaseRatio, ...]

    @property
    def _disk_and_volume(self) -> str:
        volume = "sparse" if self.sparse else "allocated in full"
        return f"{self.disk}; farpage's device is read and written: {self.access}; its volume is {volume}"

    @property
    def status(self) -> int:
        """That of a run without its peers where host swap could not take part."""
        return int(ExitStatus.UNSUPPORTED if self.without_swap else ExitStatus.OK)

    def as_text(self) -> str:
        """Return the tables."""
        lines = [
            f"machine    {self.machine}",
            f"placement  {self.placement}",
            f"disk       {self._disk_and_volume}",
            f"memory     {self.memory_bytes >> 20} MiB, {self.limit_bytes >> 20} MiB of it resident at most, "
            f"{self.ram_tier_percent}% of that for compressed pages",
            f"rounds     {self.rounds}, contenders in turn; median (lowest-highest)",
            "",
            "A wait is a touch of a page that was not in memory. touches/s includes the check of every page.",
            "Wasted: of the pages brought in from a device those that farpage read ahead and nobody is known "
            "to have used; host swap does not say.",
            *([self.without_swap] if self.without_swap else []),
        ]
        for key in dict.fromkeys((row.phase, row.threads) for row in self.results):
            lines += ["", f"{key[0]}, {key[1]} thread{'s' if key[1] > 1 else ''}"]
            lines.append(_row("", list(SHOWN.values())))
            lines += [
                _row(row.contender, [_amount(row.figures[name]) for name in SHOWN])
                for row in self.results
                if (row.phase, row.threads) == key
            ]
            lines += [
                _row(
                    f"farpage / {row.against}",
                    [_ratio(row.ratios[name]) for name in SHOWN],
                )
                for row in self.ratios
                if (row.phase, row.threads) == key
            ]
        return "\n".join(lines)

    def summary(self) -> Summary:
        """Return what is published: touches a second and waits at the 99th percentile in every phase."""
        panels = []
        for name in ("touches_per_second", "touch_p99_us"):
            for phase, threads in dict.fromkeys((row.phase, row.threads) for row in self.results):
                ours = [row for row in self.results if (row.phase, row.threads) == (phase, threads)]
                against = [row for row in self.ratios if (row.phase, row.threads) == (phase, threads)]
                panels.append(
                    Panel(
                        title=f"{phase}, {threads} thread{'s' if threads > 1 else ''}",
                        unit="touches/s" if name == "touches_per_second" else "p99 of all touches, us",
                        figures={row.contender: row.figures[name] for row in ours},
                        ratios={f"farpage / {row.against}": row.ratios[name] for row in against},
                    )
                )
        context = {
            "machine": self.machine,
            "placement": self.placement,
            "disk": self._disk_and_volume,
            "memory": f"{self.memory_bytes >> 20} MiB, {self.limit_bytes >> 20} MiB of it resident at most",
            "rounds": f"{self.rounds}, contenders in turn",
        }
        return Summary("paging", "Paging beside the host's own swap", context, panels)


Rounds = dict[str, list[list[Measured]]]
"""By contender, what each round measured, phase by phase."""


def _values(rounds: Sequence[Sequence[Measured]], index: int, figure: Figure) -> list[float]:
    return [figure(measured[index]) for measured in rounds]


def results(rounds: Rounds, phases: Sequence[Phase]) -> tuple[PhaseResult, ...]:
    """Summarize every contender in every phase."""
    return tuple(
        PhaseResult(
            phase=phase.name,
            threads=phase.threads,
            write_percent=phase.write_percent,
            contender=contender,
            figures={name: Spread.of(_values(measured, index, figure)) for name, figure in FIGURES.items()},
        )
        for index, phase in enumerate(phases)
        for contender, measured in rounds.items()
    )


def ratios(rounds: Rounds, phases: Sequence[Phase], ours: str) -> tuple[PhaseRatio, ...]:
    """Compare one contender with each of the others in every phase."""
    return tuple(
        PhaseRatio(
            phase=phase.name,
            threads=phase.threads,
            against=peer,
            ratios={
                name: ratio(_values(rounds[ours], index, figure), _values(measured, index, figure))
                for name, figure in FIGURES.items()
            },
        )
        for index, phase in enumerate(phases)
        for peer, measured in rounds.items()
        if peer != ours
    )


def _amount(spread: Spread) -> str:
    return spread.text(0 if spread.median >= 100 else 1)


def _ratio(spread: Spread | None) -> str:
    return "-" if spread is None else spread.text(2)


def _row(name: str, cells: Sequence[str]) -> str:
    return f"  {name:<17}" + "".join(f"{cell:>23}" for cell in cells)
