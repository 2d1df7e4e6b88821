"""Pausing VMs whose memory cannot be reached: QMP's `stop` when no path works, `cont` when one does again.

A guest whose accesses wait sees its clock run on and its watchdogs bite; one that is paused sees nothing.
Nobody but farpage is to use the socket, which is held for as long as the guest is paused: so it is
seen when somebody else lets the guest run meanwhile, and from then on it is his. A guest that was
not running when its last path was lost is left alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import Final

from farpage.attach.qmp import Qmp, QmpFailed
from farpage.errors import FarpageError
from farpage.hypervisor.clients import Clients
from farpage.log import get_logger
from farpage.pager.messages import ClientReport

log = get_logger()

PAUSE_AFTER_SECONDS: Final = 1.0
"""A shorter outage is not worth it."""
CONNECT_SECONDS: Final = 5.0
WATCH_SECONDS: Final = 1.0
RETRY_SECONDS: Final = 1.0
"""Pause after QEMU has not answered; its main loop may itself wait for a page."""


class GuestPause:
    """The pause of one VM."""

    def __init__(
        self,
        socket: str,
        paused: bool,
        remember: Callable[[bool], None],
        alarm: Callable[[str, str], None],
    ) -> None:
        """`paused` is what `remember` was called with last, by this process or an earlier one.

        `remember` is called with True right before the guest is stopped, and with False when it runs again.
        """
        self.paused = paused
        self._socket = socket
        self._remember = remember
        self._alarm = alarm
        self._loop = asyncio.get_running_loop()
        self._outage = False
        self._since_seconds = 0.0
        self._changed = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        if paused:
            self._begin()

    @property
    def busy(self) -> bool:
        """Whether there is an outage, or the guest has yet to go on after one."""
        return self._task is not None

    def outage(self, outage: bool) -> None:
        """Take note that no path works, or one does; returns at once."""
        if outage and not self._outage:
            self._since_seconds = self._loop.time()
        self._outage = outage
        self._changed.set()
        if outage:
            self._begin()

    def _begin(self) -> None:
        if self._task is None:
            self._task = self._loop.create_task(self._keep())
            self._task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._task = None
        if not task.cancelled():
            task.result()
            if self._outage:  # a new one, right at the end of the last
                self._begin()

    async def close(self) -> None:
        """Do nothing any more; a guest that is paused stays so, and `paused` says it."""
        self._outage = False
        if self._task:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    async def settled(self, timeout_seconds: float) -> None:
        """End the outage and wait until the guest runs again, or not any longer."""
        self.outage(False)
        if self._task:
            await asyncio.wait([self._task], timeout=timeout_seconds)

    async def _keep(self) -> None:
        """Hold one outage through, from its beginning or from where an earlier process was."""
        if not self.paused and await self._over_within(PAUSE_AFTER_SECONDS):
            return
        told = False
        while self._outage or self.paused:
            try:
                connection = await Qmp.connect(self._socket, CONNECT_SECONDS)
                try:
                    await self._hold(connection)
                finally:
                    await connection.close()
            except QmpFailed as error:
                log.warning("qmp_failed", socket=self._socket, problem=error.cause)
                if not told:
                    told = True
                    self._alarm("guest_not_controlled", error.cause)
                await self._wait(RETRY_SECONDS)
            else:
                await self._until_over()

    async def _hold(self, connection: Qmp) -> None:
        """Stop the guest unless that is done, wait for a path, and let the guest run.

        :raise QmpFailed: when QEMU is gone or does not do as it is told.
        """
        let_run = asyncio.Event()
        connection.on_event = lambda name: let_run.set() if name == "RESUME" else None
        if not self.paused:
            if (await connection.execute("query-status"))["status"] != "running" or not self._outage:
                return
            # Before, since a guest that nobody knows to be paused would never go on.
            self._set_paused(True)
            await self._stop(connection)
            self._alarm("guest_paused", "no path works; the guest was paused, and will go on by itself")
        await self._until_over(let_run, connection.ended)
        if let_run.is_set():
            self._set_paused(False)
            self._alarm("guest_resumed", "somebody else let the guest run while no path worked")
            return
        if connection.ended.is_set():
            raise QmpFailed(self._socket, "stop", "QEMU closed the connection")
        if (await connection.execute("query-status"))["status"] == "paused":
            await connection.execute("cont")
            self._alarm("guest_resumed", "a path works again; the guest goes on")
        self._set_paused(False)

    async def _stop(self, connection: Qmp) -> None:
        try:
            # However long it takes: a command that is not waited for might be carried out after `cont`.
            await connection.execute("stop")
        except QmpFailed:
            if not connection.ended.is_set():  # refused
                self._set_paused(False)
            raise

    def _set_paused(self, paused: bool) -> None:
        self.paused = paused
        self._remember(paused)

    async def _until_over(self, *ends: asyncio.Event) -> None:
        """Wait for the end of the outage, or for one of the events."""
        while self._outage and not any(end.is_set() for end in ends):
            self._changed.clear()
            waiting = [self._loop.create_task(event.wait()) for event in (self._changed, *ends)]
            try:
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in waiting:
                    task.cancel()
                await asyncio.gather(*waiting, return_exceptions=True)

    async def _over_within(self, seconds: float) -> bool:
        deadline = self._since_seconds + seconds
        while self._outage and self._loop.time() < deadline:
            await self._wait(deadline - self._loop.time())
        return not self._outage

    async def _wait(self, seconds: float) -> None:
        """Pause, for a shorter time when the outage ends or begins meanwhile."""
        self._changed.clear()
        try:
            async with asyncio.timeout(max(seconds, 0.0)):
                await self._changed.wait()
        except TimeoutError:
            return


class GuestPauses:
    """The pauses of all clients that were attached with a QMP socket."""

    def __init__(self, clients: Clients, alarm: Callable[[str, str, str], None]) -> None:
        """`alarm` is called with a client, a kind and a message."""
        self._clients = clients
        self._alarm = alarm
        self._pauses: dict[str, GuestPause] = {}
        self._watching: asyncio.Task[None] | None = None

    def outage(self, client: str, outage: bool) -> None:
        """Take note that no path of a client works, or one does."""
        attached = self._clients.attached.get(client)
        if attached is None or attached.qmp is None:
            return
        if client not in self._pauses:
            if not outage and not attached.guest_paused:
                return
            remember, alarm = partial(self._remember, client), partial(self._alarm, client)
            self._pauses[client] = GuestPause(attached.qmp, attached.guest_paused, remember, alarm)
        self._pauses[client].outage(outage)
        if self._watching is None:
            self._watching = asyncio.get_running_loop().create_task(self._watch())

    def _remember(self, client: str, paused: bool) -> None:
        self._clients.remember_pause(client, paused)

    def resume(self) -> None:
        """Let guests run, once a path works, that an earlier control process has paused."""
        for client, attached in self._clients.attached.items():
            if attached.guest_paused:
                self.outage(client, outage=True)

    async def _watch(self) -> None:
        """Follow the clients' reports: a worker that was lost tells nothing of a path that is back."""
        while self._pauses:
            await asyncio.sleep(WATCH_SECONDS)
            for client, pause in list(self._pauses.items()):
                if client not in self._clients.attached:
                    await self._let_go(client, pause)
                    continue
                report = await self._report(client)
                if report is None:
                    continue
                pause.outage(report.without_path_seconds is not None)
                if not pause.busy:
                    del self._pauses[client]
        self._watching = None

    async def _report(self, client: str) -> ClientReport | None:
        try:
            return await self._clients.report(client)
        except FarpageError as error:
            log.warning("client_not_asked", client=client, problem=error.cause)
            return None

    async def _let_go(self, client: str, pause: GuestPause) -> None:
        """Let the guest of a client run that is paged no more, if it is there still."""
        del self._pauses[client]
        await pause.settled(CONNECT_SECONDS)
        await pause.close()

    async def stop(self) -> None:
        """Let every guest run whose client has all of its memory back, and watch no more."""
        if self._watching:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        for client, pause in list(self._pauses.items()):
            await self._let_go(client, pause)
