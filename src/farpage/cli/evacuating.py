"""What `device evacuate` and `vios evacuate` do: move every client off, and show how far each is."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from farpage.cli.moving import POLL_SECONDS, move_bars, show_move
from farpage.cli.output import print_json, print_text
from farpage.cli.session import ask_hypervisor
from farpage.cli.wording.move import ended_badly, evacuated

if TYPE_CHECKING:
    from farpage.embedded.control import HypervisorControl
    from farpage.hypervisor.movement import Evacuation, EvacuationStart


def evacuate(
    state: Path | None,
    kind: Literal["devices", "vioses"],
    name: str,
    order: EvacuationStart,
    *,
    wait: bool,
    as_json: bool,
) -> None:
    """Begin to empty a device or a VIOS and print that, at its end if it is waited for.

    :raise RemoteError: it cannot be; nothing is changed then.
    :raise typer.Exit: with 1, a client could not be moved.
    """

    async def run(hypervisor: HypervisorControl) -> Evacuation:
        evacuation = await hypervisor.evacuate(kind, name, order)
        if not wait:
            return evacuation
        with move_bars() as progress:
            bars = {info.client: progress.add_task(info.client) for info in evacuation.clients}
            while not evacuation.done:
                for info in evacuation.clients:
                    show_move(progress, bars[info.client], info)
                await asyncio.sleep(POLL_SECONDS)
                evacuation = await hypervisor.evacuation(kind, name)
        return evacuation

    evacuation = ask_hypervisor(state, run)
    print_json(evacuation) if as_json else print_text(*evacuated(evacuation))
    if any(map(ended_badly, evacuation.clients)):
        raise typer.Exit(1)
