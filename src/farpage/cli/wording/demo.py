"""Words for the demo's result."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.text import Text

from farpage.cli.output import fields
from farpage.terminal.sizes import format_size

if TYPE_CHECKING:
    from rich.console import RenderableType

    from farpage.demo.verdict import DemoResult, Failover


def details(result: DemoResult) -> Iterator[RenderableType]:
    """Return the verdict and what it rests on."""
    passes = result.passes
    yield fields(
        [
            ("pages", f"{result.pages_verified} verified, {result.pages_wrong} wrong"),
            (
                "passes",
                f"{passes.before} before the first fault, {passes.during} between the faults, "
                f"{passes.after} after the last, over {result.pages_total} pages each",
            ),
            ("paging", f"{result.page_ins} page-ins, {result.page_outs} page-outs"),
            (
                "resident",
                f"at most {format_size(result.resident_bytes_max)}, "
                f"limit {format_size(result.limit_bytes)} "
                f"({result.resident_bytes_max / result.limit_bytes:.1%})",
            ),
            *(
                (f"{failover.kind.upper()} to {failover.vios}", _failover(failover))
                for failover in result.failovers
            ),
            ("took", f"{result.seconds:.0f} s"),
        ]
    )
    yield ""
    for problem in result.problems:
        yield Text(problem, style="red")
    yield Text(f"verdict: {result.verdict}", style="bold red" if result.problems else "bold green")


def _failover(failover: Failover) -> str:
    text = (
        f"noticed after {failover.detected_ms:.0f} ms, longest stall {failover.longest_stall_ms:.0f} ms, "
        f"{failover.replayed_commands} replayed commands"
    )
    if failover.guest_longest_gap_ms is not None:
        text += f"; the guest itself saw {failover.guest_longest_gap_ms:.0f} ms between two accesses"
    return text
