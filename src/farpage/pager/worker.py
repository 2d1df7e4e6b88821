"""A data worker: one process, one event loop, the page tables and volumes of its clients.

It is started by the hypervisor's control process with one end of a `Channel` as descriptor. When the control
process is gone it works on for as long as it has clients; the next control process adopts it. One that has
none looks after those of other workers meanwhile.
"""

from __future__ import annotations

import asyncio
import math
import socket
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from farpage.attach.memory import ClientMemory
from farpage.errors import FarpageError
from farpage.kernel.ending import until_gone
from farpage.log import get_logger
from farpage.message import Message
from farpage.nbd import eventloop
from farpage.pager import volumes
from farpage.pager.buffers import BufferPool
from farpage.pager.channel import Handing
from farpage.pager.client import PagedClient, VolumeFenced
from farpage.pager.control import ControlLink
from farpage.pager.directreads import DirectReader
from farpage.pager.errors import ClientExited, NotAttached, PagesLost, ScrubUnderWay
from farpage.pager.lane import open_hub
from farpage.pager.memory import CannotPoison, ClientGone, PagedMemory
from farpage.pager.messages import (
    AddReplica,
    Attach,
    ClientLost,
    Detach,
    GoOver,
    HandedOver,
    HandOver,
    Leave,
    LetGo,
    Nothing,
    OutageChanged,
    PagedOut,
    PageOut,
    Pong,
    Query,
    Rejoin,
    RetireReplica,
    ScrubEnded,
    SetLimit,
    StartScrub,
    StopScrub,
    Thaw,
    WorkerClients,
)
from farpage.pager.received import received
from farpage.pager.releasing import PATIENCE_SECONDS, without_path
from farpage.pager.reports import report_of
from farpage.pager.statefile import StateFile
from farpage.pager.table import PageTable
from farpage.pager.tidings import StoredOwnership, Tidings
from farpage.volume.connector import ConnectNbd, Connector
from farpage.volume.deaths import ServerDeaths
from farpage.volume.errors import ClientFenced
from farpage.volume.lease import Leases

log = get_logger()

REPAIR_POLL_SECONDS = 0.01
"""Repairs of single pages are over at once, and there are hardly any."""
MEMORY_SECONDS = 30.0
"""So long may the end of a process take from that of its memory, which is the longer the more it has."""


@dataclass
class _Attached:
    """A client and what of it is this worker's own."""

    paged: PagedClient
    client: ClientMemory
    memory: PagedMemory
    state: StateFile
    order: Attach
    inherited: bool = False
    """Taken over without a control process, which has yet to be told."""
    opening: asyncio.Task[None] | None = None
    """The volume of a recovered client, which is paged before a path is found."""
    detaching: asyncio.Task[None] | None = None
    releasing: asyncio.Task[None] | None = None


class Worker:
    """The clients of this process."""

    def __init__(self, endpoint: socket.socket, folder: Path) -> None:
        self.done = asyncio.Event()
        """There is neither a control process nor a client any more."""
        self._loop = asyncio.get_running_loop()
        self._buffers = BufferPool()
        self._hub = eventloop.wait_with(self._loop, open_hub)
        deaths = ServerDeaths()
        self._serving = ConnectNbd(deaths)
        self._borrowing = ConnectNbd(deaths, DirectReader())
        self._leases = Leases(self._serving)
        self._clients: dict[str, _Attached] = {}
        self._attaching: dict[str, asyncio.Event] = {}
        self._run_folder = folder.parent
        self._inheriting: asyncio.Task[None] | None = None
        self._control = ControlLink(endpoint, folder, on_request=self._request, on_alone=self._become_heir)

    def _look_whether_done(self) -> None:
        idle = not self._clients and not self._attaching and self._inheriting is None
        if self._control.alone and idle:
            self.done.set()

    def _become_heir(self) -> None:
        """The control process has gone: look after the clients of workers that are gone as well."""
        if not self._clients and not self._attaching and self._inheriting is None:
            self._inheriting = self._loop.create_task(self._wait_as_heir())

    async def _wait_as_heir(self) -> None:
        # Not sooner: how to take a client's memory from its process takes long to load, and few need it.
        from farpage.pager.heir import Heir

        control = self._control
        met = control.met
        try:
            await Heir(self._run_folder, self._inherit).wait(lambda: control.alone and control.met == met)
        finally:
            self._inheriting = None
            if control.alone and control.met != met:
                self._become_heir()
            self._look_whether_done()

    async def _inherit(self, order: Attach, client: ClientMemory, state: StateFile) -> None:
        await self._attach(order, client, state)
        self._clients[order.client].inherited = True

    async def _request(self, method: str, parameters: Any, descriptors: list[int]) -> Message | Handing:
        match method:
            case "attach":
                order = Attach.model_validate(parameters)
                return await self._attach(order, *received(order, descriptors))
            case "detach":
                return await self._detach(Detach.model_validate(parameters))
            case "page_out":
                return await self._page_out(PageOut.model_validate(parameters).client)
            case "let_go":
                await self._release(LetGo.model_validate(parameters).client)
            case "thaw":
                await self._thaw(Thaw.model_validate(parameters).client)
            case "hand_over":
                return await self._hand_over(HandOver.model_validate(parameters).client)
            case "leave":
                leave = Leave.model_validate(parameters)
                await self._attached(leave.client).paged.space.volume.leave(leave.vios)
            case "add_replica":
                await self._add_replica(AddReplica.model_validate(parameters))
            case "retire_replica":
                await self._retire_replica(RetireReplica.model_validate(parameters))
            case "go_over":
                await self._go_over(GoOver.model_validate(parameters))
            case _:
                return self._answer(method, parameters)
        return Nothing()

    def _answer(self, method: str, parameters: Any) -> Message:
        """Answer a request that waits for nothing."""
        match method:
            case "ping":
                return Pong(compiled=self._hub is not None)
            case "set_limit":
                order = SetLimit.model_validate(parameters)
                self._attached(order.client).paged.set_limit(order.limit_pages)
            case "start_scrub":
                return self._start_scrub(StartScrub.model_validate(parameters))
            case "stop_scrub":
                self._attached(StopScrub.model_validate(parameters).client).paged.stop_scrub()
            case "rejoin":
                rejoin = Rejoin.model_validate(parameters)
                self._attached(rejoin.client).paged.space.volume.rejoin(rejoin.vios, rejoin.reason)
            case "query":
                client = Query.model_validate(parameters).client
                return report_of(client, self._attached(client).paged)
            case "clients":
                return WorkerClients(clients=(*self._clients, *self._attaching))
            case _:
                raise AssertionError(f"unknown request {method!r}")
        return Nothing()

    def _start_scrub(self, order: StartScrub) -> Nothing:
        ended = ScrubEnded(client=order.client)
        on_ended = partial(self._control.tell, "scrub_ended", ended)
        if not self._attached(order.client).paged.start_scrub(order.rate_bytes, on_ended):
            raise ScrubUnderWay(order.client)
        return Nothing()

    async def _add_replica(self, order: AddReplica) -> None:
        """Take a replica in; a volume of one replica becomes a mirror for it."""
        while volumes.is_repairing(self._attached(order.client).paged.space.volume):  # noqa: ASYNC110
            await asyncio.sleep(REPAIR_POLL_SECONDS)
        attached = self._attached(order.client)
        space = attached.paged.space
        events = Tidings(self._control, order.client, attached.order.owner)
        attached.paged.use(
            volumes.with_replica(
                space.volume,
                order.replica,
                order=attached.order,
                events=events,
                store=attached.state,
                leases=self._leases,
                connector=self._connector(attached.order),
            )
        )
        others = [spec for spec in attached.order.replicas if spec.device != order.replica.device]
        attached.order = attached.order.model_copy(update={"replicas": (*others, order.replica)})

    async def _retire_replica(self, order: RetireReplica) -> None:
        """Take a replica out; answered when nothing is sent to it any more."""
        attached = self._attached(order.client)
        await volumes.retire(attached.paged.space.volume, order.device)
        left = tuple(spec for spec in attached.order.replicas if spec.device != order.device)
        attached.order = attached.order.model_copy(update={"replicas": left})

    async def _go_over(self, order: GoOver) -> None:
        """Use the volume where it is now; what it is used as before stays if that cannot be."""
        attached = self._attached(order.client)
        await volumes.go_over(attached.paged.space.volume, order)
        attached.order = attached.order.model_copy(update={"replicas": (order.replica,)})

    def _connector(self, order: Attach) -> Connector:
        return self._borrowing if order.direct_reads else self._serving

    def _attached(self, client: str) -> _Attached:
        if client not in self._clients:
            raise NotAttached(client)
        return self._clients[client]

    async def _hand_over(self, client: str) -> Handing:
        """Tell a new control process what it needs to know of a client."""
        if client in self._attaching:
            await self._attaching[client].wait()
        attached = self._attached(client)
        space, memory = attached.paged.space, attached.client
        inherited, attached.inherited = attached.inherited, False
        return Handing(
            HandedOver(
                order=attached.order,
                epoch=space.volume.epoch,
                limit_pages=space.limit.pages,
                inherited=inherited,
            ),
            (memory.uffd.fileno(), memory.memfd, attached.state.fileno(), memory.pidfd),
        )

    async def _attach(self, order: Attach, client: ClientMemory, state: StateFile) -> Nothing:
        ended = self._attaching[order.client] = asyncio.Event()
        try:
            return await self._attach_now(order, client, state)
        finally:
            del self._attaching[order.client]
            ended.set()
            self._look_whether_done()

    async def _attach_now(self, order: Attach, client: ClientMemory, state: StateFile) -> Nothing:
        epoch = max(order.epoch, state.epoch) + 1 if order.recover else order.epoch
        ownership = StoredOwnership(order.owner, epoch, state)
        events = Tidings(self._control, order.client, order.owner)
        volume = volumes.make(order, ownership, events, state, self._leases, connector=self._connector(order))
        if not order.recover:
            try:
                await volume.open(order.open_timeout_seconds)
                try:
                    client.register()
                except FarpageError:
                    await volume.abandon()
                    raise
            except FarpageError:
                client.close_descriptors()
                state.close()
                raise
        memory = PagedMemory(client)
        gone = partial(self._client_gone, order.client)
        paged = PagedClient(
            memory,
            PageTable(order.pages, state.table_storage),
            volume,
            order.limit_pages,
            self._buffers,
            alarm=events.alarm,
            on_gone=gone,
            on_outage=partial(self._outage, order.client),
            no_path_timeout_seconds=order.no_path_timeout_seconds,
            repair_mark=state.repair_mark,
            ram_tier_percent=order.ram_tier_percent,
            hub=self._hub,
        )
        attached = self._clients[order.client] = _Attached(paged, client, memory, state, order)
        self._loop.add_reader(client.pidfd, gone)
        if not order.recover:
            if order.handed_over:
                paged.start_handed_over()
                state.foreign = False
            else:
                paged.start()
            return Nothing()
        # Before a path is found, which may take long: meanwhile pages that need none are served.
        attached.opening = self._loop.create_task(volume.open(math.inf))
        events.epoch_raised(epoch)
        try:
            if state.foreign:
                memory.release(0, order.pages)
                state.foreign = False
            if order.frozen:
                paged.freeze.begin()
            paged.recover()
        except ClientGone:
            gone()
            raise ClientExited(order.client) from None
        return Nothing()

    async def _page_out(self, client: str) -> PagedOut:
        attached = self._attached(client)
        if attached.detaching is not None:
            raise NotAttached(client)
        if attached.releasing is None:
            attached.releasing = self._loop.create_task(self._page_all_out(client, attached))
        # A control process that was started anew joins what an older one has begun.
        releasing = attached.releasing
        try:
            await asyncio.shield(releasing)
        except ClientGone:
            raise ClientExited(client) from None
        finally:
            if releasing.done() and attached.releasing is releasing:
                attached.releasing = None
        return PagedOut(epoch=attached.paged.space.volume.epoch)

    async def _page_all_out(self, client: str, attached: _Attached) -> None:
        if attached.opening is not None:
            # Before that it is not known what epoch the volume of a recovered client comes to.
            try:
                async with asyncio.timeout(PATIENCE_SECONDS):
                    await asyncio.shield(attached.opening)
            except TimeoutError:
                raise without_path(client) from None
        await attached.paged.page_out(client)

    async def _thaw(self, client: str) -> None:
        """Let a frozen client go on; what pages it out for an older control process has ended on return."""
        attached = self._attached(client)
        attached.paged.freeze.end()
        if attached.releasing is not None:
            await asyncio.wait([attached.releasing])
            attached.releasing = None

    async def _release(self, client: str) -> None:
        """Let go of a frozen client, whose memory stays registered."""
        attached = self._attached(client)
        assert attached.paged.freeze.frozen
        self._forget(client)
        await self._let_go(attached)

    async def _detach(self, order: Detach) -> Nothing:
        attached = self._attached(order.client)
        if order.discard:
            self._forget(order.client)
            with suppress(ClientGone, OSError):
                attached.memory.unregister()
            await self._let_go(attached)
            return Nothing()
        ownership = attached.paged.space.volume.ownership
        if ownership.fenced:
            raise ClientFenced(order.client, ownership.fenced)
        if attached.detaching is None:
            attached.detaching = self._loop.create_task(self._page_in(order.client, attached))
        # A control process that was started anew joins the detachment that an older one has begun.
        try:
            await asyncio.shield(attached.detaching)
        except ClientGone:
            raise ClientExited(order.client) from None
        return Nothing()

    def _outage(self, client: str) -> None:
        """Tell the control process of what the client's volume lacks, or has again."""
        if client in self._clients:
            paged = self._clients[client].paged
            outage = OutageChanged(
                client=client,
                without_path=paged.outage.without_path_seconds is not None and not paged.space.cut_off,
                device_full=paged.space.full,
            )
            self._control.tell("outage", outage)

    async def _page_in(self, client: str, attached: _Attached) -> None:
        try:
            await attached.paged.detach()
        except VolumeFenced as fenced:
            attached.detaching = None
            raise ClientFenced(client, str(fenced)) from None
        except CannotPoison:
            attached.detaching = None
            raise PagesLost(client) from None
        self._forget(client)
        await self._let_go(attached)

    def _forget(self, client: str) -> None:
        attached = self._clients.pop(client, None)
        if attached:
            attached.paged.abandon()
            self._loop.remove_reader(attached.client.pidfd)

    def _client_gone(self, client: str) -> None:
        """Let go of a client whose memory has ended, or its process."""
        attached = self._clients.get(client)
        if attached is None:
            return
        self._forget(client)
        log.info("client_exited", client=client)
        task = self._loop.create_task(self._bury(client, attached))
        task.add_done_callback(lambda done: done.result())

    async def _bury(self, client: str, attached: _Attached) -> None:
        # Its memory may be all that has ended yet, and who is told looks whether its process has.
        lives = False
        try:
            async with asyncio.timeout(MEMORY_SECONDS):
                await until_gone(attached.client.pidfd)
        except TimeoutError:
            lives = True
        await self._let_go(attached)
        self._control.tell("client_gone", ClientLost(client=client, lives=lives))

    async def _let_go(self, attached: _Attached) -> None:
        """Close what is left of a client that was forgotten."""
        if attached.opening is not None:
            attached.opening.cancel()
            await asyncio.gather(attached.opening, return_exceptions=True)
        await attached.paged.space.volume.abandon()
        attached.memory.close()
        if self._control.alone:
            attached.state.remove()
        else:
            attached.state.close()
        self._look_whether_done()

    def close(self) -> None:
        """Leave no socket behind."""
        self._control.close()
        self._leases.close()


async def run(descriptor: int, folder: Path) -> None:
    """Work until there is neither a control process nor a client.

    The first control process is at the other end of `descriptor`; later ones find a socket in `folder`.
    """
    worker = Worker(socket.socket(fileno=descriptor), folder)
    await worker.done.wait()
    worker.close()
