"""What `client scrub` does: begins a scrub, and shows how far it is until it has ended."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from farpage.cli.session import ask_hypervisor
from farpage.cli.wanted import wanted
from farpage.hypervisor.model import ScrubStart
from farpage.pager.progress import ScrubState

if TYPE_CHECKING:
    from farpage.embedded.control import HypervisorControl
    from farpage.hypervisor.model import ClientInfo

POLL_SECONDS = 0.2


def run_scrub(state: Path | None, client: str, rate_bytes: int | None, *, wait: bool) -> ClientInfo:
    """Begin a scrub and return the client, at the scrub's end if that is waited for.

    :raise InvalidInput: the rate is none.
    :raise RemoteError: the client is not attached, or being scrubbed already.
    """
    document = wanted(ScrubStart, **({} if rate_bytes is None else {"rate_bytes": rate_bytes}))

    async def run(hypervisor: HypervisorControl) -> ClientInfo:
        info = await hypervisor.start_scrub(client, document)
        return await _watch(hypervisor, info) if wait else info

    return ask_hypervisor(state, run)


def stop_scrub(state: Path | None, client: str) -> ClientInfo:
    """End a scrub and return the client.

    :raise RemoteError: the client is not attached.
    """

    async def stop(hypervisor: HypervisorControl) -> ClientInfo:
        await hypervisor.stop_scrub(client)
        return await hypervisor.client(client)

    return ask_hypervisor(state, stop)


async def _watch(hypervisor: HypervisorControl, info: ClientInfo) -> ClientInfo:
    """Show progress on a terminal until the scrub has ended, or its client has."""
    columns = (TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task(
            f"scrubbing {info.name}", total=info.scrub.pages_total if info.scrub else None
        )
        while info.scrub and info.scrub.state is ScrubState.RUNNING:
            progress.update(bar, completed=info.scrub.pages_done)
            await asyncio.sleep(POLL_SECONDS)
            info = await hypervisor.client(info.name)
    return info
