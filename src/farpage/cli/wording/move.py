"""Words for moves and evacuations."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.text import Text

from farpage.cli.output import fields, table
from farpage.definition.model import PAGE_BYTES
from farpage.hypervisor.movement import MoveStage
from farpage.terminal.sizes import format_duration, format_size

if TYPE_CHECKING:
    from rich.table import Table

    from farpage.hypervisor.movement import Evacuation, MoveInfo


def ended_badly(info: MoveInfo) -> bool:
    """Tell whether a move has ended without bringing the client where it was to go."""
    return info.stage in (MoveStage.FAILED, MoveStage.CANCELLED)


def moved(info: MoveInfo) -> str:
    """Say in a line how a move stands."""
    problem = f": {info.problem}" if info.problem else ""
    match info.stage:
        case MoveStage.DONE:
            return f"client {info.client} is on device {info.target}, and not on {info.source} any more"
        case MoveStage.CANCELLED:
            return f"client {info.client} stays on device {info.source}"
    return f"client {info.client}, {info.source} to {info.target}: {info.stage.value}{_share(info)}{problem}"


def _share(info: MoveInfo) -> str:
    if not info.total_pages:
        return ""
    return f", {format_size(info.present_pages * PAGE_BYTES)} of {format_size(info.total_pages * PAGE_BYTES)}"


def details(info: MoveInfo) -> Table:
    """Return everything that is known of a move."""
    return fields(_details(info))


def _details(info: MoveInfo) -> Iterator[tuple[str, str]]:
    yield "client", info.client
    yield "stage", info.stage.value
    yield "from", f"device {info.source}" + (f", VIOS {info.source_vios}" if info.source_vios else "")
    yield "to", f"device {info.target}" + (f", VIOS {info.target_vios}" if info.target_vios else "")
    yield "present", _share(info).removeprefix(", ") or "-"
    yield "rate", f"{format_size(round(info.rate_bytes))}/s"
    yield "time left", "-" if info.eta_seconds is None else format_duration(info.eta_seconds)
    if info.bandwidth_bytes is not None:
        yield "bandwidth", f"{format_size(info.bandwidth_bytes)}/s"
    if info.intermediary is not None:
        yield "pages", f"{info.filled_pages} copied, {info.kept_pages} kept as the client read them"
        yield "waiting", f"{info.waiting_commands} commands for the intermediate client"
        seen = info.intermediary.seen_seconds_ago
        at_work = "never heard of" if seen is None else f"heard of {format_duration(seen)} ago"
        here = ", started by this hypervisor" if info.intermediary.running_here else ""
        yield "intermediate client", f"{at_work}{here}"
        if info.intermediary.command:
            yield "start it with", info.intermediary.command
        if info.intermediary.problem:
            yield "its problem", info.intermediary.problem
    yield "problem", info.problem or "-"


def evacuated(evacuation: Evacuation) -> Iterator[Table | Text]:
    """Return one line per client, with what became of it."""
    if not evacuation.clients:
        yield Text(f"no client has to be moved off {evacuation.what}")
    else:
        yield table(
            ["client", "from", "to", "stage", "present", "problem"],
            (
                (
                    info.client,
                    info.source,
                    info.target or "-",
                    info.stage.value,
                    _share(info).removeprefix(", ") or "-",
                    info.problem or "-",
                )
                for info in evacuation.clients
            ),
        )
    if evacuation.staying:
        yield Text(f"reached over another VIOS where they are: {', '.join(evacuation.staying)}")
