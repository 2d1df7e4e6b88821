"""How the demo looks while it runs: a live table on a terminal, lines elsewhere."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol, TextIO

from rich.console import Console, Group
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from farpage.demo.scenario import Stage
from farpage.hypervisor.model import ClientInfo
from farpage.terminal.colours import path_state
from farpage.terminal.sizes import format_duration, format_size

EVENT_LINES = 14
REFRESHES_PER_SECOND = 4
NAME_COLUMNS = 12


@dataclass(frozen=True)
class Snapshot:
    """What there is to see at one moment."""

    elapsed_seconds: float
    stage: Stage
    passes: int
    pages_verified: int
    pages_wrong: int
    memory_bytes: int
    limit_bytes: int
    resident_bytes: int
    resident_bytes_max: int
    client: ClientInfo | None


class View(Protocol):
    """Where the demo shows itself."""

    def event(self, elapsed_seconds: float, message: str) -> None:
        """Something happened."""

    def update(self, seen: Snapshot) -> None:
        """This is how things are."""


class LineView:
    """Prints events, one a line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def event(self, elapsed_seconds: float, message: str) -> None:
        """Print the event."""
        self._stream.write(f"{elapsed_seconds:6.1f} s  {message}\n")
        self._stream.flush()

    def update(self, seen: Snapshot) -> None:
        """Do nothing: numbers would drown the events."""


class LiveView:
    """Keeps a table, the paths and the latest events on the terminal."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._events: deque[Text] = deque(maxlen=EVENT_LINES)
        self._latest: Snapshot | None = None

    def event(self, elapsed_seconds: float, message: str) -> None:
        """Add the event to those shown."""
        self._events.append(Text(f"{elapsed_seconds:6.1f} s  {message}", no_wrap=True, overflow="ellipsis"))
        self._show()

    def update(self, seen: Snapshot) -> None:
        """Show the new numbers."""
        self._latest = seen
        self._show()

    def _show(self) -> None:
        parts = [Panel(Group(*self._events), title="events", title_align="left", border_style="dim")]
        if self._latest is not None:
            parts.insert(0, Panel(_state(self._latest), title=_title(self._latest), title_align="left"))
        self._live.update(Group(*parts))


@contextlib.contextmanager
def live_view(console: Console) -> Iterator[LiveView]:
    """Take over the terminal until the block ends; the last picture stays."""
    with Live(console=console, refresh_per_second=REFRESHES_PER_SECOND) as live:
        yield LiveView(live)


def _title(seen: Snapshot) -> Text:
    return Text(f"farpage demo, {format_duration(seen.elapsed_seconds)}: {seen.stage}")


def _state(seen: Snapshot) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold", no_wrap=True, min_width=NAME_COLUMNS)
    grid.add_column(no_wrap=True)
    wrong = Text(f"{seen.pages_wrong} wrong", style="bold red" if seen.pages_wrong else "green")
    grid.add_row(
        "guest", Text.assemble(f"{seen.passes} passes, {seen.pages_verified} pages verified, ", wrong)
    )
    over = seen.resident_bytes_max > seen.limit_bytes
    grid.add_row(
        "resident",
        Text(
            f"{format_size(seen.resident_bytes)} of {format_size(seen.memory_bytes)}, "
            f"limit {format_size(seen.limit_bytes)}, most {format_size(seen.resident_bytes_max)}",
            style="yellow" if over else "",
        ),
    )
    grid.add_row("", ProgressBar(total=seen.memory_bytes, completed=seen.resident_bytes, width=60))
    if seen.client is not None:
        counters = seen.client.counters
        grid.add_row(
            "paging",
            f"{counters.page_in_pages} page-ins, {counters.page_out_pages} page-outs, "
            f"{counters.clean_evict_pages} clean and {counters.zero_evict_pages} zero pages evicted",
        )
        grid.add_row(
            "stalls",
            f"longest {counters.longest_stall_ms:.0f} ms, {seen.client.stalled_faults} accesses wait now",
        )
        for path in seen.client.paths:
            grid.add_row(
                f"path {path.vios}",
                Text.assemble(
                    path_state(path.state),
                    f" for {format_duration(path.since_seconds)}, {path.in_flight} in flight",
                    f" ({path.reason})" if path.reason else "",
                ),
            )
    return grid
