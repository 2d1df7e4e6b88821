"""The data workers: started by the control process or taken over from an earlier one, watched, replaced."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import struct
import subprocess
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from farpage.errors import FarpageError
from farpage.hypervisor.errors import NoWorker
from farpage.kernel.process import ProcessIdentity, identify
from farpage.log import get_logger
from farpage.pager.channel import Channel, Handler
from farpage.pager.control import socket_path
from farpage.pager.launch import SOCKET_SUFFIX, LaunchedWorker, launch
from farpage.pager.messages import Nothing, Pong, WorkerClients

log = get_logger()

STOP_SECONDS = 5.0

TICK_SECONDS = 0.25
"""A worker is pinged so often."""

START_SECONDS = 60.0
"""So long a worker may take to answer for the first time."""

ADOPT_SECONDS = 2.0
"""So long a worker that is found running may take to answer; one that hangs is killed."""

_CREDENTIALS = struct.Struct("3i")


class WorkerProcess:
    """One data worker and the clients that it was given."""

    def __init__(self, index: int, pid: int, pidfd: int, child: subprocess.Popen[bytes] | None) -> None:
        self.index = index
        self.pid = pid
        self.identity: ProcessIdentity = identify(pid)
        self.clients: set[str] = set()
        self.lost = False
        self.reason = "ended"
        """Why it was lost."""
        self.answered = False
        """It has answered at least once, so it is up."""
        self.compiled: bool | None = None
        """Whether it has the compiled loops; None before it has told."""
        self.dead = asyncio.Event()
        """Its process is gone: it touches no client's memory any more."""
        self.channel: Channel
        self._pidfd = pidfd
        self._child = child
        self._ping: asyncio.Task[None] | None = None
        self._silent_ticks = 0
        asyncio.get_running_loop().add_reader(pidfd, self._ended)

    def _ended(self) -> None:
        if not self.dead.is_set():
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            if self._child is not None:
                self._child.wait()
            self.dead.set()

    def kill(self) -> None:
        """End the process for good, also one that is stopped; see `dead` for when it has."""
        if not self.dead.is_set():
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def tick(self, timeout_seconds: float) -> bool:
        """Ping it, unless it has yet to answer; returns whether it has been silent for too long."""
        if self._ping is None or self._ping.done():
            self._ping = asyncio.get_running_loop().create_task(self._pinged())
            self._silent_ticks = 0
            return False
        self._silent_ticks += 1
        return self._silent_ticks * TICK_SECONDS > (timeout_seconds if self.answered else START_SECONDS)

    def forgive(self) -> None:
        """Begin to count its silence anew: it was this process that was late."""
        self._silent_ticks = 0

    async def _pinged(self) -> None:
        with suppress(FarpageError):
            self.compiled = (await self.channel.call("ping", Nothing(), Pong)).compiled
            self.answered = True

    async def stop(self) -> None:
        """Close the channel, which ends the worker, and wait for it; it stays with clients that it has."""
        self.channel.close()
        if self._ping is not None:
            await asyncio.gather(self._ping, return_exceptions=True)
        if self.clients and not self.lost:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            if self._child is not None:
                # It is nobody's child from now on.
                self._child.returncode = 0
            return
        try:
            async with asyncio.timeout(STOP_SECONDS):
                await self.dead.wait()
        except TimeoutError:
            self.kill()
            await self.dead.wait()


class WorkerPool:
    """All data workers of a hypervisor, and one spare that takes the place of a lost one."""

    def __init__(
        self,
        on_event: Callable[[str, Any], None],
        *,
        on_request: Handler,
        timeout_seconds: float,
        launched: Iterable[LaunchedWorker] = (),
    ) -> None:
        """A worker that does not answer for `timeout_seconds` is killed; those `launched` are used first."""
        self.on_lost: Callable[[WorkerProcess], None] = lambda worker: None
        """Called when a worker is given up."""
        self.on_dead: Callable[[WorkerProcess], None] = lambda worker: None
        """Called when the process of a lost worker is surely gone."""
        self.on_tick: Callable[[], None] = lambda: None
        """Called each `TICK_SECONDS`; it has to raise nothing."""
        self.workers: list[WorkerProcess] = []
        self.spare: WorkerProcess | None = None
        self._on_event = on_event
        self._on_request = on_request
        self._timeout_seconds = timeout_seconds
        self._launched = list(launched)
        self._folder = Path()
        self._count = 0
        """So many workers are wanted."""
        self._stopping = False
        self._tasks: set[asyncio.Task[None]] = set()
        self._watch: asyncio.Task[None] | None = None

    # Starting and taking over

    async def adopt(self, folder: Path) -> dict[str, WorkerProcess]:
        """Connect to the workers that an earlier control process has left; returns which client is whose.

        A worker that does not answer is killed. On return there is no other worker than those adopted.
        """
        self._folder = folder
        own = {f"{launched.child.pid}{SOCKET_SUFFIX}" for launched in self._launched}
        found = await asyncio.gather(
            *(self._adopt(path) for path in _sockets(folder) if path.name not in own)
        )
        owners: dict[str, WorkerProcess] = {}
        for worker in found:
            if worker is not None:
                worker.index = len(self.workers)
                self.workers.append(worker)
                owners.update(dict.fromkeys(worker.clients, worker))
        return owners

    async def _adopt(self, path: Path) -> WorkerProcess | None:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            connection.connect(socket_path(folder, path.name))
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
            pid, user, _ = _CREDENTIALS.unpack(credentials)
            if user not in (os.geteuid(), 0) or f"{pid}{SOCKET_SUFFIX}" != path.name:
                raise ConnectionRefusedError
            worker = WorkerProcess(0, pid, os.pidfd_open(pid), None)
        except OSError:  # nobody listens any more
            connection.close()
            _unlink(path)
            return None
        finally:
            os.close(folder)
        worker.channel = self._channel(worker, connection)
        try:
            answer = await worker.channel.call(
                "clients", Nothing(), WorkerClients, timeout_seconds=ADOPT_SECONDS
            )
        except FarpageError as error:
            log.error("worker_not_adopted", pid=pid, problem=str(error))
            worker.lost = True
            worker.kill()
            worker.channel.close()
            await worker.dead.wait()
            _unlink(path)
            return None
        worker.answered = True
        worker.clients.update(answer.clients)
        log.info("worker_adopted", pid=pid, clients=len(worker.clients))
        return worker

    def start(self, count: int) -> None:
        """Start workers until there are `count`, and watch them.

        :raise OSError: when a process cannot be started.
        """
        for idle in [worker for worker in self.workers if not worker.clients]:
            if len(self.workers) > count:
                self._take_out(idle)
        while len(self.workers) < count:
            self.workers.append(self._spawn(len(self.workers)))
        self._count = len(self.workers)
        self._watch = asyncio.get_running_loop().create_task(self._watch_all())

    def _take_out(self, idle: WorkerProcess) -> None:
        """Keep a worker that was found running as the spare, or end it."""
        self.workers.remove(idle)
        for index, worker in enumerate(self.workers):
            worker.index = index
        if self.spare is None:
            self.spare, idle.index = idle, -1
        else:
            idle.lost = True
            self._start(idle.stop())

    def start_spare(self) -> None:
        """Start the spare, after what is more urgent."""
        if self.spare is None and not self._stopping:
            try:
                self.spare = self._spawn(-1)
            except OSError as error:
                log.error("spare_worker_not_started", problem=str(error))

    def _spawn(self, index: int) -> WorkerProcess:
        launched = self._launched.pop(0) if self._launched else launch(self._folder)
        child = launched.child
        worker = WorkerProcess(index, child.pid, os.pidfd_open(child.pid), child)
        worker.channel = self._channel(worker, launched.connection)
        return worker

    def _channel(self, worker: WorkerProcess, connection: socket.socket) -> Channel:
        def closed() -> None:
            if worker.lost or self._stopping:
                return
            worker.lost = True
            log.error("worker_lost", index=worker.index, pid=worker.pid, reason=worker.reason)
            self.on_lost(worker)
            self._start(self._replace(worker))

        return Channel(connection, on_event=self._on_event, on_request=self._on_request, on_closed=closed)

    # Watching and replacing

    async def _watch_all(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            await asyncio.sleep(TICK_SECONDS)
            late = loop.time() - began > 2 * TICK_SECONDS
            for worker in self.all():
                if worker.lost:
                    continue
                if late:
                    worker.forgive()
                if worker.tick(self._timeout_seconds):
                    worker.reason = f"did not answer for {self._timeout_seconds:g} s and was killed"
                    worker.kill()
                    worker.channel.close()
            if len(self.workers) < self._count:
                with suppress(OSError):  # told when a worker was lost
                    self._refill()
                    self.start_spare()
            self.on_tick()

    async def _replace(self, lost: WorkerProcess) -> None:
        """Put another worker in the place of a lost one, once that is surely gone."""
        # A channel can end before its process; two pagers of one client would undo each other's work.
        lost.kill()
        await lost.dead.wait()
        _unlink(self._folder / f"{lost.pid}{SOCKET_SUFFIX}")
        if self._stopping:
            return
        if lost is self.spare:
            self.spare = None
        elif lost in self.workers:
            self.workers.remove(lost)
            try:
                self._refill()
            except OSError as error:
                log.error("worker_not_replaced", index=lost.index, problem=str(error))
        self.on_dead(lost)
        self.start_spare()

    def _refill(self) -> None:
        """Put the spare, or else a new worker, in each place that is free.

        :raise OSError: when a process cannot be started; it is tried again each `TICK_SECONDS`.
        """
        while len(self.workers) < self._count:
            index = min(set(range(self._count)) - {worker.index for worker in self.workers})
            worker = self.spare if self.spare and not self.spare.lost else self._spawn(index)
            self.spare = None if worker is self.spare else self.spare
            worker.index = index
            self.workers.insert(index, worker)
            log.info("worker_replaced", index=index, pid=worker.pid)

    def least_loaded(self) -> WorkerProcess:
        """Return the worker with the fewest clients.

        :raise NoWorker: none is left.
        """
        working = [worker for worker in self.workers if not worker.lost]
        if not working:
            raise NoWorker(len(self.workers))
        return min(working, key=lambda worker: (len(worker.clients), not worker.answered))

    def _start(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def all(self) -> list[WorkerProcess]:
        """Return the workers and the spare."""
        return [*self.workers, *([self.spare] if self.spare else [])]

    async def stop(self) -> None:
        """End all workers, but one whose clients could not be detached."""
        self._stopping = True
        if self._watch is not None:
            self._watch.cancel()
        for task in tuple(self._tasks):
            await asyncio.wait([task])
        await asyncio.gather(*(worker.stop() for worker in self.all()))


def _sockets(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"*{SOCKET_SUFFIX}"))


def _unlink(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
