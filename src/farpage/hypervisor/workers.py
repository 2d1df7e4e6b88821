"""The data workers: started by the control process, each at its end of a channel."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import Callable
from typing import Any

import structlog

from farpage.hypervisor.errors import NoWorker
from farpage.pager.channel import Channel

log = structlog.get_logger()

STOP_SECONDS = 5.0


class WorkerProcess:
    """One data worker and the number of clients that it was given."""

    def __init__(self, index: int, process: asyncio.subprocess.Process, channel: Channel) -> None:
        self.index = index
        self.channel = channel
        self.clients: set[str] = set()
        self.lost = False
        self._process = process

    @property
    def pid(self) -> int:
        """Process number."""
        return self._process.pid

    async def stop(self) -> None:
        """Close the channel, which ends the worker, and wait for it."""
        self.channel.close()
        try:
            await asyncio.wait_for(self._process.wait(), STOP_SECONDS)
        except TimeoutError:
            self._process.kill()
            await self._process.wait()


class WorkerPool:
    """All data workers of a hypervisor."""

    def __init__(
        self, on_event: Callable[[str, Any], None], on_worker_lost: Callable[[WorkerProcess], None]
    ) -> None:
        self.workers: list[WorkerProcess] = []
        self._on_event = on_event
        self._on_worker_lost = on_worker_lost
        self._stopping = False
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self, count: int) -> None:
        """Start `count` workers.

        :raise OSError: when a process cannot be started.
        """
        for index in range(count):
            self.workers.append(await self._spawn(index))

    async def _spawn(self, index: int) -> WorkerProcess:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-m",
                "farpage.pager",
                str(theirs.fileno()),
                pass_fds=(theirs.fileno(),),
                stdin=asyncio.subprocess.DEVNULL,
            )
        worker: WorkerProcess

        def closed() -> None:
            worker.lost = True
            if not self._stopping:
                log.error("worker_lost", index=index, pid=process.pid)
                self._on_worker_lost(worker)
                task = asyncio.get_running_loop().create_task(self._replace(worker))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

        worker = WorkerProcess(index, process, Channel(ours, on_event=self._on_event, on_closed=closed))
        return worker

    async def _replace(self, lost: WorkerProcess) -> None:
        """Start a worker for clients to come in the place of one that ended; its own stay with it."""
        await lost.stop()
        try:
            worker = await self._spawn(lost.index)
        except OSError as error:
            log.error("worker_not_replaced", index=lost.index, problem=str(error))
            return
        self.workers[self.workers.index(lost)] = worker
        log.info("worker_replaced", index=worker.index, pid=worker.pid)

    def least_loaded(self) -> WorkerProcess:
        """Return the worker with the fewest clients.

        :raise NoWorker: none is left.
        """
        working = [worker for worker in self.workers if not worker.lost]
        if not working:
            raise NoWorker(len(self.workers))
        return min(working, key=lambda worker: len(worker.clients))

    async def stop(self) -> None:
        """End all workers."""
        self._stopping = True
        for task in tuple(self._tasks):
            await asyncio.wait([task])
        await asyncio.gather(*(worker.stop() for worker in self.workers))
