"""The clients of one hypervisor: created, attached to a worker, detached, deleted.

One request about a client runs at a time. Whatever fails half-way is undone before the error is
answered, so no request leaves a half-made client.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from farpage.attach import qmp
from farpage.attach.memory import ClientKind, ClientMemory
from farpage.attach.messages import AttachRequest
from farpage.attach.process import close_process, open_process, userfaultfds
from farpage.attach.retake import remember
from farpage.definition.model import PAGE_BYTES, Redundancy, ReplicaState
from farpage.definition.releasing import refusal
from farpage.errors import FarpageError
from farpage.handover import Handover
from farpage.hypervisor.errors import (
    ClientAttached,
    ClientBusy,
    ClientNotAttached,
    DetachByOwner,
    MemoryTooLarge,
)
from farpage.hypervisor.handovers import HandoverMismatch, Handovers, kept, lay_out, release_of
from farpage.hypervisor.model import Attachment, ClientAttach, ClientCreate
from farpage.hypervisor.pool import MemoryPool
from farpage.hypervisor.records import ClientRecords
from farpage.hypervisor.runfolder import AttachmentRecord, RunFolder
from farpage.hypervisor.settings import HypervisorSettings
from farpage.hypervisor.workers import WorkerPool, WorkerProcess
from farpage.kernel.inject import ProcessNotFound
from farpage.kernel.process import identify, is_gone
from farpage.log import get_logger
from farpage.message import Message
from farpage.pager.channel import Answer, PeerGone
from farpage.pager.messages import (
    AddReplica,
    Attach,
    ClientReport,
    Detach,
    Leave,
    Nothing,
    Query,
    RecordReplicas,
    Rejoin,
    ReplicaSpec,
    RetireReplica,
    SetLimit,
    StartScrub,
    StopScrub,
)
from farpage.pager.statefile import StateFile

log = get_logger()

OPEN_TIMEOUT_SECONDS = 10.0
QMP_SECONDS = 5.0
"""How long QEMU may take to answer when a client is attached."""
CLOSE = "close"

REPORT_SECONDS = 2.0
"""So long a worker may take to report; without a report a client is shown as not paged at the moment."""

ATTACHMENTS = {ClientKind.PROCESS: Attachment.PROCESS, ClientKind.REGION: Attachment.REGION}


@dataclass
class Attached:
    """A client whose memory is paged."""

    record: AttachmentRecord
    memory: ClientMemory
    state: StateFile
    worker: WorkerProcess
    limit_bytes: int
    attaching: bool = False
    """Its worker has not said yet that it pages it; should that end first, whoever asked it sees to that."""
    paged: asyncio.Event = field(default_factory=asyncio.Event)
    """It has a worker: cleared while a lost one is replaced."""

    @property
    def ephemeral(self) -> bool:
        """Created for this attachment and deleted after it."""
        return self.record.kind is ClientKind.REGION and self.record.made_for_it

    @property
    def qmp(self) -> str | None:
        """QMP socket by which the guest is paused while no path works."""
        return self.record.qmp

    @property
    def guest_paused(self) -> bool:
        """It is paused by that now."""
        return self.record.guest_paused


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
        handovers: Handovers,
    ) -> None:
        self.attached: dict[str, Attached] = {}
        self.unrecovered: dict[str, AttachmentRecord] = {}
        """Clients of an earlier control process whose memory could not be taken again so far."""
        self.records = records
        self.recover: Callable[[str, Attached], Awaitable[None]]
        """Finds another worker for a client whose worker has ended; see `farpage.hypervisor.recovery`."""
        self.run: RunFolder
        self.handovers = handovers
        self._settings = settings
        self._workers = workers
        self._pool = pool
        self._busy: dict[str, _Request] = {}
        self._regions = 0

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
            await self._create(wanted)

    async def _create(self, wanted: ClientCreate) -> None:
        if wanted.limit_bytes is not None:
            self._pool.limit_for(wanted.memory_bytes, wanted.limit_bytes)
        await self.records.create(wanted)

    async def delete(self, client: str) -> None:
        """Remove a client that is not attached, and its volume.

        :raise ClientAttached: it is.
        """
        async with self.only(client, "delete"):
            if client in self.attached:
                raise ClientAttached(client, self.attached[client].memory.pid)
            await self.records.delete(client)

    async def clear_leftovers(self) -> None:
        """Delete what could not be deleted while VIOS were away."""
        for client in sorted(self.records.leftovers):
            if client not in self._busy:
                async with self.only(client, "delete"):
                    await self.records.clear(client)

    # Attaching

    async def attach_process(self, client: str, wanted: ClientAttach) -> None:
        """Page the memory of a running process; a client that does not exist is created.

        :raise FarpageError: the process goes on as before then.
        """
        async with self.only(client, "attach"):
            self._check_free(client)
            if wanted.qmp is not None:
                await qmp.execute(wanted.qmp, "query-status", timeout_seconds=QMP_SECONDS)
            # Before anything is made in the process, so that it is found and closed if this one is killed.
            record = await asyncio.to_thread(_intent, client, wanted.pid)
            if record is not None:
                record = record.model_copy(update={"qmp": wanted.qmp})
                self.run.save(record)
            try:
                # In a thread: ptrace waits for the process, and belongs to one thread.
                memory = await asyncio.to_thread(open_process, wanted.pid, wanted.memory)
                try:
                    await self._attach(client, memory, wanted.limit_bytes, Redundancy.PATH, record)
                except FarpageError:
                    await asyncio.to_thread(close_process, memory)
                    raise
            except FarpageError:
                self.run.remove(client)
                raise

    def remember_pause(self, client: str, paused: bool) -> None:
        """Store whether a client's guest is paused, for the next control process too."""
        attached = self.attached.get(client)
        if attached is not None:
            attached.record = attached.record.model_copy(update={"guest_paused": paused})
            self.run.save(attached.record)

    async def attach_region(self, request: AttachRequest, memory: ClientMemory) -> str:
        """Page a region; returns the client's name, made up when the request has none.

        :raise FarpageError: the descriptors stay the caller's then.
        """
        client = request.name or self._region_name(memory.pid)
        async with self.only(client, "attach"):
            self._check_free(client)
            try:
                await self._attach(client, memory, request.limit_bytes, request.redundancy, None)
            except FarpageError:
                self.run.remove(client)
                raise
        return client

    def _region_name(self, pid: int) -> str:
        self._regions += 1
        return f"region-{pid}-{self._regions}"

    def _check_free(self, client: str) -> None:
        if client in self.attached:
            raise ClientAttached(client, self.attached[client].memory.pid)
        if client in self.unrecovered:
            raise ClientAttached(client, self.unrecovered[client].process.pid)

    async def _attach(
        self,
        client: str,
        memory: ClientMemory,
        limit_bytes: int | None,
        redundancy: Redundancy,
        record: AttachmentRecord | None,
    ) -> None:
        created = client not in self.records
        if record is None:
            record = _record(client, memory)
        record = record.model_copy(update={"made_for_it": created})
        if not created and (released := self.records.of(client).released):
            record = record.model_copy(update={"handover": kept(released)})
        self.run.save(record)
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
            await self._attach_existing(record, memory, limit_bytes)
        except FarpageError:
            if created:
                await self.records.discard(client)
            if record.handover is not None:
                await self.records.restore(client, release_of(record.handover))
            raise
        if record.handover is not None:
            self.handovers.counts["started"] += 1
            await self.handovers.forget(self.records.of(client))

    async def _attach_existing(
        self, record: AttachmentRecord, memory: ClientMemory, limit_bytes: int | None
    ) -> None:
        client = record.client
        defined = self.records.of(client)
        if defined.memory_bytes < memory.length_bytes:
            raise MemoryTooLarge(client, defined.memory_bytes, memory.length_bytes)
        limit = self._pool.limit_for(memory.length_bytes, limit_bytes or defined.limit_bytes)
        self._pool.give(client, limit)
        pages = memory.length_bytes // PAGE_BYTES
        try:
            found = await self._handover(client, record, pages)
            claimed = await self.records.claim(
                client, released=release_of(record.handover) if record.handover else None
            )
            replicas = self.records.replicas(client, turn=len(self.attached))
            worker = self._workers.least_loaded()
            state = StateFile.create(self.run.state_path(client), pages, claimed.epoch)
            if found is not None:
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
            open_timeout_seconds=OPEN_TIMEOUT_SECONDS,
            handed_over=found is not None,
        )
        # Known before the worker says so: the client may exit before the answer arrives.
        attached = self.attached[client] = Attached(record, memory, state, worker, limit, attaching=True)
        worker.clients.add(client)
        try:
            try:
                attached.record = record.model_copy(
                    update={"memory": remember(memory), "order": order, "worker": worker.identity}
                )
            except OSError:
                raise ProcessNotFound(memory.pid) from None
            self.run.save(attached.record)
            await worker.channel.call("attach", order, Nothing, self.descriptors(attached))
        except PeerGone:
            await self._worker_ended_meanwhile(client, attached)
        except FarpageError:
            self.let_go(client)
            raise
        if self.attached.get(client) is not attached:  # it exited right after
            raise ProcessNotFound(memory.pid)
        if found is not None:
            # From here on pages may change, so what was released is not true any more.
            attached.record = attached.record.model_copy(update={"handover": None})
            self.run.save(attached.record)
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
        if released.adopter != self.records.hypervisor:
            raise refusal(client, released, self.records.hypervisor)
        found = await self.handovers.fetch(client, self.records.of(client), released)
        if found.pages != pages:
            raise HandoverMismatch(client, found.pages * PAGE_BYTES, pages * PAGE_BYTES)
        return found

    def take_in(self, attached: Attached) -> None:
        """Enter a client of an earlier control process."""
        client = attached.record.client
        self.attached[client] = attached
        attached.worker.clients.add(client)
        self._pool.limits[client] = attached.limit_bytes

    async def record_replicas(self, wanted: RecordReplicas) -> None:
        """Store what a client's replicas are worth: in the definition, and for a recovery without that.

        :raise FarpageError: it may not be stored.
        """
        await self.records.record_replicas(wanted)
        attached = self.attached.get(wanted.client)
        # One that is being adopted is in the run folder alone.
        record = attached.record if attached else self.run.record(wanted.client)
        if record is None or record.order is None or record.order.owner != wanted.owner:
            return
        record = record.model_copy(update={"order": _with_states(record.order, wanted.states)})
        self.run.save(record)
        if attached:
            attached.record = record

    def current_replicas(self, client: str, order: Attach) -> tuple[ReplicaSpec, ...]:
        """Return the replicas as the definition has them now.

        While that is not known their states are those of `order`, which `record_replicas` keeps up to date.
        """
        try:
            current = self.records.replicas(client, turn=0)
        except FarpageError:
            current = order.replicas
        states = {replica.device: replica.state for replica in order.replicas}
        states |= self.records.replica_states(client)
        # In the order of preference that the client had.
        before = {replica.device: replica.endpoints for replica in order.replicas}
        return tuple(
            replica.model_copy(
                update={
                    "state": states.get(replica.device, replica.state),
                    "endpoints": before[replica.device]
                    if set(before.get(replica.device, ())) == set(replica.endpoints)
                    else replica.endpoints,
                }
            )
            for replica in current
            if states.get(replica.device) is not ReplicaState.RETIRED
        )

    @staticmethod
    def descriptors(attached: Attached) -> list[int]:
        """Return what goes with an `attach` to a worker."""
        memory = attached.memory
        return [memory.uffd.fileno(), memory.memfd, attached.state.fileno(), memory.pidfd]

    async def _worker_ended_meanwhile(self, client: str, attached: Attached) -> None:
        """Decide about a client whose worker ended before it answered: it may page something out by then.

        :raise PeerGone: the client is as it was before.
        """
        await attached.worker.dead.wait()
        try:
            registered = client in self.attached and attached.memory.is_registered()
        except ProcessLookupError:
            registered = False
        if not registered:
            self.let_go(client)
            raise PeerGone("attach")
        await self.recover(client, attached)

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
        async with self.only(client, "set its limit"):
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
            await self._ask(client, attached, "set_limit", order)
            attached.limit_bytes = limit_bytes
            self._store_limit(attached)
        finally:
            if client in self.attached:
                self._pool.limits[client] = attached.limit_bytes
            else:  # it has exited meanwhile
                self._pool.limits.pop(client, None)

    def _store_limit(self, attached: Attached) -> None:
        if attached.record.order is not None:
            order = attached.record.order.model_copy(
                update={"limit_pages": attached.limit_bytes // PAGE_BYTES}
            )
            attached.record = attached.record.model_copy(update={"order": order})
            self.run.save(attached.record)

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

    # Moving to another device

    async def add_replica(self, client: str, attached: Attached, device: str) -> None:
        """Have a client's worker copy everything to a replica that the definition has as stale.

        :raise FarpageError: the client has ended, or there is no way to the replica.
        """
        replica = next(spec for spec in self.records.replicas(client, turn=0) if spec.device == device)
        self._store_replicas(attached, device, replica)
        await self._ask(client, attached, "add_replica", AddReplica(client=client, replica=replica))

    async def retire_replica(self, client: str, attached: Attached, device: str) -> None:
        """Have a client's worker use a replica no more; returns when it does not, or the client has ended."""
        await self._ask(client, attached, "retire_replica", RetireReplica(client=client, device=device))
        if self.records.replica_states(client).get(device) is ReplicaState.RETIRED:
            self._store_replicas(attached, device)

    def _store_replicas(self, attached: Attached, without: str, *more: ReplicaSpec) -> None:
        """Keep what a worker that takes over has to know, should no VIOS tell it then."""
        order = attached.record.order
        if order is not None and attached.record.client in self.attached:
            left = tuple(spec for spec in order.replicas if spec.device != without)
            order = order.model_copy(update={"replicas": (*left, *more)})
            attached.record = attached.record.model_copy(update={"order": order})
            self.run.save(attached.record)

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
        await self._ask(client, attached, method, order)

    async def _ask(self, client: str, attached: Attached, method: str, order: Message) -> None:
        """As `ask`, for requests whose answer is that they were carried out."""
        await self.ask(client, attached, method, order, Nothing)

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

    # Detaching

    async def detach(self, client: str) -> None:
        """Page everything back into a process and let go of it.

        :raise ClientNotAttached: nothing pages it.
        :raise DetachByOwner: it is a region.
        """
        self.records.of(client)
        async with self.only(client, "detach"):
            attached = self.attached.get(client)
            if attached is None:
                raise ClientNotAttached(client)
            if attached.memory.kind is ClientKind.REGION:
                raise DetachByOwner(client, attached.memory.pid)
            await self._detach(client, attached, discard=False)

    async def _detach(self, client: str, attached: Attached, *, discard: bool) -> None:
        order = Detach(client=client, discard=discard)
        await self._ask(client, attached, "detach", order)
        self._forget(client)
        # The record goes last: it tells which descriptor in the process is to be closed.
        await asyncio.to_thread(close_process, attached.memory)
        self.run.remove(client)

    async def region_closed(self, client: str, memory: ClientMemory) -> None:
        """Let go of a region that its process has closed, or that went with its process."""
        async with self.only(client, CLOSE):
            attached = self.attached.get(client)
            if attached is not None and attached.memory is memory:
                await self.discard(client, attached)

    async def close_named(self, client: str, pid: int) -> None:
        """Let go of a region whose process says so; one that is not paged, or not its own, is left alone."""
        async with self.only(client, CLOSE):
            attached = self.attached.get(client)
            if attached and (attached.memory.kind, attached.memory.pid) == (ClientKind.REGION, pid):
                await self.discard(client, attached)

    async def discard(self, client: str, attached: Attached) -> None:
        """Let go of a client whose memory nobody uses any more."""
        try:
            await self._ask(client, attached, "detach", Detach(client=client, discard=True))
        except FarpageError as error:
            if error.code not in ("not_attached", "worker_gone"):
                raise
        if self.attached.get(client) is attached:
            self.let_go(client)
            if attached.ephemeral:
                await self.records.discard(client)

    async def client_gone(self, client: str) -> None:
        """Clean up after a process that has exited."""
        attached = self.attached.get(client)
        if attached is None or not is_gone(attached.memory.pidfd):
            return
        if attached.record.releasing:
            return  # what it was may be all on its devices by now: whoever releases it sees to the rest
        self.let_go(client)
        if attached.ephemeral:
            await self.records.discard(client)

    def _forget(self, client: str) -> None:
        attached = self.attached.pop(client)
        attached.worker.clients.discard(client)
        attached.paged.set()  # who waits for a worker sees that it has gone
        self._pool.limits.pop(client, None)
        attached.state.close()

    def let_go(self, client: str) -> None:
        """Forget a client and close everything that is here of it; its memory is left as it is."""
        attached = self.attached.get(client)
        if attached is not None:
            self._forget(client)
            if not attached.attaching:
                attached.memory.close_descriptors()
            self.run.remove(client)

    async def detach_all(self) -> None:
        """Give every client its memory back whole, before the hypervisor stops."""
        for client, attached in list(self.attached.items()):
            order = Detach(client=client)
            try:
                await self._ask(client, attached, "detach", order)
            except FarpageError as error:
                log.error("client_not_detached", client=client, problem=str(error))
                continue
            if client in self.attached:
                self._forget(client)
                await asyncio.to_thread(close_process, attached.memory)
                self.run.remove(client)


def _with_states(order: Attach, states: Mapping[str, ReplicaState]) -> Attach:
    replicas = tuple(
        replica.model_copy(update={"state": states.get(replica.device, replica.state)})
        for replica in order.replicas
    )
    return order.model_copy(update={"replicas": replicas})


def _intent(client: str, pid: int) -> AttachmentRecord | None:
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
