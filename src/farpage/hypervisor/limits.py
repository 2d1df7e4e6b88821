"""The clients' limits: how much of each one's memory may stay in RAM."""

from __future__ import annotations

from farpage.definition.model import PAGE_BYTES
from farpage.errors import FarpageError
from farpage.hypervisor.attached import Attached
from farpage.hypervisor.clients import Clients
from farpage.hypervisor.pool import MemoryPool
from farpage.pager.messages import SetLimit


class ClientLimits:
    """Changes the limits of the clients of one hypervisor."""

    def __init__(self, clients: Clients, pool: MemoryPool) -> None:
        self._clients = clients
        self._pool = pool

    def rounded(self, client: str, limit_bytes: int) -> int:
        """Return what a limit comes to for a client: whole pages, at most its memory.

        :raise InvalidInput: when it is too small to run in.
        """
        record, attached = self._clients.records.of(client), self._clients.attached.get(client)
        memory_bytes = attached.memory.length_bytes if attached else record.memory_bytes
        return self._pool.limit_for(memory_bytes, limit_bytes)

    async def set(self, client: str, limit_bytes: int) -> None:
        """Change a client's limit, at once when it is attached.

        :raise FarpageError: it has not changed then.
        """
        async with self._clients.only(client, "set its limit"):
            limit, attached = self.rounded(client, limit_bytes), self._clients.attached.get(client)
            before = attached.limit_bytes if attached else 0
            if attached:
                await self._set_attached(client, attached, limit)
            try:
                await self._clients.records.set_limit(client, limit)
            except FarpageError:
                if attached and client in self._clients.attached:
                    await self._set_attached(client, attached, before)
                raise

    async def _set_attached(self, client: str, attached: Attached, limit_bytes: int) -> None:
        self._pool.give(client, limit_bytes)
        order = SetLimit(client=client, limit_pages=limit_bytes // PAGE_BYTES)
        try:
            await self._clients.command(client, attached, "set_limit", order)
            attached.limit_bytes = limit_bytes
            self._store(attached)
        finally:
            if client in self._clients.attached:
                self._pool.limits[client] = attached.limit_bytes
            else:  # it has exited meanwhile
                self._pool.limits.pop(client, None)

    def _store(self, attached: Attached) -> None:
        if attached.record.order is not None:
            order = attached.record.order.model_copy(
                update={"limit_pages": attached.limit_bytes // PAGE_BYTES}
            )
            self._clients.keep(attached, attached.record.model_copy(update={"order": order}))
