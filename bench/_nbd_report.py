"""What `bench.nbd` found, as a document, as text and as a Markdown table. No I/O."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from bench._nbd_cases import Case, Client
from bench._nbd_contenders import OURS
from bench._published import BenchResult, Panel, Summary
from bench._rounds import Spread, ratio


class _Document(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Figures(_Document):
    """Commands a second of one contender, and how farpage compares, round by round."""

    contender: str
    per_second: Spread
    ratio: Spread | None = None
    """farpage's divided by this one's; None for farpage itself."""
    target: float | None = None

    @property
    def verdict(self) -> str:
        """Say whether the target was reached; empty without one."""
        if self.target is None or self.ratio is None:
            return ""
        return f"target {self.target:g}: {'reached' if self.ratio.median >= self.target else 'missed'}"


class CaseResult(_Document):
    """One case."""

    case: Case
    figures: tuple[Figures, ...]


class NbdResult(BenchResult):
    """Everything that a run found."""

    machine: str
    placement: str
    disk: str
    client: Client = "fio"
    rounds: int
    seconds: float
    size_bytes: int
    missing: tuple[str, ...]
    """Peers that are not installed."""
    cases: tuple[CaseResult, ...]

    @property
    def _conditions(self) -> str:
        return (
            f"{self.rounds} rounds of {self.seconds:g} s; {self.size_bytes >> 20} MiB on {self.disk};"
            f" commands a second with {self.client}, median (range)"
        )

    def as_text(self) -> str:
        """Return the report for a terminal."""
        lines = [f"{self.machine}; {self.placement}", self._conditions]
        lines += [f"not installed: {', '.join(self.missing)}"] if self.missing else []
        for result in self.cases:
            lines.append(result.case.text)
            for found in result.figures:
                line = f"  {found.contender:20} {found.per_second.text():28}"
                if found.ratio is not None:
                    line += f" {OURS} is {found.ratio.text(2)}x  {found.verdict}"
                lines.append(line.rstrip())
        return "\n".join(lines)

    def as_markdown(self) -> str:
        """Return a table with a line for each case and contender."""
        lines = [
            f"{self.machine}; {self.placement}. {self._conditions}.",
            "",
            f"| case | server | commands/s | {OURS} is |",
            "| --- | --- | --- | --- |",
        ]
        for result in self.cases:
            case = result.case.text
            for found in result.figures:
                ratio_text = f"{found.ratio.text(2)}x" if found.ratio is not None else ""
                lines.append(f"| {case} | {found.contender} | {found.per_second.text()} | {ratio_text} |")
                case = ""
        return "\n".join(lines)

    def summary(self) -> Summary:
        """Return what is published."""
        context = {"machine": self.machine, "placement": self.placement, "conditions": self._conditions}
        panels = [
            Panel(
                title=result.case.text,
                unit="commands/s",
                figures={found.contender: found.per_second for found in result.figures},
                ratios={
                    f"{OURS} / {found.contender}": found.ratio for found in result.figures if found.ratio
                },
            )
            for result in self.cases
        ]
        return Summary("nbd", "The NBD server beside others", context, panels)


def case_result(case: Case, measured: dict[str, list[float]]) -> CaseResult:
    """Compare what each contender did, one figure a round."""
    ours = measured[OURS]
    return CaseResult(
        case=case,
        figures=tuple(
            Figures(
                contender=name,
                per_second=Spread.of(values),
                ratio=ratio(ours, values) if name != OURS else None,
                target=case.target(name),
            )
            for name, values in measured.items()
        ),
    )
