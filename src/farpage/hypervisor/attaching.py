"""Clients that are attached: a process whose memory is taken, or a region that a process hands over.

Whatever fails half-way is undone before the error is answered, so no request leaves a half-made client.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from farpage.attach import qmp
from farpage.attach.memory import ClientKind, ClientMemory
from farpage.attach.messages import AttachRequest
from farpage.attach.process import close_process, open_process, userfaultfds
from farpage.attach.retake import remember
from farpage.definition.model import PAGE_BYTES, Redundancy
from farpage.definition.releasing import refusal
from farpage.errors import FarpageError
from farpage.handover import Handover
from farpage.hypervisor.attached import Attached
from farpage.hypervisor.clients import Clients
from farpage.hypervisor.errors import ClientAttached, MemoryTooLarge
from farpage.hypervisor.handovers import HandoverMismatch, Handovers, kept, release_of
from farpage.hypervisor.model import ClientAttach, ClientCreate
from farpage.hypervisor.pool import MemoryPool
from farpage.hypervisor.settings import HypervisorSettings
from farpage.hypervisor.unstarted import UnstartedReleases
from farpage.hypervisor.workers import WorkerPool
from farpage.kernel.inject import ProcessNotFound
from farpage.kernel.process import identify
from farpage.log import get_logger
from farpage.pager.attachmentrecord import AttachmentRecord
from farpage.pager.channel import PeerGone
from farpage.pager.messages import Attach, Nothing
from farpage.pager.statefile import StateFile

log = get_logger()

OPEN_TIMEOUT_SECONDS = 10.0
QMP_SECONDS = 5.0
"""How long QEMU may take to answer when a client is attached."""


class ExitedMeanwhile(ProcessNotFound):
    """The process exited when it was paged already: its pages may have been changed by then."""


class Attaching:
    """Attaches clients of one hypervisor."""

    def __init__(
        self,
        settings: HypervisorSettings,
        clients: Clients,
        workers: WorkerPool,
        pool: MemoryPool,
        *,
        handovers: Handovers,
        unstarted: UnstartedReleases,
        recover: Callable[[str, Attached], Awaitable[None]],
        make_reachable: Callable[[str], Awaitable[None]],
    ) -> None:
        """`recover` finds another worker for a client whose worker has ended.

        `make_reachable` begins to move a claimed client whose volume is out of this hypervisor's reach.
        """
        self._settings = settings
        self._clients = clients
        self._workers = workers
        self._pool = pool
        self._handovers = handovers
        self._unstarted = unstarted
        self._recover = recover
        self._make_reachable = make_reachable
        self._regions = 0

    async def process(self, client: str, wanted: ClientAttach) -> None:
        """Page the memory of a running process; a client that does not exist is created.

        :raise FarpageError: the process goes on as before then.
        """
        async with self._clients.only(client, "attach"):
            await self._check_free(client)
            if wanted.qmp is not None:
                await qmp.execute(wanted.qmp, "query-status", timeout_seconds=QMP_SECONDS)
            # Before anything is made in the process, so that it is found and closed if this one is killed.
            record = await asyncio.to_thread(intent, client, wanted.pid)
            if record is not None:
                record = record.model_copy(update={"qmp": wanted.qmp})
                self._clients.run.save(record)
            try:
                # In a thread: ptrace waits for the process, and belongs to one thread.
                memory = await asyncio.to_thread(open_process, wanted.pid, wanted.memory)
                try:
                    await self._attach(client, memory, wanted.limit_bytes, Redundancy.PATH, record)
                except FarpageError:
                    await asyncio.to_thread(close_process, memory)
                    raise
            except FarpageError:
                await self._forget(client)
                raise

    async def region(self, request: AttachRequest, memory: ClientMemory) -> str:
        """Page a region; returns the client's name, made up when the request has none.

        :raise FarpageError: the descriptors stay the caller's then.
        """
        client = request.name or self._region_name(memory.pid)
        async with self._clients.only(client, "attach"):
            await self._check_free(client)
            try:
                await self._attach(client, memory, request.limit_bytes, request.redundancy, None)
            except FarpageError:
                await self._forget(client)
                raise
        return client

    async def _forget(self, client: str) -> None:
        """Drop the record of an attachment that has failed, unless a release is to be put back by it."""
        try:
            await self._unstarted.put_back(client)
        except FarpageError as error:
            log.warning("release_not_restored", client=client, problem=error.cause)
        else:
            self._clients.run.remove(client)

    def _region_name(self, pid: int) -> str:
        self._regions += 1
        return f"region-{pid}-{self._regions}"

    async def _check_free(self, client: str) -> None:
        """See that a client may be attached.

        :raise ClientAttached: it is.
        :raise FarpageError: a release that it was to begin with cannot be put in force again yet.
        """
        if client in self._clients.attached:
            raise ClientAttached(client, self._clients.attached[client].memory.pid)
        if client in self._clients.unrecovered:
            raise ClientAttached(client, self._clients.unrecovered[client].process.pid)
        # Before anything is stored of this attachment, which is to begin with the pages of that release.
        await self._unstarted.put_back(client)

    async def _attach(
        self,
        client: str,
        memory: ClientMemory,
        limit_bytes: int | None,
        redundancy: Redundancy,
        record: AttachmentRecord | None,
    ) -> None:
        created = client not in self._clients.records
        if record is None:
            record = _record(client, memory)
        record = record.model_copy(update={"made_for_it": created})
        if not created and (released := self._clients.records.of(client).released):
            record = record.model_copy(update={"handover": kept(released)})
        self._clients.run.save(record)
        if created:
            await self._clients.make(
                ClientCreate(
                    name=client,
                    memory_bytes=memory.length_bytes,
                    limit_bytes=limit_bytes,
                    redundancy=redundancy,
                )
            )
        try:
            await self._attach_existing(record, memory, limit_bytes)
        except FarpageError as error:
            if created:
                await self._clients.records.discard(client)
            if record.handover is not None and not isinstance(error, ExitedMeanwhile):
                self._unstarted.owe(record)
            raise
        if record.handover is not None:
            self._handovers.counts["started"] += 1
            await self._handovers.forget(self._clients.records.of(client))

    async def _attach_existing(
        self, record: AttachmentRecord, memory: ClientMemory, limit_bytes: int | None
    ) -> None:
        client = record.client
        defined = self._clients.records.of(client)
        if defined.memory_bytes < memory.length_bytes:
            raise MemoryTooLarge(client, defined.memory_bytes, memory.length_bytes)
        limit = self._pool.limit_for(memory.length_bytes, limit_bytes or defined.limit_bytes)
        self._pool.give(client, limit)
        pages = memory.length_bytes // PAGE_BYTES
        try:
            found = await self._handover(client, record, pages)
            claimed = await self._clients.records.claim(
                client, released=release_of(record.handover) if record.handover else None
            )
            await self._make_reachable(client)
            replicas = self._clients.records.replicas(client, turn=len(self._clients.attached))
            worker = self._workers.least_loaded()
            state = StateFile.create(self._clients.run.state_path(client), pages, claimed.epoch)
            if found is not None:
                from farpage.hypervisor.tables import lay_out

                lay_out(found, state)
        except FarpageError:
            self._pool.limits.pop(client)
            raise
        order = Attach(
            client=client,
            volume=defined.volumes[0].name,
            epoch=claimed.epoch,
            owner=claimed.owner,
            kind=memory.kind,
            pid=memory.pid,
            pages=pages,
            start_address=memory.start_address,
            memfd_offset_bytes=memory.memfd_offset_bytes,
            limit_pages=limit // PAGE_BYTES,
            replicas=replicas,
            had_owner=bool(defined.owner),
            state_path=str(state.path),
            path_timeout_seconds=self._settings.path_timeout_seconds,
            no_path_timeout_seconds=self._settings.no_path_timeout_seconds,
            resync_bytes_per_second=self._settings.resync_bytes_per_second,
            direct_reads=self._settings.direct_reads,
            open_timeout_seconds=OPEN_TIMEOUT_SECONDS,
            ram_tier_percent=self._settings.ram_tier_percent,
            handed_over=found is not None,
        )
        # Known before the worker says so: the client may exit before the answer arrives.
        attached = self._clients.attached[client] = Attached(
            record, memory, state, worker, limit, attaching=True, served=replicas
        )
        worker.clients.add(client)
        try:
            try:
                record = record.model_copy(
                    update={"memory": remember(memory), "order": order, "worker": worker.identity}
                )
            except OSError:
                raise ProcessNotFound(memory.pid) from None
            self._clients.keep(attached, record)
            await worker.channel.call("attach", order, Nothing, attached.descriptors())
        except PeerGone:
            await self._worker_ended_meanwhile(client, attached)
        except FarpageError:
            self._clients.let_go(client)
            raise
        if self._clients.attached.get(client) is not attached:  # it exited right after
            raise ExitedMeanwhile(memory.pid)
        if found is not None:
            # From here on pages may change, so what was released is not true any more.
            self._clients.keep(attached, attached.record.model_copy(update={"handover": None}))
        attached.attaching = False
        attached.paged.set()

    async def _handover(self, client: str, record: AttachmentRecord, pages: int) -> Handover | None:
        """Fetch what an adopted client begins with; None for one that was not released.

        :raise ClientReleased: this hypervisor has not adopted it.
        :raise HandoverUnreachable: nobody who answers has it.
        :raise HandoverMismatch: it is of another size.
        """
        if record.handover is None:
            return None
        released = release_of(record.handover)
        if released.adopter != self._clients.records.hypervisor:
            raise refusal(client, released, self._clients.records.hypervisor)
        found = await self._handovers.fetch(client, self._clients.records.of(client), released)
        if found.pages != pages:
            raise HandoverMismatch(client, found.pages * PAGE_BYTES, pages * PAGE_BYTES)
        return found

    async def _worker_ended_meanwhile(self, client: str, attached: Attached) -> None:
        """Decide about a client whose worker ended before it answered: it may page something out by then.

        :raise PeerGone: the client is as it was before.
        """
        await attached.worker.dead.wait()
        try:
            registered = client in self._clients.attached and attached.memory.is_registered()
        except ProcessLookupError:
            registered = False
        if not registered:
            self._clients.let_go(client)
            raise PeerGone("attach")
        await self._recover(client, attached)


def intent(client: str, pid: int) -> AttachmentRecord | None:
    """Describe what is about to be done to a process; None when there is none."""
    try:
        process = identify(pid)
    except OSError:
        return None
    return AttachmentRecord(
        client=client, kind=ClientKind.PROCESS, process=process, uffds_before=userfaultfds(pid)
    )


def _record(client: str, memory: ClientMemory) -> AttachmentRecord:
    try:
        process = identify(memory.pid)
    except OSError:
        raise ProcessNotFound(memory.pid) from None
    return AttachmentRecord(client=client, kind=memory.kind, process=process)
