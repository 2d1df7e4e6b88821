"""What `device replace` does: begins a replacement, and shows how far it is until it has ended."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from farpage.cli.session import ask_hypervisor

if TYPE_CHECKING:
    from farpage.embedded.control import HypervisorControl
    from farpage.hypervisor.model import DeviceReplacement

POLL_SECONDS = 0.2


def run_replacement(state: Path | None, old: str, new: str, *, wait: bool) -> DeviceReplacement:
    """Begin a replacement and return it, at its end if that is waited for.

    :raise RemoteError: it cannot be; nothing is changed then.
    """

    async def run(hypervisor: HypervisorControl) -> DeviceReplacement:
        replacement = await hypervisor.replace_device(old, new)
        return await _watch(hypervisor, replacement) if wait else replacement

    return ask_hypervisor(state, run)


async def _watch(hypervisor: HypervisorControl, replacement: DeviceReplacement) -> DeviceReplacement:
    """Show progress on a terminal, a bar for each client, until all are done or have failed."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bars = {client.client: progress.add_task(client.client) for client in replacement.clients}
        while not replacement.done:
            for client in replacement.clients:
                total = client.missing_pages + client.copied_pages
                progress.update(
                    bars[client.client],
                    total=total or None,
                    completed=client.copied_pages,
                    description=f"{client.client}: {client.problem or client.stage.value}",
                )
            await asyncio.sleep(POLL_SECONDS)
            replacement = await hypervisor.replacement(replacement.old)
    return replacement
