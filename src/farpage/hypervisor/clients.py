"""The clients of one hypervisor: created, attached to a worker, detached, deleted.

One request about a client runs at a time. Whatever fails half-way is undone before the error is
answered, so no request leaves a half-made client.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

import structlog

from farpage.attach.memory import ClientKind, ClientMemory
from farpage.attach.messages import AttachRequest
from farpage.attach.process import close_process, open_process
from farpage.definition import rules
from farpage.definition.errors import ClientExists
from farpage.definition.model import PAGE_BYTES, ClientRecord, Definition, Redundancy
from farpage.errors import FarpageError
from farpage.hypervisor.definitions import DefinitionKeeper, NoVios
from farpage.hypervisor.errors import (
    ClientAttached,
    ClientBusy,
    ClientNotAttached,
    DetachByOwner,
    MemoryTooLarge,
    NoDirectAccess,
)
from farpage.hypervisor.model import Attachment, ClientAttach, ClientCreate
from farpage.hypervisor.pool import MemoryPool
from farpage.hypervisor.settings import HypervisorSettings
from farpage.hypervisor.vioses import Vios
from farpage.hypervisor.workers import WorkerPool, WorkerProcess
from farpage.kernel.memory import create_memfd
from farpage.pager.channel import PeerGone
from farpage.pager.messages import Attach, ClientReport, Detach, EndpointSpec, Nothing, Query, SetLimit
from farpage.pager.table import ENTRY_BYTES
from farpage.vios.model import VolumeCreate
from farpage.volume.resolve import Direct, NoAccess, ThroughSecond, resolve

log = structlog.get_logger()

OPEN_TIMEOUT_SECONDS = 10.0
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
        keeper: DefinitionKeeper,
        vioses: Mapping[str, Vios],
        workers: WorkerPool,
        pool: MemoryPool,
    ) -> None:
        self.attached: dict[str, Attached] = {}
        self._settings = settings
        self._keeper = keeper
        self._vioses = vioses
        self._workers = workers
        self._pool = pool
        self._busy: dict[str, _Request] = {}
        self._leftovers: dict[str, int] = {}
        """Clients that nobody wants and that a VIOS may still know or learn of, with the revision before."""
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

    def record(self, client: str) -> ClientRecord:
        """Look a client up.

        :raise ClientMissing: there is none.
        """
        return rules.client_of(self._keeper.current, client)

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

        def edit(definition: Definition) -> Definition:
            return rules.add_client(
                definition,
                wanted.name,
                memory_bytes=wanted.memory_bytes,
                hypervisor=self._settings.name,
                entitlement_bytes=wanted.entitlement_bytes,
                weight=wanted.weight,
                limit_bytes=wanted.limit_bytes,
                redundancy=wanted.redundancy,
                vios_redundancy=wanted.vios_redundancy,
                provisioned_bytes=self._provisioned(),
            )

        try:
            definition = await self._keeper.change(edit)
        except ClientExists:
            if wanted.name not in self._leftovers:
                raise
            await self._delete(wanted.name)
            definition = await self._keeper.change(edit)
        except NoVios:
            # One that hangs may still store it.
            self._leftovers[wanted.name] = self._keeper.current.revision
            raise
        paths = rules.paths(definition, wanted.name)
        volume = VolumeCreate(name=paths[0].volume, device=paths[0].device, size_bytes=paths[0].size_bytes)
        try:
            await self._on_any_vios([path.vios for path in paths], partial(Vios.create_volume, wanted=volume))
        except FarpageError:
            await self._discard(wanted.name)
            raise
        self._leftovers.pop(wanted.name, None)

    def _provisioned(self) -> dict[str, int]:
        return {
            device.id: device.provisioned_bytes for vios in self._vioses.values() for device in vios.devices
        }

    async def _on_any_vios(self, names: list[str], request: Callable[[Vios], Awaitable[None]]) -> None:
        """Send a request to the first VIOS that answers it.

        :raise FarpageError: the refusal of the first that answers; NoVios when none does.
        """
        problems: list[str] = []
        for name in names:
            try:
                await request(self._vioses[name])
            except FarpageError as error:
                if error.code != "unreachable":
                    raise
                problems.append(error.cause)
            else:
                return
        raise NoVios("; ".join(problems) or "the device is reached by none")

    async def delete(self, client: str) -> None:
        """Remove a client that is not attached, and its volume.

        :raise ClientAttached: it is.
        """
        async with self._only(client, "delete"):
            await self._delete(client)

    async def _delete(self, client: str) -> None:
        self.record(client)
        if client in self.attached:
            raise ClientAttached(client, self.attached[client].memory.pid)
        paths = rules.paths(self._keeper.current, client)
        # Under an epoch of its own, so that nobody who had the volume open still writes.
        request = partial(Vios.delete_volume, name=paths[0].volume, epoch=await self._claim(client))
        try:
            await self._on_any_vios([path.vios for path in paths], request)
        except FarpageError as error:
            if error.code != "volume_not_found":
                raise
        await self._keeper.change(lambda now: rules.remove_client(now, client))

    async def _discard(self, client: str) -> None:
        """Delete a client that was made for a request which failed or has ended, now or later."""
        try:
            await self._delete(client)
        except FarpageError as error:
            log.warning("client_not_deleted", client=client, problem=error.cause)
            self._leftovers[client] = self._keeper.current.revision

    async def clear_leftovers(self) -> None:
        """Delete what could not be deleted, or may have come up again, while VIOS were away."""
        for client in sorted(self._leftovers.keys() - self._busy.keys()):
            if client in self._keeper.current.clients:
                async with self._only(client, "delete"):
                    self._leftovers.pop(client, None)
                    await self._discard(client)
            elif self._all_beyond(self._leftovers[client]):
                self._leftovers.pop(client, None)

    def _all_beyond(self, revision: int) -> bool:
        """Tell whether every VIOS stores a later revision, so that none can take a change of that one."""
        stored = [vios.health.definition_revision for vios in self._vioses.values() if vios.health]
        return len(stored) == len(self._vioses) and min(stored) > revision

    # Attaching

    async def attach_process(self, client: str, wanted: ClientAttach) -> None:
        """Page the memory of a running process; a client that does not exist is created.

        :raise FarpageError: the process goes on as before then.
        """
        async with self._only(client, "attach"):
            if client in self.attached:
                raise ClientAttached(client, self.attached[client].memory.pid)
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
        created = client in self._leftovers or client not in self._keeper.current.clients
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
                await self._discard(client)
            raise

    async def _attach_existing(
        self, client: str, memory: ClientMemory, limit_bytes: int | None, *, ephemeral: bool
    ) -> None:
        record = self.record(client)
        if record.memory_bytes < memory.length_bytes:
            raise MemoryTooLarge(client, record.memory_bytes, memory.length_bytes)
        limit = self._pool.limit_for(memory.length_bytes, limit_bytes or record.limit_bytes)
        self._pool.give(client, limit)
        try:
            epoch = await self._claim(client)
            endpoints = self._endpoints(client, record)
            worker = self._workers.least_loaded()
        except FarpageError:
            self._pool.limits.pop(client)
            raise
        pages = memory.length_bytes // PAGE_BYTES
        table = create_memfd(f"farpage-table-{client}", pages * ENTRY_BYTES)
        order = Attach(
            client=client,
            volume=record.volumes[0].name,
            epoch=epoch,
            kind=memory.kind,
            pid=memory.pid,
            pages=pages,
            start_address=memory.start_address,
            memfd_offset_bytes=memory.memfd_offset_bytes,
            limit_pages=limit // PAGE_BYTES,
            endpoints=endpoints,
            path_timeout_seconds=self._settings.path_timeout_seconds,
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

    async def _claim(self, client: str) -> int:
        """Raise the client's epoch above every one that a VIOS knows of, and return it."""
        record = self.record(client)
        known = record.epoch
        for vios in self._vioses.values():
            try:
                volumes = await vios.volumes()
            except FarpageError:
                continue  # its volumes are fenced when it is reached again
            known = max([known, *(v.epoch for v in volumes if v.name == record.volumes[0].name)])
        definition = await self._keeper.change(lambda now: rules.raise_epoch(now, client, known + 1))
        return definition.clients[client].epoch

    def _endpoints(self, client: str, record: ClientRecord) -> tuple[EndpointSpec, ...]:
        """List the ways to the volume; clients begin with different VIOS, to share them."""
        device = record.volumes[0].replicas[0].device
        access = resolve(self._keeper.current, client, device, self._vioses.keys())
        if not isinstance(access, Direct):
            raise NoDirectAccess(client, self._device_name(device), _why(access))
        paths = access.paths
        turn = len(self.attached) % len(paths)
        ordered = [*paths[turn:], *paths[:turn]]
        if record.redundancy is Redundancy.NONE:
            ordered = ordered[:1]
        return tuple(
            EndpointSpec(vios=path.vios, address=path.data[0], device=self._device_name(path.device))
            for path in ordered
        )

    def _device_name(self, identifier: str) -> str:
        return self._keeper.current.devices[identifier].name

    async def epoch_raised(self, client: str, epoch: int) -> None:
        """Record in the definition that a client's volume was opened under a newer epoch."""

        def edit(definition: Definition) -> Definition:
            record = definition.clients.get(client)
            if record is None or record.epoch >= epoch:
                return definition
            return rules.raise_epoch(definition, client, epoch)

        try:
            await self._keeper.change(edit)
        except FarpageError as error:
            # The VIOS that opened the volume has the epoch stored; the definition follows later.
            log.warning("epoch_not_recorded", client=client, epoch=epoch, problem=error.cause)

    # Limits and reports

    def limit_for(self, client: str, limit_bytes: int) -> int:
        """Return what a limit comes to for a client: whole pages, at most its memory.

        :raise InvalidInput: when it is too small to run in.
        """
        record, attached = self.record(client), self.attached.get(client)
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
                await self._keeper.change(lambda now: rules.set_limit(now, client, limit))
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

    # Detaching

    async def detach(self, client: str) -> None:
        """Page everything back into a process and let go of it.

        :raise ClientNotAttached: nothing pages it.
        :raise DetachByOwner: it is a region.
        """
        self.record(client)
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
                await self._discard(client)

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


def _why(access: ThroughSecond | NoAccess) -> str:
    if isinstance(access, NoAccess):
        return "; ".join(access.reasons)
    return f"only device {access.second_device} with the same volume can be reached"
