"""Words for paths."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from farpage.cli.output import table
from farpage.terminal.colours import path_state
from farpage.terminal.sizes import format_duration

if TYPE_CHECKING:
    from rich.table import Table

    from farpage.hypervisor.model import PathInfo
    from farpage.hypervisor.ways import PathExplanation


def overview(paths: Sequence[PathInfo]) -> Table:
    """Return one line per path."""
    return table(
        [
            "client",
            "vios",
            "state",
            "for",
            "epoch",
            "in flight",
            "held",
            "failovers",
            "device",
            "reads",
            "reason",
        ],
        (
            (
                path.client,
                path.vios,
                path_state(path.state),
                format_duration(path.since_seconds),
                str(path.epoch),
                str(path.in_flight),
                str(path.held),
                str(path.failovers),
                path.device,
                path.reads.value,
                path.reason or "-",
            )
            for path in paths
        ),
    )


def explained(explanation: PathExplanation) -> Iterator[Text | Table]:
    """Return the decision, and a line for every VIOS and device that was looked at."""
    colour = {"direct": "green", "indirect": "cyan"}.get(explanation.way.value, "red")
    yield Text(explanation.summary, style=colour)
    yield table(
        ["vios", "device", "taken", "why"],
        ((edge.vios, edge.device, "yes" if edge.taken else "no", edge.why) for edge in explanation.edges),
    )
