"""The clients of one hypervisor: which there are, which are attached, and what their workers are asked.

One request about a client runs at a time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from farpage.attach.memory import ClientKind
from farpage.errors import FarpageError
from farpage.hypervisor.attached import Attached
from farpage.hypervisor.errors import ClientAttached, ClientBusy, DetachByOwner
from farpage.hypervisor.model import ClientCreate
from farpage.hypervisor.pool import MemoryPool
from farpage.hypervisor.records import ClientRecords
from farpage.hypervisor.runfolder import RunFolder
from farpage.message import Message
from farpage.pager.attachmentrecord import AttachmentRecord
from farpage.pager.channel import Answer, PeerGone
from farpage.pager.messages import ClientReport, Leave, Nothing, Query, Rejoin

CLOSE = "close"
"""The request that ends a region; another one is waited for."""

REPORT_SECONDS = 2.0
"""So long a worker may take to report; without a report a client is shown as not paged at the moment."""


@dataclass
class _Request:
    """A request under way."""

    what: str
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class Clients:
    """All clients of this hypervisor."""

    def __init__(self, records: ClientRecords, pool: MemoryPool) -> None:
        self.attached: dict[str, Attached] = {}
        self.unrecovered: dict[str, AttachmentRecord] = {}
        """Clients of an earlier control process whose memory could not be taken again so far."""
        self.records = records
        self.run: RunFolder
        self._pool = pool
        self._busy: dict[str, _Request] = {}

    @asynccontextmanager
    async def only(self, client: str, what: str) -> AsyncIterator[None]:
        """Hold off other requests about a client; only for the end of a region one is waited.

        :raise ClientBusy: another request is under way.
        """
        while client in self._busy:
            other = self._busy[client]
            if CLOSE not in (what, other.what):
                raise ClientBusy(client, other.what)
            await other.ended.wait()
        request = self._busy[client] = _Request(what)
        try:
            yield
        finally:
            del self._busy[client]
            request.ended.set()

    # Creating and deleting

    async def create(self, wanted: ClientCreate) -> None:
        """Make a client and its volume on the device that fits best.

        :raise FarpageError: when no device fits, or none of its VIOS answers; nothing is left then.
        """
        async with self.only(wanted.name, "create"):
            await self.make(wanted)

    async def make(self, wanted: ClientCreate) -> None:
        """Make a client as `create` does, for a caller that holds off other requests about it."""
        if wanted.limit_bytes is not None:
            self._pool.limit_for(wanted.memory_bytes, wanted.limit_bytes)
        await self.records.create(wanted)

    async def delete(self, client: str) -> None:
        """Remove a client that is not attached, and its volume.

        :raise ClientAttached: it is.
        :raise DetachByOwner: it is a region, which is gone when its process lets it go.
        """
        async with self.only(client, "delete"):
            if client in self.attached:
                memory = self.attached[client].memory
                if memory.kind is ClientKind.REGION:
                    raise DetachByOwner(client, memory.pid)
                raise ClientAttached(client, memory.pid)
            await self.records.delete(client)

    async def discard_unattached(self, client: str) -> None:
        """Delete a client that was made for an attachment which has ended, unless it is attached again."""
        async with self.only(client, CLOSE):
            if client in self.records and not self._is_used(client):
                await self.records.discard(client)

    def _is_used(self, client: str) -> bool:
        """Tell whether a process has it for its memory."""
        return client in self.attached or client in self.unrecovered

    async def clear_leftovers(self) -> None:
        """Delete what could not be deleted while VIOS were away, but what somebody has attached since."""
        for client in sorted(self.records.leftovers):
            if client not in self._busy and not self._is_used(client):
                async with self.only(client, "delete"):
                    await self.records.clear(client)

    # Who is attached

    def take_in(self, attached: Attached) -> None:
        """Enter a client of an earlier control process."""
        client = attached.record.client
        self.attached[client] = attached
        attached.worker.clients.add(client)
        self._pool.limits[client] = attached.limit_bytes

    def forget(self, client: str) -> None:
        """Take a client off the books; its memory and its record stay the caller's."""
        attached = self.attached.pop(client)
        attached.worker.clients.discard(client)
        attached.paged.set()  # who waits for a worker sees that it has gone
        self._pool.limits.pop(client, None)
        attached.state.close()

    def let_go(self, client: str) -> None:
        """Forget a client and close everything that is here of it; its memory is left as it is."""
        attached = self.attached.get(client)
        if attached is not None:
            self.forget(client)
            if not attached.attaching:
                attached.memory.close_descriptors()
            self.run.remove(client)

    def remember_pause(self, client: str, paused: bool) -> None:
        """Store whether a client's guest is paused, for the next control process too."""
        attached = self.attached.get(client)
        if attached is not None:
            self.keep(attached, attached.record.model_copy(update={"guest_paused": paused}))

    def keep(self, attached: Attached, record: AttachmentRecord) -> None:
        """Go by a new record of a client from now on, and so does the next control process."""
        attached.record = record
        self.run.save(record)

    def pid_of(self, client: str) -> int | None:
        """Return the process of a client that is attached, None for another one."""
        attached = self.attached.get(client)
        return attached.memory.pid if attached else None

    # What its worker is asked

    async def ask(
        self, client: str, attached: Attached, method: str, order: Message, answer: type[Answer]
    ) -> Answer:
        """Have a client's worker do something, or the one that takes its place when it ends meanwhile.

        :raise PeerGone: the client has exited meanwhile.
        """
        while True:
            await attached.paged.wait()
            if self.attached.get(client) is not attached:
                raise PeerGone(method)
            try:
                return await attached.worker.channel.call(method, order, answer)
            except PeerGone:
                if attached.paged.is_set():
                    raise  # the hypervisor is stopping

    async def command(self, client: str, attached: Attached, method: str, order: Message) -> None:
        """As `ask`, for requests whose answer is that they were carried out."""
        await self.ask(client, attached, method, order, Nothing)

    async def report(self, client: str) -> ClientReport | None:
        """Ask the client's worker for its report; None when the client is not attached."""
        attached = self.attached.get(client)
        if attached is None:
            return None
        try:
            return await attached.worker.channel.call(
                "query", Query(client=client), ClientReport, timeout_seconds=REPORT_SECONDS
            )
        except FarpageError as error:
            if error.code in ("not_attached", "worker_gone", "worker_silent"):
                return None
            raise

    async def leave(self, client: str, vios: str) -> None:
        """Move a client off a VIOS that is about to stop; one that is not attached any more needs no moving.

        Should its worker be lost meanwhile, the next one does it.

        :raise FarpageError: it cannot do without it.
        """
        if attached := self.attached.get(client):
            await self.command(client, attached, "leave", Leave(client=client, vios=vios))

    async def rejoin(self, client: str, vios: str, reason: str) -> None:
        """Let a client use a VIOS again as soon as it answers."""
        if attached := self.attached.get(client):
            order = Rejoin(client=client, vios=vios, reason=reason)
            await self.command(client, attached, "rejoin", order)
