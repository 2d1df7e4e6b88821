"""What the commands about moves do: begin them, and show how far they are until they have ended."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TaskProgressColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from farpage.cli.session import ask_hypervisor
from farpage.cli.wanted import wanted
from farpage.definition.model import PAGE_BYTES
from farpage.hypervisor.movement import ENDED, MoveAdjust

if TYPE_CHECKING:
    from farpage.embedded.control import HypervisorControl
    from farpage.hypervisor.movement import ClientMove, MoveInfo

POLL_SECONDS = 0.2


def run_move(state: Path | None, client: str, order: ClientMove, *, wait: bool) -> MoveInfo:
    """Begin a move and return it, at its end if that is waited for.

    :raise RemoteError: it cannot be; nothing is changed then.
    """

    async def run(hypervisor: HypervisorControl) -> MoveInfo:
        info = await hypervisor.move(client, order)
        if not wait:
            return info
        with move_bars() as progress:
            bar = progress.add_task(client)
            while info.stage not in ENDED:
                show_move(progress, bar, info)
                await asyncio.sleep(POLL_SECONDS)
                info = await hypervisor.move_progress(client)
        return info

    return ask_hypervisor(state, run)


def adjust_move(state: Path | None, client: str, **changes: object) -> MoveInfo:
    """Pause a move, let it go on, or change its bandwidth."""
    order = wanted(MoveAdjust, **changes)
    return ask_hypervisor(state, lambda hypervisor: hypervisor.adjust_move(client, order))


def cancel(state: Path | None, client: str) -> MoveInfo:
    """End a move where it began."""

    async def run(hypervisor: HypervisorControl) -> MoveInfo:
        await hypervisor.cancel_move(client)
        return await hypervisor.move_progress(client)

    return ask_hypervisor(state, run)


def move_bars() -> Progress:
    """Return a display of moves' progress, for the terminal alone."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    return Progress(*columns, console=Console(stderr=True), transient=True)


def show_move(progress: Progress, bar: TaskID, info: MoveInfo) -> None:
    """Bring a move's bar up to date."""
    progress.update(
        bar,
        total=info.total_pages * PAGE_BYTES or None,
        completed=info.present_pages * PAGE_BYTES,
        description=f"{info.client}: {info.problem or info.stage.value}",
    )
