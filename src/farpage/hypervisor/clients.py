"""The clients of one hypervisor: created, attached to a worker, detached, deleted.

One request about a client runs at a time. Whatever fails half-way is undone before the error is
answered, so no request leaves a half-made client.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

import structlog

from farpage.attach import qmp
from farpage.attach.memory import ClientKind, ClientMemory
from farpage.attach.messages import AttachRequest
from farpage.attach.process import close_process, open_process
from farpage.definition.model import PAGE_BYTES, Redundancy
from farpage.errors import FarpageError
from farpage.hypervisor.errors import (
    ClientAttached,
    ClientBusy,
    ClientNotAttached,
    DetachByOwner,
    MemoryTooLarge,
)
from farpage.hypervisor.model import Attachment, ClientAttach, ClientCreate
from farpage.hypervisor.pool import MemoryPool
from farpage.hypervisor.records import ClientRecords
from farpage.hypervisor.settings import HypervisorSettings
from farpage.hypervisor.workers import WorkerPool, WorkerProcess
from farpage.kernel.memory import create_memfd
from farpage.pager.channel import PeerGone
from farpage.pager.messages import (
    Attach,
    ClientReport,
    Detach,
    Leave,
    Nothing,
    Query,
    Rejoin,
    SetLimit,
    StartScrub,
    StopScrub,
)
from farpage.pager.table import ENTRY_BYTES

log = structlog.get_logger()

OPEN_TIMEOUT_SECONDS = 10.0
QMP_SECONDS = 5.0
"""How long QEMU may take to answer when a client is attached."""
CLOSE = "close"

ATTACHMENTS = {ClientKind.PROCESS: Attachment.PROCESS, ClientKind.REGION: Attachment.REGION}


@dataclass
class Attached:
    """A client whose memory is paged."""

    memory: ClientMemory
    table: int
    """memfd of the page table, which outlives the worker."""
    worker: WorkerProcess
    limit_bytes: int
    ephemeral: bool
    """Created for this attachment and deleted after it."""
    qmp: str | None = None
    """QMP socket by which the guest is paused while no path works."""
    guest_paused: bool = False
    """It is paused by that now."""


@dataclass
class _Request:
    """A request under way."""

    what: str
    ended: asyncio.Event = field(default_factory=asyncio.Event)


class Clients:
    """All clients of this hypervisor."""

    def __init__(
        self,
        settings: HypervisorSettings,
        records: ClientRecords,
        workers: WorkerPool,
        pool: MemoryPool,
    ) -> None:
        self.attached: dict[str, Attached] = {}
        self.records = records
        self._settings = settings
        self._workers = workers
        self._pool = pool
        self._busy: dict[str, _Request] = {}
        self._regions = 0

    @asynccontextmanager
    async def _only(self, client: str, what: str) -> AsyncIterator[None]:
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
        async with self._only(wanted.name, "create"):
            await self._create(wanted)

    async def _create(self, wanted: ClientCreate) -> None:
        if wanted.limit_bytes is not None:
            self._pool.limit_for(wanted.memory_bytes, wanted.limit_bytes)
        await self.records.create(wanted)

    async def delete(self, client: str) -> None:
        """Remove a client that is not attached, and its volume.

        :raise ClientAttached: it is.
        """
        async with self._only(client, "delete"):
            if client in self.attached:
                raise ClientAttached(client, self.attached[client].memory.pid)
            await self.records.delete(client)

    async def clear_leftovers(self) -> None:
        """Delete what could not be deleted while VIOS were away."""
        for client in sorted(self.records.leftovers):
            if client not in self._busy:
                async with self._only(client, "delete"):
                    await self.records.clear(client)

    # Attaching

    async def attach_process(self, client: str, wanted: ClientAttach) -> None:
        """Page the memory of a running process; a client that does not exist is created.

        :raise FarpageError: the process goes on as before then.
        """
        async with self._only(client, "attach"):
            if client in self.attached:
                raise ClientAttached(client, self.attached[client].memory.pid)
            if wanted.qmp is not None:
                await qmp.execute(wanted.qmp, "query-status", timeout_seconds=QMP_SECONDS)
            # In a thread: ptrace waits for the process, and belongs to one thread.
            memory = await asyncio.to_thread(open_process, wanted.pid, wanted.memory)
            try:
                await self._attach(client, memory, wanted.limit_bytes, Redundancy.PATH, ephemeral=False)
            except PeerGone:
                # The worker may have paged something out: without the userfaultfd that would read as zeros.
                raise
            except FarpageError:
                await asyncio.to_thread(close_process, memory)
                raise
            if client in self.attached:
                self.attached[client].qmp = wanted.qmp

    async def attach_region(self, request: AttachRequest, memory: ClientMemory) -> str:
        """Page a region; returns the client's name, made up when the request has none.

        :raise FarpageError: the descriptors stay the caller's then.
        """
        client = request.name or self._region_name(memory.pid)
        async with self._only(client, "attach"):
            if client in self.attached:
                raise ClientAttached(client, self.attached[client].memory.pid)
            await self._attach(client, memory, request.limit_bytes, request.redundancy, ephemeral=True)
        return client

    def _region_name(self, pid: int) -> str:
        self._regions += 1
        return f"region-{pid}-{self._regions}"

    async def _attach(
        self,
        client: str,
        memory: ClientMemory,
        limit_bytes: int | None,
        redundancy: Redundancy,
        *,
        ephemeral: bool,
    ) -> None:
        created = client not in self.records
        if created:
            await self._create(
                ClientCreate(
                    name=client,
                    memory_bytes=memory.length_bytes,
                    limit_bytes=limit_bytes,
                    redundancy=redundancy,
                )
            )
        try:
            await self._attach_existing(client, memory, limit_bytes, ephemeral=created and ephemeral)
        except FarpageError as error:
            # A process whose worker ended may have pages on the volume by now; a region was never used.
            if created and (ephemeral or not isinstance(error, PeerGone)):
                await self.records.discard(client)
            raise

    async def _attach_existing(
        self, client: str, memory: ClientMemory, limit_bytes: int | None, *, ephemeral: bool
    ) -> None:
        record = self.records.of(client)
        if record.memory_bytes < memory.length_bytes:
            raise MemoryTooLarge(client, record.memory_bytes, memory.length_bytes)
        limit = self._pool.limit_for(memory.length_bytes, limit_bytes or record.limit_bytes)
        self._pool.give(client, limit)
        try:
            claimed = await self.records.claim(client)
            replicas = self.records.replicas(client, turn=len(self.attached))
            worker = self._workers.least_loaded()
        except FarpageError:
            self._pool.limits.pop(client)
            raise
        pages = memory.length_bytes // PAGE_BYTES
        table = create_memfd(f"farpage-table-{client}", pages * ENTRY_BYTES)
        order = Attach(
            client=client,
            volume=record.volumes[0].name,
            epoch=claimed.epoch,
            owner=claimed.owner,
            kind=memory.kind,
            pid=memory.pid,
            pages=pages,
            start_address=memory.start_address,
            memfd_offset_bytes=memory.memfd_offset_bytes,
            limit_pages=limit // PAGE_BYTES,
            replicas=replicas,
            path_timeout_seconds=self._settings.path_timeout_seconds,
            no_path_timeout_seconds=self._settings.no_path_timeout_seconds,
            open_timeout_seconds=OPEN_TIMEOUT_SECONDS,
        )
        worker.clients.add(client)
        # Known before the worker says so: the client may exit before the answer arrives.
        self.attached[client] = Attached(memory, table, worker, limit, ephemeral)
        descriptors = [memory.uffd.fileno(), memory.memfd, table, memory.pidfd]
        try:
            await worker.channel.call("attach", order, Nothing, descriptors)
        except FarpageError:
            self._forget(client)
            raise

    # Limits and reports

    def limit_for(self, client: str, limit_bytes: int) -> int:
        """Return what a limit comes to for a client: whole pages, at most its memory.

        :raise InvalidInput: when it is too small to run in.
        """
        record, attached = self.records.of(client), self.attached.get(client)
        memory_bytes = attached.memory.length_bytes if attached else record.memory_bytes
        return self._pool.limit_for(memory_bytes, limit_bytes)

    async def set_limit(self, client: str, limit_bytes: int) -> None:
        """Change a client's limit, at once when it is attached.

        :raise FarpageError: it has not changed then.
        """
        async with self._only(client, "set its limit"):
            limit, attached = self.limit_for(client, limit_bytes), self.attached.get(client)
            before = attached.limit_bytes if attached else 0
            if attached:
                await self._limit_attached(client, attached, limit)
            try:
                await self.records.set_limit(client, limit)
            except FarpageError:
                if attached and client in self.attached:
                    await self._limit_attached(client, attached, before)
                raise

    async def _limit_attached(self, client: str, attached: Attached, limit_bytes: int) -> None:
        self._pool.give(client, limit_bytes)
        order = SetLimit(client=client, limit_pages=limit_bytes // PAGE_BYTES)
        try:
            await attached.worker.channel.call("set_limit", order, Nothing)
            attached.limit_bytes = limit_bytes
        finally:
            if client in self.attached:
                self._pool.limits[client] = attached.limit_bytes
            else:  # it has exited meanwhile
                self._pool.limits.pop(client, None)

    async def report(self, client: str) -> ClientReport | None:
        """Ask the client's worker for its report; None when the client is not attached."""
        attached = self.attached.get(client)
        if attached is None:
            return None
        try:
            return await attached.worker.channel.call("query", Query(client=client), ClientReport)
        except FarpageError as error:
            if error.code in ("not_attached", "worker_gone"):
                return None
            raise

    # Moving off a VIOS

    async def leave(self, client: str, vios: str) -> None:
        """Move a client off a VIOS that is about to stop; one that is not attached any more needs no moving.

        :raise FarpageError: it cannot do without it.
        """
        if attached := self.attached.get(client):
            await attached.worker.channel.call("leave", Leave(client=client, vios=vios), Nothing)

    async def rejoin(self, client: str, vios: str, reason: str) -> None:
        """Let a client use a VIOS again as soon as it answers."""
        if attached := self.attached.get(client):
            order = Rejoin(client=client, vios=vios, reason=reason)
            await attached.worker.channel.call("rejoin", order, Nothing)

    # Scrubbing

    async def start_scrub(self, client: str, rate_bytes: int) -> None:
        """Begin to compare what every replica holds with what was paged out.

        :raise ClientNotAttached: only then is it known what that is.
        :raise FarpageError: it is being scrubbed already.
        """
        await self._scrub(client, "start_scrub", StartScrub(client=client, rate_bytes=rate_bytes))

    async def stop_scrub(self, client: str) -> None:
        """End a client's scrub, if one runs.

        :raise ClientNotAttached: nothing pages it.
        """
        await self._scrub(client, "stop_scrub", StopScrub(client=client))

    async def _scrub(self, client: str, method: str, order: StartScrub | StopScrub) -> None:
        self.records.of(client)
        attached = self.attached.get(client)
        if attached is None:
            raise ClientNotAttached(client)
        await attached.worker.channel.call(method, order, Nothing)

    # Detaching

    async def detach(self, client: str) -> None:
        """Page everything back into a process and let go of it.

        :raise ClientNotAttached: nothing pages it.
        :raise DetachByOwner: it is a region.
        """
        self.records.of(client)
        async with self._only(client, "detach"):
            attached = self.attached.get(client)
            if attached is None:
                raise ClientNotAttached(client)
            if attached.memory.kind is ClientKind.REGION:
                raise DetachByOwner(client, attached.memory.pid)
            await self._detach(client, attached, discard=False)

    async def _detach(self, client: str, attached: Attached, *, discard: bool) -> None:
        order = Detach(client=client, discard=discard)
        await attached.worker.channel.call("detach", order, Nothing)
        self._forget(client)
        await asyncio.to_thread(close_process, attached.memory)

    async def region_closed(self, client: str, memory: ClientMemory) -> None:
        """Let go of a region that its process has closed, or that went with its process."""
        async with self._only(client, CLOSE):
            attached = self.attached.get(client)
            if attached is None:
                memory.close_descriptors()
                return
            try:
                await attached.worker.channel.call("detach", Detach(client=client, discard=True), Nothing)
            except FarpageError as error:
                if error.code not in ("not_attached", "worker_gone"):
                    raise
            self._forget(client)
            memory.close_descriptors()
            if attached.ephemeral:
                await self.records.discard(client)

    def client_gone(self, client: str) -> None:
        """Clean up after a process that has exited; a region's listener does that for regions."""
        attached = self.attached.get(client)
        if attached is None or attached.memory.kind is ClientKind.REGION:
            return
        self._forget(client)
        attached.memory.close_descriptors()

    def worker_lost(self, worker: WorkerProcess) -> None:
        """Watch the processes that a worker watched which has ended: what is left of them is their end."""
        loop = asyncio.get_running_loop()

        def gone(client: str, pidfd: int) -> None:
            loop.remove_reader(pidfd)
            self.client_gone(client)

        for client in worker.clients:
            memory = self.attached[client].memory
            if memory.kind is ClientKind.PROCESS:
                loop.add_reader(memory.pidfd, gone, client, memory.pidfd)

    def _forget(self, client: str) -> None:
        attached = self.attached.pop(client)
        attached.worker.clients.discard(client)
        self._pool.limits.pop(client, None)
        os.close(attached.table)

    async def detach_all(self) -> None:
        """Give every client its memory back whole, before the hypervisor stops."""
        for client, attached in list(self.attached.items()):
            order = Detach(client=client)
            try:
                await attached.worker.channel.call("detach", order, Nothing)
            except FarpageError as error:
                log.error("client_not_detached", client=client, problem=str(error))
                continue
            if attached.memory.kind is ClientKind.PROCESS:
                await asyncio.to_thread(close_process, attached.memory)
