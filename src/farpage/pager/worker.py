"""A data worker: one process, one event loop, the page tables and volumes of its clients.

It is started by the hypervisor's control process with one end of a `Channel` as descriptor and
works until that closes.
"""

from __future__ import annotations

import asyncio
import mmap
import os
import socket
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import structlog
from pydantic import BaseModel

from farpage.address import parse_address
from farpage.attach.memory import ClientMemory
from farpage.errors import ExitStatus, FarpageError
from farpage.kernel.userfaultfd import Userfaultfd
from farpage.pager.buffers import BufferPool
from farpage.pager.channel import Channel
from farpage.pager.client import PagedClient
from farpage.pager.memory import ClientGone, PagedMemory
from farpage.pager.messages import (
    AlarmRaised,
    Attach,
    ClientLost,
    ClientReport,
    CounterReport,
    Detach,
    EpochRaised,
    FailoverReport,
    Leave,
    Nothing,
    OutageChanged,
    PathReport,
    Query,
    Rejoin,
    ReplicaSpec,
    ScrubReport,
    SetLimit,
    StartScrub,
    StopScrub,
)
from farpage.pager.table import ENTRY_BYTES, PAGE_BYTES, STATE_NAMES, PageTable
from farpage.volume.connector import Endpoint, connect_nbd
from farpage.volume.lease import Leases
from farpage.volume.multipath import MultipathVolume
from farpage.volume.ownership import Ownership
from farpage.volume.paged import PagedVolume

log = structlog.get_logger()


@dataclass(eq=False)
class ClientExited(FarpageError):
    """The client's process ended during a request."""

    code = "client_exited"
    template = "client {client!r} exited meanwhile"
    remedy = "nothing is left to be done: its memory is gone"
    exit_status = ExitStatus.NOT_FOUND
    client: str


@dataclass(eq=False)
class NotAttached(FarpageError):
    """The worker does not page that client."""

    code = "not_attached"
    template = "client {client!r} is not attached"
    remedy = "attach it with 'farpage client attach {client} --pid PID'"
    exit_status = ExitStatus.CONFLICT
    client: str


@dataclass(eq=False)
class ScrubUnderWay(FarpageError):
    """One scrub of a client at a time."""

    code = "scrub_under_way"
    template = "client {client!r} is being scrubbed already"
    remedy = (
        "watch it with 'farpage client show {client}', or end it with 'farpage client scrub {client} --stop'"
    )
    exit_status = ExitStatus.CONFLICT
    client: str


class _Events:
    """Passes what a client's volume has to tell on to the control process."""

    def __init__(self, channel: Channel, client: str, owner: str) -> None:
        self._channel = channel
        self._client = client
        self._owner = owner

    def epoch_raised(self, epoch: int) -> None:
        raised = EpochRaised(client=self._client, epoch=epoch, owner=self._owner)
        self._channel.tell("epoch_raised", raised)

    def alarm(self, kind: str, message: str) -> None:
        log.warning("alarm", client=self._client, kind=kind, message=message)
        self._channel.tell("alarm", AlarmRaised(client=self._client, kind=kind, message=message))


@dataclass
class _Attached:
    """A client and what of it is this worker's own."""

    paged: PagedClient
    memory: PagedMemory
    pidfd: int


class Worker:
    """The clients of this process."""

    def __init__(self, endpoint: socket.socket) -> None:
        self.closed = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._buffers = BufferPool()
        self._leases = Leases(connect_nbd)
        self._clients: dict[str, _Attached] = {}
        self._channel = Channel(endpoint, on_request=self._request, on_closed=self.closed.set)

    async def _request(self, method: str, parameters: Any, descriptors: list[int]) -> BaseModel:
        match method:
            case "attach":
                return await self._attach(Attach.model_validate(parameters), descriptors)
            case "detach":
                return await self._detach(Detach.model_validate(parameters))
            case "set_limit":
                order = SetLimit.model_validate(parameters)
                self._attached(order.client).paged.set_limit(order.limit_pages)
            case "start_scrub":
                return self._start_scrub(StartScrub.model_validate(parameters))
            case "stop_scrub":
                self._attached(StopScrub.model_validate(parameters).client).paged.stop_scrub()
            case "leave":
                leave = Leave.model_validate(parameters)
                await self._attached(leave.client).paged.space.volume.leave(leave.vios)
            case "rejoin":
                rejoin = Rejoin.model_validate(parameters)
                self._attached(rejoin.client).paged.space.volume.rejoin(rejoin.vios, rejoin.reason)
            case "query":
                return self._report(Query.model_validate(parameters).client)
            case _:
                raise AssertionError(f"unknown request {method!r}")
        return Nothing()

    def _start_scrub(self, order: StartScrub) -> Nothing:
        if not self._attached(order.client).paged.start_scrub(order.rate_bytes):
            raise ScrubUnderWay(order.client)
        return Nothing()

    def _attached(self, client: str) -> _Attached:
        if client not in self._clients:
            raise NotAttached(client)
        return self._clients[client]

    async def _attach(self, order: Attach, descriptors: list[int]) -> Nothing:
        uffd, memfd, table, pidfd = descriptors
        # The map keeps the table's file alive.
        table_map = mmap.mmap(table, order.pages * ENTRY_BYTES)
        os.close(table)
        client = ClientMemory(
            kind=order.kind,
            pid=order.pid,
            pidfd=pidfd,
            uffd=Userfaultfd(uffd),
            memfd=memfd,
            start_address=order.start_address,
            length_bytes=order.pages * PAGE_BYTES,
            memfd_offset_bytes=order.memfd_offset_bytes,
            remote_uffd=None,
        )
        events = _Events(self._channel, order.client, order.owner)
        try:
            volume = await self._open_volume(order, events)
            try:
                client.register()
            except FarpageError:
                await volume.abandon()
                raise
        except FarpageError:
            client.close_descriptors()
            raise
        memory = PagedMemory(client)
        gone = partial(self._client_gone, order.client)
        paged = PagedClient(
            memory,
            PageTable(order.pages, memoryview(table_map)),
            volume,
            order.limit_pages,
            self._buffers,
            alarm=events.alarm,
            on_gone=gone,
            on_outage=partial(self._outage, order.client),
            no_path_timeout_seconds=order.no_path_timeout_seconds,
        )
        self._clients[order.client] = _Attached(paged, memory, pidfd)
        self._loop.add_reader(pidfd, gone)
        paged.start()
        return Nothing()

    async def _open_volume(self, order: Attach, events: _Events) -> PagedVolume:
        (replica,) = order.replicas
        volume = MultipathVolume(
            order.volume,
            order.pages * PAGE_BYTES,
            Ownership(order.owner, order.epoch),
            _endpoints(replica),
            connector=connect_nbd,
            events=events,
            device=replica.device,
            device_name=replica.name,
            leases=self._leases,
            path_timeout_seconds=order.path_timeout_seconds,
        )
        await volume.open(order.open_timeout_seconds)
        return volume

    async def _detach(self, order: Detach) -> Nothing:
        attached = self._attached(order.client)
        if order.discard:
            self._forget(order.client)
            with suppress(ClientGone, OSError):
                attached.memory.unregister()
            await attached.paged.space.volume.abandon()
            attached.memory.close()
            return Nothing()
        try:
            await attached.paged.detach()
        except ClientGone:
            raise ClientExited(order.client) from None
        self._forget(order.client)
        attached.memory.close()
        return Nothing()

    def _outage(self, client: str) -> None:
        """Tell the control process of what the client's volume lacks, or has again."""
        if client in self._clients:
            paged = self._clients[client].paged
            outage = OutageChanged(
                client=client,
                without_path=paged.outage.without_path_seconds is not None,
                device_full=paged.space.full,
            )
            self._channel.tell("outage", outage)

    def _forget(self, client: str) -> None:
        attached = self._clients.pop(client, None)
        if attached:
            attached.paged.abandon()
            self._loop.remove_reader(attached.pidfd)

    def _client_gone(self, client: str) -> None:
        """Let go of a client whose process has exited."""
        attached = self._clients.get(client)
        if attached is None:
            return
        self._forget(client)
        log.info("client_exited", client=client)
        task = self._loop.create_task(self._bury(client, attached))
        task.add_done_callback(lambda done: done.result())

    async def _bury(self, client: str, attached: _Attached) -> None:
        await attached.paged.space.volume.abandon()
        attached.memory.close()
        self._channel.tell("client_gone", ClientLost(client=client))

    def _report(self, client: str) -> ClientReport:
        paged = self._attached(client).paged
        space = paged.space
        return ClientReport(
            client=client,
            pages_by_state=dict(zip(STATE_NAMES, space.table.counts, strict=True)),
            limit_pages=space.limit.pages,
            epoch=space.volume.epoch,
            fenced=space.volume.ownership.fenced,
            stalled_faults=paged.faults.stalled,
            without_path_seconds=paged.outage.without_path_seconds,
            device_full=space.full,
            scrub=ScrubReport(**asdict(paged.scrub.progress)) if paged.scrub else None,
            counters=CounterReport(**asdict(space.counters)),
            paths=tuple(
                PathReport(
                    vios=path.endpoint.vios,
                    device=path.endpoint.device,
                    state=path.state,
                    reason=path.reason,
                    epoch=path.epoch,
                    in_flight=path.in_flight,
                    held=path.held,
                    losses=path.losses,
                    since_seconds=path.since_seconds,
                )
                for path in space.volume.status()
            ),
            failovers=tuple(FailoverReport(**asdict(record)) for record in space.volume.failovers.records),
        )

    async def stop(self) -> None:
        """Let go of everything when the control process is gone."""
        for client in list(self._clients):
            attached = self._clients[client]
            self._forget(client)
            await attached.paged.space.volume.abandon()
        self._leases.close()


def _endpoints(replica: ReplicaSpec) -> list[Endpoint]:
    return [Endpoint(spec.vios, parse_address(spec.address), replica.name) for spec in replica.endpoints]


async def run(descriptor: int) -> None:
    """Work until the control process closes the channel at `descriptor`."""
    worker = Worker(socket.socket(fileno=descriptor))
    await worker.closed.wait()
    await worker.stop()
