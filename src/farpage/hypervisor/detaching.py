"""Clients that are let go of: detached on request, closed by their process, or gone with it."""

from __future__ import annotations

import asyncio

from farpage.attach.memory import ClientKind, ClientMemory
from farpage.attach.process import close_process
from farpage.errors import FarpageError
from farpage.hypervisor.attached import Attached
from farpage.hypervisor.clients import CLOSE, Clients
from farpage.hypervisor.errors import ClientNotAttached, DetachByOwner
from farpage.kernel.process import is_gone
from farpage.log import get_logger
from farpage.pager.channel import PeerGone
from farpage.pager.messages import Detach

log = get_logger()


class Detaching:
    """Lets go of clients of one hypervisor."""

    def __init__(self, clients: Clients) -> None:
        self._clients = clients

    async def detach(self, client: str) -> None:
        """Page everything back into a process and let go of it.

        :raise ClientNotAttached: nothing pages it.
        :raise DetachByOwner: it is a region.
        """
        self._clients.records.of(client)
        async with self._clients.only(client, "detach"):
            attached = self._clients.attached.get(client)
            if attached is None:
                raise ClientNotAttached(client)
            if attached.memory.kind is ClientKind.REGION:
                raise DetachByOwner(client, attached.memory.pid)
            await self._detach(client, attached)

    async def _detach(self, client: str, attached: Attached) -> None:
        try:
            await self._clients.command(client, attached, "detach", Detach(client=client))
        except PeerGone:
            if attached.finishing is None:
                raise
            await attached.finishing
            return
        await self._finish(client, attached)

    async def _finish(self, client: str, attached: Attached) -> None:
        if self._clients.attached.get(client) is not attached:
            return  # it has exited meanwhile
        self._clients.forget(client)
        # The record goes last: it tells which descriptor in the process is to be closed.
        await asyncio.to_thread(close_process, attached.memory)
        self._clients.run.remove(client)

    async def finish(self, client: str, attached: Attached) -> None:
        """Let go of a process that a worker had detached before it was lost."""
        attached.finishing = asyncio.get_running_loop().create_task(self._finish(client, attached))
        await attached.finishing

    async def region_closed(self, client: str, memory: ClientMemory) -> None:
        """Let go of a region that its process has closed, or that went with its process."""
        async with self._clients.only(client, CLOSE):
            attached = self._clients.attached.get(client)
            if attached is not None and attached.memory is memory:
                await self.discard(client, attached)

    async def close_named(self, client: str, pid: int) -> None:
        """Let go of a region whose process says so; one that is not paged, or not its own, is left alone."""
        async with self._clients.only(client, CLOSE):
            attached = self._clients.attached.get(client)
            if attached and (attached.memory.kind, attached.memory.pid) == (ClientKind.REGION, pid):
                await self.discard(client, attached)

    async def discard(self, client: str, attached: Attached) -> None:
        """Let go of a client whose memory nobody uses any more."""
        try:
            await self._clients.command(client, attached, "detach", Detach(client=client, discard=True))
        except FarpageError as error:
            if error.code not in ("not_attached", "worker_gone"):
                raise
        if self._clients.attached.get(client) is attached:
            self._clients.let_go(client)
            if attached.ephemeral:
                await self._clients.records.discard(client)

    async def process_gone(self, client: str, *, held: bool = False, lives: bool = False) -> None:
        """Clean up after a process that has exited; `held` if the caller holds off requests about it.

        One that `lives` has lost its memory alone.
        """
        attached = self._clients.attached.get(client)
        if attached is None or not (lives or is_gone(attached.memory.pidfd)):
            return
        if attached.record.releasing:
            return  # what it was may be all on its devices by now: whoever releases it sees to the rest
        self._clients.let_go(client)
        if not attached.ephemeral:
            return
        if held:
            await self._clients.records.discard(client)
        else:
            await self._clients.discard_unattached(client)

    async def all(self) -> None:
        """Give every client its memory back whole, before the hypervisor stops."""
        for client, attached in list(self._clients.attached.items()):
            if attached.record.releasing:
                continue  # the next control process asks the definition whose it is
            try:
                await self._detach(client, attached)
            except FarpageError as error:
                log.error("client_not_detached", client=client, problem=str(error))
