"""Taking the processes of a set away, and making it whole again."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from functools import partial

from farpage.embedded.set import DaemonFailed, EmbeddedSet
from tests.support.paged_set import DEADLINE_SECONDS
from tests.support.processes import kill_and_wait, workers_running


async def kill_control(embedded: EmbeddedSet) -> None:
    """Kill the control process alone; it stays dead until it is started."""
    embedded.supervise_hypervisor(supervised=False)
    embedded.kill_hypervisor(signal.SIGKILL)
    await embedded.hypervisor_exited()


async def kill_all(embedded: EmbeddedSet) -> None:
    """Kill the control process and then its workers, which it so cannot replace."""
    await kill_control(embedded)
    for pid in workers_running(embedded):
        await kill_and_wait(pid)


@contextmanager
def vioses_stopped(embedded: EmbeddedSet) -> Iterator[None]:
    """Have no VIOS answer while the context lasts."""
    for vios in embedded.vioses:
        embedded.kill_vios(vios, signal.SIGSTOP)
    try:
        yield
    finally:
        for vios in embedded.vioses:
            embedded.kill_vios(vios, signal.SIGCONT)


async def alarms(embedded: EmbeddedSet) -> list[str]:
    return [alarm.kind for alarm in await embedded.hypervisor.alarms()]


async def until_client_is_gone(embedded: EmbeddedSet, name: str) -> None:
    async with asyncio.timeout(DEADLINE_SECONDS):
        while name in [client.name for client in await embedded.hypervisor.clients()]:
            await asyncio.sleep(0.05)


async def heal(embedded: EmbeddedSet) -> None:
    """Have every process of a set run, and wait until the hypervisor uses them and nobody is attached."""
    for vios in embedded.vioses:
        embedded.kill_vios(vios, signal.SIGCONT)
        await _running(partial(embedded.start_vios, vios))
    embedded.kill_hypervisor(signal.SIGCONT)
    await _running(embedded.start_hypervisor)
    await embedded.hypervisor.refresh_devices()
    async with asyncio.timeout(DEADLINE_SECONDS):
        while any(client.attachment != "none" for client in await embedded.hypervisor.clients()):
            await asyncio.sleep(0.05)


async def _running(start: Callable[[], Awaitable[None]]) -> None:
    """Have a daemon run that may do so already, or be about to end."""
    try:
        await start()
    except DaemonFailed:
        await start()
