"""The table of clauses: what shows each, and whether it holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest
from rich.console import Console
from rich.table import Table

EVIDENCE = "evidence"

CLAUSES = {
    "C1": "identify",
    "C2": "define",
    "C3": "command",
    "C4": "move",
    "C5": "decide",
    "C6": "locate",
    "C7": "intermediate access",
    "C8": "copy",
    "C9": "share",
    "A1": "identifier",
    "A2": "convert",
    "A3": "assist",
}
"""Of the patent's first claim (C) and of its abstract (A)."""


def clause_of(node: str) -> str:
    """Return the clause that a test is about: `...::test_c5_decide` is C5; empty for none."""
    words = node.rpartition("::test_")[2].split("_")
    clause = words[0].upper()
    return clause if clause in CLAUSES else ""


@dataclass
class Step:
    """One clause's test."""

    evidence: list[str] = field(default_factory=list)
    passed: bool | None = None
    failure: str = ""


class ClauseTable:
    """A pytest plugin that collects the steps' evidence; `python -m tests.claims` prints it."""

    def __init__(self) -> None:
        self.steps = {clause: Step() for clause in CLAUSES}
        self.other_failures: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note how a test, or its preparation, has ended."""
        step = self.steps.get(clause_of(report.nodeid))
        if step is None:
            if report.failed:
                self.other_failures.append(f"{report.nodeid}: {report.longreprtext}")
            return
        if report.when == "call" or report.failed or report.skipped:
            step.passed = report.passed and step.passed is not False
            step.failure = step.failure or ("" if report.passed else report.longreprtext)
        if report.when == "teardown":
            step.evidence = [str(value) for name, value in report.user_properties if name == EVIDENCE]

    @property
    def passed(self) -> bool:
        """Whether every clause is shown."""
        return all(step.passed for step in self.steps.values()) and not self.other_failures

    def print(self, console: Console) -> None:
        """Print the table, and below it what has failed."""
        table = Table(show_lines=True, title="US 8,099,522 B2: first claim and abstract")
        for heading in ("clause", "evidence", "pass"):
            table.add_column(heading)
        for clause, step in self.steps.items():
            verdict = "[green]yes" if step.passed else "[red]NO" if step.passed is False else "[red]not run"
            table.add_row(f"{clause} {CLAUSES[clause]}", "\n".join(step.evidence) or "-", verdict)
        console.print(table)
        for failure in self._failures():
            console.print(failure, markup=False, highlight=False)

    def _failures(self) -> Iterator[str]:
        for clause, step in self.steps.items():
            if step.failure:
                yield f"\n{clause}: {step.failure}"
        yield from self.other_failures
