"""Clients whose data worker or control process was killed: found again, and given to a worker that works.

What was written down before each step (`farpage.hypervisor.runfolder`) and what is seen in the client's
process decide, in this order:

| found | decision |
| --- | --- |
| a data worker pages it, its own or that one's heir (`farpage.pager.heir`) | that goes on; it is adopted |
| its process has ended | nothing is left but to forget it |
| its memory is registered with its userfaultfd | pages may be out: recovered in another worker |
| its memory is not registered | it was not paged yet, or no more: the rest is undone |
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any

from farpage.attach.memory import ClientKind, ClientMemory
from farpage.attach.process import close_orphan, close_process
from farpage.attach.retake import MemoryRecord, retake
from farpage.definition.model import PAGE_BYTES
from farpage.errors import FarpageError
from farpage.hypervisor.attached import Attached
from farpage.hypervisor.clients import Clients
from farpage.hypervisor.detaching import Detaching
from farpage.hypervisor.replicas import ClientReplicas
from farpage.hypervisor.unstarted import UnstartedReleases
from farpage.hypervisor.workers import WorkerPool, WorkerProcess
from farpage.kernel.ending import until_gone
from farpage.kernel.process import ProcessIdentity, is_gone, open_identified
from farpage.log import get_logger
from farpage.pager.attachmentrecord import AttachmentRecord
from farpage.pager.channel import PeerError, PeerGone
from farpage.pager.messages import Attach, EpochRaised, HandedOver, HandOver, Nothing
from farpage.pager.received import received
from farpage.pager.statefile import StateFile, StateFileUnusable

log = get_logger()

RETRY_SECONDS = 0.1
LONGEST_RETRY_SECONDS = 1.0
HAND_OVER_SECONDS = 15.0
"""An attachment that is under way takes at most the time-out for opening its volume."""


class RecoveryCounts:
    """How often, and how long it took; for the metrics."""

    def __init__(self) -> None:
        self.workers_lost = 0
        self.adopted = 0
        self.recovered = 0
        self.recovery_seconds = 0.0
        """Sum over all recoveries, each from when the loss was noticed until the client was paged again."""


class Recovery:
    """Gives clients a new worker; needs no VIOS for that."""

    def __init__(
        self,
        clients: Clients,
        workers: WorkerPool,
        replicas: ClientReplicas,
        detaching: Detaching,
        unstarted: UnstartedReleases,
        *,
        alarm: Callable[[str, str, str], None],
        recovered: Callable[[str, Attached], Coroutine[Any, Any, None]],
    ) -> None:
        """`recovered` begins again what a lost worker was doing beside its client."""
        self.counts = RecoveryCounts()
        self._ended_regions: list[str] = []
        self._epochs: list[EpochRaised] = []
        self._definition_known = False
        self._clients = clients
        self._workers = workers
        self._replicas = replicas
        self._detaching = detaching
        self._unstarted = unstarted
        self._alarm = alarm
        self._on_recovered = recovered
        self._tasks: set[asyncio.Task[None]] = set()
        self._resuming: set[asyncio.Task[None]] = set()
        self._noticed: dict[str, float] = {}
        workers.on_lost = self.worker_lost
        workers.on_dead = self.worker_dead

    # A worker was lost

    def worker_lost(self, worker: WorkerProcess) -> None:
        """Hold off requests about its clients."""
        self.counts.workers_lost += 1
        now = asyncio.get_running_loop().time()
        for client in sorted(worker.clients) or [""]:
            waits = "; the client's accesses wait until another has it" if client else ""
            self._alarm(client, "worker_lost", f"data worker {worker.index} {worker.reason}{waits}")
        for client in worker.clients:
            if attached := self._clients.attached.get(client):
                self._noticed.setdefault(client, now)
                attached.paged.clear()

    def worker_dead(self, worker: WorkerProcess) -> None:
        """Give its clients to others: nobody but they will touch their memory now."""
        for client in sorted(worker.clients):
            attached = self._clients.attached.get(client)
            if attached and not attached.attaching:
                self._start(self.recover(client, attached))

    async def recover(self, client: str, attached: Attached) -> None:
        """Have a client paged by some worker, however often that takes; returns when it is, or has ended."""
        pause = RETRY_SECONDS
        while self._clients.attached.get(client) is attached:
            if is_gone(attached.memory.pidfd):
                await self._detaching.process_gone(client)
                return
            if not await asyncio.to_thread(_is_registered, attached.memory):
                await self._detaching.finish(client, attached)
                return
            try:
                await self._give(client, attached)
            except FarpageError as error:
                log.warning("client_not_recovered_yet", client=client, problem=error.cause)
                attached.worker.clients.discard(client)
                if isinstance(error, PeerGone):
                    await attached.worker.dead.wait()
                await asyncio.sleep(pause)
                pause = min(pause * 2, LONGEST_RETRY_SECONDS)
            else:
                self._recovered(client, attached)
                return

    async def _give(self, client: str, attached: Attached) -> None:
        order = attached.record.order
        assert order is not None
        attached.worker.clients.discard(client)
        worker = attached.worker = self._workers.least_loaded()
        order = order.model_copy(
            update={
                "recover": True,
                "frozen": attached.record.releasing,
                "limit_pages": attached.limit_bytes // PAGE_BYTES,
                "replicas": self._replicas.for_next_worker(client, attached, order),
            }
        )
        record = attached.record.model_copy(update={"order": order, "worker": worker.identity})
        self._clients.keep(attached, record)
        attached.served = order.replicas
        # While `attaching`, it is seen to here if this worker ends too.
        attached.attaching = True
        worker.clients.add(client)
        try:
            await worker.channel.call("attach", order, Nothing, attached.descriptors())
        finally:
            attached.attaching = False

    def _recovered(self, client: str, attached: Attached) -> None:
        now = asyncio.get_running_loop().time()
        seconds = now - self._noticed.pop(client, now)
        self.counts.recovered += 1
        self.counts.recovery_seconds += seconds
        self._paged(attached)
        self._start(self._on_recovered(client, attached))
        where = f"data worker {attached.worker.index}"
        log.info("client_recovered", client=client, worker=attached.worker.index, seconds=round(seconds, 3))
        self._alarm(client, "worker_recovered", f"{where} pages the client after {seconds * 1e3:.0f} ms")

    def _paged(self, attached: Attached) -> None:
        """Take note that a client is paged: its pages may change, and be no more what was released."""
        if attached.record.handover is not None:
            self._clients.keep(attached, attached.record.model_copy(update={"handover": None}))
        attached.paged.set()

    # The control process was lost

    async def resume(self, owners: dict[str, WorkerProcess]) -> None:
        """Go on with the clients of an earlier control process; `owners` are the workers that were adopted.

        On return each is adopted, or has been let go, or its recovery is under way.
        """
        began = asyncio.get_running_loop().time()
        outcomes = await asyncio.gather(
            *(
                self._resume(record, owners.get(record.client), began)
                for record in self._clients.run.records()
            ),
            return_exceptions=True,
        )
        for outcome in outcomes:
            if isinstance(outcome, BaseException):
                log.error("client_not_resumed", problem=repr(outcome), exc_info=outcome)

    async def _resume(self, record: AttachmentRecord, owner: WorkerProcess | None, began: float) -> None:
        client = record.client
        if record.order is not None:
            self._clients.records.claimed_before(client, record.order.epoch, record.order.owner)
        if owner is not None and record.order is not None:
            try:
                await self._adopt(record, owner)
            except FarpageError as error:
                log.warning("client_not_adopted", client=client, problem=error.cause)
                owner.clients.discard(client)
                if not isinstance(error, PeerError):  # it has ended, or hangs
                    owner.kill()
                    await owner.dead.wait()
            else:
                return
        if record.worker and record.worker.pid not in [worker.pid for worker in self._workers.workers]:
            await _end_stranger(record.worker)
        if record.memory is None or record.order is None:
            await self._undo_intent(record)
            return
        self._noticed[client] = began
        await self._retake(record, record.memory, record.order)

    async def _adopt(self, record: AttachmentRecord, worker: WorkerProcess) -> None:
        client = record.client
        handed, descriptors = await worker.channel.take(
            "hand_over", HandOver(client=client), HandedOver, timeout_seconds=HAND_OVER_SECONDS
        )
        order, remembered = handed.order, record.memory
        memory, state = received(
            order, descriptors, remote_uffd=remembered.remote_uffd if remembered else None
        )
        # Written again meanwhile, if the worker had a replica's state to record.
        record = self._clients.run.record(client) or record
        # What the worker goes by may be lifted, while a device is full.
        limit_pages = record.order.limit_pages if record.order else handed.limit_pages
        attached = Attached(record, memory, state, worker, limit_pages * PAGE_BYTES)
        attached.served = order.replicas
        self._clients.take_in(attached)
        self._paged(attached)
        self.counts.adopted += 1
        self._epochs.append(EpochRaised(client=client, epoch=handed.epoch, owner=order.owner))
        log.info("client_adopted", client=client, worker=worker.pid)
        if handed.inherited:
            self.counts.recovered += 1
            self._start(self._on_recovered(client, attached))
            found = (
                f"data worker {worker.index} pages the client since its worker ended, without being told to"
            )
            self._alarm(client, "worker_recovered", found)
        with suppress(ProcessLookupError):
            if order.kind is ClientKind.REGION and not memory.is_registered():
                # Closed by its process while there was no control process to be told.
                await self._detaching.discard(client, attached)

    async def _undo_intent(self, record: AttachmentRecord) -> None:
        """Undo an attachment that had not come to a worker: at most a userfaultfd is left in the process."""
        if record.kind is ClientKind.PROCESS:
            try:
                await asyncio.to_thread(close_orphan, record.process, record.uffds_before)
            except FarpageError as error:
                log.warning("userfaultfd_not_closed", pid=record.process.pid, problem=error.cause)
        self._ended(record)

    async def _retake(self, record: AttachmentRecord, memory_record: MemoryRecord, order: Attach) -> None:
        try:
            memory = retake(memory_record)
        except FarpageError as error:
            self._clients.unrecovered[record.client] = record
            self._alarm(record.client, "not_recovered", str(error))
            self._start(self._retake_later(record, memory_record, order))
            return
        try:
            registered = memory is not None and memory.is_registered()
        except ProcessLookupError:
            registered = False
        if memory is None:
            self._ended(record)
        elif not registered:
            with suppress(FarpageError):
                await asyncio.to_thread(close_process, memory)
            self._ended(record)
        else:
            await self._recover_retaken(record, memory, order)

    async def _retake_later(
        self, record: AttachmentRecord, memory_record: MemoryRecord, order: Attach
    ) -> None:
        await asyncio.sleep(LONGEST_RETRY_SECONDS)
        del self._clients.unrecovered[record.client]
        await self._retake(record, memory_record, order)

    async def _recover_retaken(self, record: AttachmentRecord, memory: ClientMemory, order: Attach) -> None:
        client = record.client
        try:
            state = StateFile.open(self._clients.run.state_path(client))
        except StateFileUnusable as error:
            if record.releasing:
                # Its worker was told to let go, which it is when the release is recorded, and had nobody left
                # to tell that it has. The memory stays registered: accesses wait, they never read zeros.
                memory.close_descriptors()
                self._clients.run.remove(client)
                return
            # What is where is not known any more. Never zeros: its accesses wait until its process is ended.
            self._clients.unrecovered[client] = record
            self._alarm(client, "not_recovered", str(error))
            self._start(self._let_go_at_end(record, memory))
            return
        worker = self._workers.least_loaded()
        attached = Attached(record, memory, state, worker, order.limit_pages * PAGE_BYTES)
        self._clients.take_in(attached)
        task = self._start(self.recover(client, attached))
        self._resuming.add(task)
        task.add_done_callback(self._resuming.discard)

    async def _let_go_at_end(self, record: AttachmentRecord, memory: ClientMemory) -> None:
        """Forget a client that cannot be recovered when its process ends."""
        try:
            await until_gone(memory.pidfd)
        finally:
            memory.close_descriptors()
        del self._clients.unrecovered[record.client]
        self._ended(record)

    def _ended(self, record: AttachmentRecord) -> None:
        if record.handover is None:
            self._clients.run.remove(record.client)
        else:
            self._unstarted.owe(record)
            if self._definition_known:
                self._start(self.reconcile())
        if record.made_for_it and record.kind is ClientKind.REGION:
            self._ended_regions.append(record.client)
            if self._definition_known:
                self._start(self.reconcile())

    async def reconcile(self) -> None:
        """Record what happened while there was no control process, now that the definition is known."""
        self._definition_known = True
        epochs, self._epochs = self._epochs, []
        for raised in epochs:
            await self._clients.records.epoch_raised(raised)
        await self._unstarted.put_back_all()
        ended, self._ended_regions = self._ended_regions, []
        for client in ended:
            await self._clients.discard_unattached(client)

    # Tasks

    async def settled(self, timeout_seconds: float) -> None:
        """Wait until the clients that were found are paged again, but not longer than that."""
        if self._resuming:
            await asyncio.wait(self._resuming, timeout=timeout_seconds)

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def stop(self) -> None:
        """Begin nothing more."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _is_registered(memory: ClientMemory) -> bool:
    """Tell whether there is anything to page: a process that is detached must not be touched again."""
    try:
        return memory.kind is ClientKind.REGION or memory.is_registered()
    except ProcessLookupError:
        return True  # which is found out as with any other process that ends


async def _end_stranger(process: ProcessIdentity) -> None:
    """Kill a data worker that nobody can talk to any more, and wait until it is gone."""
    pidfd = open_identified(process)
    if pidfd is None:
        return
    try:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        await until_gone(pidfd)
    finally:
        os.close(pidfd)
