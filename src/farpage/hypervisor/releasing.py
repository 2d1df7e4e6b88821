"""Handing clients over to another hypervisor, and taking over what another one has released.

A release, step by step; up to the one that is marked the client is this hypervisor's, and whatever fails or
is killed leaves it here, as it was:

    run folder: a release is under way               whoever recovers the client now keeps it frozen
    worker: answer no access, page everything out    `farpage.pager.releasing`
    VIOS: flush the volume, keep the page table      `farpage.hypervisor.handovers`
    definition: released                             <- from here on it is nobody's
    worker: let go, with the memory registered       accesses wait for good, they never read zeros
    run folder: forget the client

Who finds the record after a crash asks the definition how far it came, and goes on from there (`settle`).
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

from farpage import handover
from farpage.attach import qmp
from farpage.definition.model import Release
from farpage.definition.releasing import refusal
from farpage.errors import FarpageError
from farpage.hypervisor.attached import Attached
from farpage.hypervisor.attaching import QMP_SECONDS
from farpage.hypervisor.clients import Clients
from farpage.hypervisor.definitions import DefinitionKeeper
from farpage.hypervisor.detaching import Detaching
from farpage.hypervisor.errors import ClientAttached, ClientMoving, ClientNotAttached, ClientRuns
from farpage.hypervisor.handovers import Handovers
from farpage.kernel.process import read_status
from farpage.log import get_logger
from farpage.pager.messages import LetGo, PagedOut, PageOut, Thaw
from farpage.pager.statefile import StateFile

log = get_logger()

SETTLE_SECONDS = 0.5
STOP_TRIES = 10
STOP_PAUSE_SECONDS = 0.02
"""A signal to stop takes effect some time after kill(2) has returned."""
STOPPED_STATES = "Tt"
"""proc_pid_stat(5): stopped by a signal, or by a tracer."""


class Releases:
    """Releases and adoptions of one hypervisor."""

    def __init__(
        self,
        clients: Clients,
        detaching: Detaching,
        keeper: DefinitionKeeper,
        handovers: Handovers,
        *,
        make_reachable: Callable[[str], Awaitable[None]],
    ) -> None:
        """`make_reachable` begins to move a claimed client whose volume is out of this hypervisor's reach."""
        self._make_reachable = make_reachable
        self._clients = clients
        self._detaching = detaching
        self._keeper = keeper
        self._handovers = handovers

    # Released

    async def release(self, client: str, qmp_socket: str | None, *, force: bool) -> None:
        """Bring every page of a client to its devices and let go of it, for another hypervisor to adopt.

        :raise ClientNotAttached: only an attached client has pages to release.
        :raise ClientElsewhere: another hypervisor has claimed it: what is here is cut off from its pages.
        :raise ClientRuns: without `force`, when its process is not stopped.
        :raise FarpageError: it cannot be done; the client goes on here as before.
        """
        async with self._clients.only(client, "release"):
            # Another hypervisor may have changed it.
            await self._keeper.load()
            record = self._clients.records.of(client)
            attached = self._clients.attached.get(client)
            if attached is None:
                if record.released:
                    raise refusal(client, record.released, self._clients.records.hypervisor)
                raise ClientNotAttached(client)
            self._clients.records.must_be_ours(client, record)
            if client in self._keeper.current.moves:
                raise ClientMoving(client)
            socket = qmp_socket or attached.qmp
            was_running = await _stop(client, attached, socket, force=force)
            try:
                await self._release(client, attached)
            except FarpageError:
                if was_running and socket and client in self._clients.attached:
                    await qmp.execute(socket, "cont", timeout_seconds=QMP_SECONDS)
                raise

    async def _release(self, client: str, attached: Attached) -> None:
        self._mark(attached, releasing=True)
        try:
            await self._page_out_and_record(client, attached)
        except FarpageError:
            if not await self._is_recorded(client, attached):
                await self._thaw(client, attached)
                raise
        await self._let_go(client, attached)
        self._handovers.counts["released"] += 1
        log.info("client_released", client=client)

    async def _page_out_and_record(self, client: str, attached: Attached) -> None:
        """Do both, once more where the worker is replaced in between: the next one has a newer epoch."""
        while True:
            order = PageOut(client=client)
            paged_out = await self._clients.ask(client, attached, "page_out", order, PagedOut)
            worker = attached.worker
            try:
                await self._record(client, attached, paged_out.epoch)
                return
            except FarpageError:
                if attached.worker is worker and attached.paged.is_set():
                    raise

    async def _record(self, client: str, attached: Attached, epoch: int) -> None:
        """Keep the page table at the VIOS, then say in the definition that the client is released."""
        records = self._clients.records
        record = records.of(client)
        volume = record.volumes[0].name
        encoded = await asyncio.to_thread(_encoded, volume, epoch, attached.record.releases, attached.state)
        await self._handovers.store(volume, record, epoch, encoded)
        digest = handover.check(encoded, whose=client).digest
        released = Release(hypervisor=records.hypervisor, epoch=epoch, digest=digest)
        await records.release(client, record.owner, epoch, released)

    async def _is_recorded(self, client: str, attached: Attached) -> bool:
        """Tell whether the definition says, after all, that the client is released by this hypervisor."""
        try:
            await self._keeper.load()
        except FarpageError as error:
            log.warning("release_not_looked_up", client=client, problem=error.cause)
        return self._clients.records.is_released_by(client, _owner(attached))

    async def _thaw(self, client: str, attached: Attached) -> None:
        """Let the client go on as before."""
        if self._clients.attached.get(client) is not attached:
            return
        self._mark(attached, releasing=False)
        try:
            await self._clients.command(client, attached, "thaw", Thaw(client=client))
        except FarpageError as error:
            log.warning("client_not_thawed", client=client, problem=error.cause)
            await self._detaching.process_gone(client, held=True)

    async def _let_go(self, client: str, attached: Attached) -> None:
        try:
            await self._clients.command(client, attached, "let_go", LetGo(client=client))
        except FarpageError as error:
            log.info("client_gone_meanwhile", client=client, problem=error.cause)
        if client in self._clients.attached:
            self._clients.let_go(client)

    def _mark(self, attached: Attached, *, releasing: bool) -> None:
        changes = {"releasing": releasing, "releases": attached.record.releases + releasing}
        self._clients.keep(attached, attached.record.model_copy(update=changes))

    async def take_back_unfinished(self) -> None:
        """Undo releases that were given up, and that some VIOS has stored all the same."""
        for client, attached in list(self._clients.attached.items()):
            record = self._keeper.current.clients.get(client)
            if record and record.released and not attached.record.releasing and not attached.attaching:
                try:
                    await self._clients.records.take_back(client, _owner(attached))
                except FarpageError as error:
                    log.warning("release_not_taken_back", client=client, problem=error.cause)

    # After a crash

    async def settle_all(self) -> None:
        """Finish or undo the releases that an earlier control process has begun."""
        for client, attached in list(self._clients.attached.items()):
            if attached.record.releasing:
                async with self._clients.only(client, "release"):
                    await self._settle(client, attached)

    async def _settle(self, client: str, attached: Attached) -> None:
        while self._keeper.unproven and self._clients.attached.get(client) is attached:  # noqa: ASYNC110
            await asyncio.sleep(SETTLE_SECONDS)
        if self._clients.attached.get(client) is not attached:
            return
        if self._clients.records.is_released_by(client, _owner(attached)):
            await self._let_go(client, attached)
        else:
            await self._thaw(client, attached)

    # Adopted

    async def adopt(self, client: str, *, force: bool) -> None:
        """Take a released client; its next attachment begins with what was released.

        :raise ClientMissing: there is none.
        :raise ClientNotReleased: somebody has it.
        :raise ClientReleased: without `force`, when another hypervisor has adopted it.
        """
        async with self._clients.only(client, "adopt"):
            if client in self._clients.attached:
                raise ClientAttached(client, self._clients.attached[client].memory.pid)
            # Another hypervisor has just changed it.
            await self._keeper.load()
            await self._clients.records.adopt(client, force=force)
            # Its page table comes with the volume then.
            await self._make_reachable(client)
        self._handovers.counts["adopted"] += 1
        log.info("client_adopted_released", client=client)


def _owner(attached: Attached) -> str:
    assert attached.record.order is not None
    return attached.record.order.owner


async def _stop(client: str, attached: Attached, socket: str | None, *, force: bool) -> bool:
    """See to it that a client does not run; returns whether a VM was stopped for that.

    :raise ClientRuns: without `force`, when nobody can.
    """
    if attached.guest_paused:
        return False
    if socket is not None:
        status = await qmp.execute(socket, "query-status", timeout_seconds=QMP_SECONDS)
        if status["running"]:
            await qmp.execute(socket, "stop", timeout_seconds=QMP_SECONDS)
        return bool(status["running"])
    tries = 0 if force else STOP_TRIES
    while tries and not await asyncio.to_thread(_is_stopped, attached.memory.pid):
        tries -= 1
        if not tries:
            raise ClientRuns(client, attached.memory.pid)
        await asyncio.sleep(STOP_PAUSE_SECONDS)
    return False


def _is_stopped(pid: int) -> bool:
    try:
        threads = [int(entry.name) for entry in Path(f"/proc/{pid}/task").iterdir()]
        return all(read_status(pid, thread).state in STOPPED_STATES for thread in threads)
    except (OSError, ProcessLookupError):
        return True


def _encoded(volume: str, epoch: int, attempt: int, state: StateFile) -> bytes:
    from farpage.hypervisor.tables import table_of

    return table_of(volume, epoch, attempt, state)
