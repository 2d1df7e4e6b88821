"""Limits while page-outs wait: a client whose pages cannot leave gets what the memory pool has left.

They wait while a paging device is full, and while the intermediate client of a move is away. Nothing of it is
recorded: the limits that were given out stay what they are, and hold again as soon as pages can leave.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Final

from farpage.definition.model import PAGE_BYTES
from farpage.errors import FarpageError
from farpage.hypervisor.clients import REPORT_SECONDS, Clients
from farpage.hypervisor.pool import MemoryPool
from farpage.hypervisor.reports import resident_bytes
from farpage.log import get_logger
from farpage.pager.messages import ClientReport, Nothing, SetLimit

log = get_logger()

INTERVAL_SECONDS: Final = 0.5
"""How often the pool's room is shared out anew while page-outs wait."""


def lifted_limits(
    pool_bytes: int, limits: Mapping[str, int], resident: Mapping[str, int], full: frozenset[str]
) -> dict[str, int]:
    """Return limits in bytes for the clients in `full`, at least their own and whole pages. No I/O.

    They share evenly what the pool has left beyond what all clients have in memory now.
    """
    room = pool_bytes - sum(resident.values())
    share = max(room, 0) // max(len(full), 1)
    lifted: dict[str, int] = {}
    for client in full & limits.keys():
        wanted = (resident.get(client, 0) + share) // PAGE_BYTES * PAGE_BYTES
        lifted[client] = max(limits[client], wanted)
    return lifted


class FullDevices:
    """Lifts the limits of clients whose page-outs wait; for the daemon's event loop."""

    def __init__(self, clients: Clients, pool: MemoryPool) -> None:
        self._clients = clients
        self._pool = pool
        self._task: asyncio.Task[None] | None = None
        self._wanted = False
        self._lifted: set[str] = set()

    def check(self) -> None:
        """Look whether a client's page-outs wait, or no longer; its report says so."""
        self._wanted = True
        if self._task is None:
            self._task = asyncio.get_running_loop().create_task(self._watch())

    def stop(self) -> None:
        """Watch no more."""
        if self._task:
            self._task.cancel()

    def resume(self) -> None:
        """Take over from an earlier control process, which may have lifted limits."""
        self._lifted = set(self._clients.attached)
        self.check()

    async def _watch(self) -> None:
        """Share the room out until no page-outs wait, and every client has its own limit again."""
        lifted = self._lifted
        while self._wanted or lifted:
            self._wanted = False
            lifted = await self._share(lifted)
            if lifted:
                await asyncio.sleep(INTERVAL_SECONDS)
        self._lifted = lifted
        self._task = None

    async def _share(self, lifted: set[str]) -> set[str]:
        """Set the limits of those whose page-outs wait, and whose did; returns those whose do."""
        reports: dict[str, ClientReport] = {}
        for name in list(self._clients.attached):
            try:
                report = await self._clients.report(name)
            except FarpageError as error:
                log.warning("client_not_asked", client=name, problem=error.cause)
                continue
            if report:
                reports[name] = report
        resident = {
            name: resident_bytes(report) + report.tier.taken_bytes for name, report in reports.items()
        }
        limits = {name: attached.limit_bytes for name, attached in self._clients.attached.items()}
        full = frozenset(name for name, report in reports.items() if report.page_outs_wait)
        wanted = lifted_limits(self._pool.size_bytes, limits, resident, full)
        for client in lifted - wanted.keys():
            if attached := self._clients.attached.get(client):
                await self._set(client, attached.limit_bytes)  # which may be another one by now
        for client, limit_bytes in wanted.items():
            await self._set(client, limit_bytes)
        return set(wanted)

    async def _set(self, client: str, limit_bytes: int) -> None:
        attached = self._clients.attached.get(client)
        if attached is None:
            return
        pages = min(limit_bytes, attached.memory.length_bytes) // PAGE_BYTES
        try:
            await attached.worker.channel.call(
                "set_limit",
                SetLimit(client=client, limit_pages=pages),
                Nothing,
                timeout_seconds=REPORT_SECONDS,
            )
        except FarpageError as error:
            log.warning("limit_not_lifted", client=client, problem=error.cause)
