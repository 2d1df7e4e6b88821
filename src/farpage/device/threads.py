"""Threads that carry out blocking I/O for an event loop.

Not `run_in_executor`: here a completion costs no lock and no call_soon_threadsafe, and those
that come together wake the loop once, through an eventfd.
"""

from __future__ import annotations

import asyncio
import errno
import os
import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, TypeAlias, TypeVar

from farpage.log import get_logger
from farpage.nbd import eventloop

log = get_logger()

DEFAULT_THREADS = 8
"""So many commands of one device may hang before others wait."""

Job: TypeAlias = tuple[Callable[[int], None], Callable[..., int], tuple[Any, ...]]
Result = TypeVar("Result")


class IoThreads:
    """A pool of threads; made, used and closed in the running event loop's thread."""

    def __init__(self, name: str, count: int = DEFAULT_THREADS) -> None:
        self._loop = asyncio.get_running_loop()
        self._jobs: SimpleQueue[Job | None] = SimpleQueue()
        self._finished: deque[tuple[Callable[[int], None], int]] = deque()
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._woken = False
        eventloop.add_reader(self._loop, self._wake, self._deliver)
        self._threads = [
            threading.Thread(target=self._work, name=f"{name}-{index}", daemon=True) for index in range(count)
        ]
        self._running = count
        self._ended: asyncio.Future[None] = self._loop.create_future()
        for thread in self._threads:
            thread.start()

    def submit(self, done: Callable[[int], None], work: Callable[..., int], *arguments: Any) -> None:
        """Run `work(*arguments)` in a thread, then `done(error)` in the loop.

        `work` returns 0 or an errno, or raises OSError.
        """
        if not self._threads:
            raise RuntimeError("the device is closed")
        self._jobs.put((done, work, arguments))

    async def run(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Run `work(*arguments)` in a thread and return what it returns, or raise what it raises."""
        future: asyncio.Future[Result] = self._loop.create_future()
        results: list[Result] = []
        errors: list[Exception] = []

        def guarded() -> int:
            try:
                results.append(work(*arguments))
            except Exception as error:
                errors.append(error)
            return 0

        def finished(_error: int) -> None:
            if future.done():
                return
            if errors:
                future.set_exception(errors[0])
            else:
                future.set_result(results[0])

        self.submit(finished, guarded)
        return await future

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            done, work, arguments = job
            try:
                error = work(*arguments)
            except OSError as problem:
                error = problem.errno or errno.EIO
            except Exception:
                log.exception("io_thread_failed", work=getattr(work, "__qualname__", repr(work)))
                error = errno.EIO
            # Before `done` runs: the caller may then release its buffer, which no view of may be left.
            del job, work, arguments
            self._finished.append((done, error))
            # Nor may this thread keep what `done` refers to: the loop, once woken, may go on long before it.
            del done
            self._wake_loop()
        self._finished.append((self._thread_ended, 0))
        self._wake_loop()

    def _wake_loop(self) -> None:
        # `_deliver` clears the flag before it looks at the queue, so a completion is never left behind.
        if not self._woken:
            self._woken = True
            os.eventfd_write(self._wake, 1)

    def _thread_ended(self, _error: int) -> None:
        self._running -= 1
        if self._running == 0 and not self._ended.done():
            self._ended.set_result(None)

    def _deliver(self) -> None:
        os.eventfd_read(self._wake)
        self._woken = False
        finished = self._finished
        while finished:
            done, error = finished.popleft()
            try:
                done(error)
            except Exception:
                log.exception("completion_failed")

    async def close(self) -> None:
        """Finish what was submitted and end the threads; it waits as long as a command hangs."""
        threads, self._threads = self._threads, []
        if not threads:
            return
        for _ in threads:
            self._jobs.put(None)
        await self._ended
        for thread in threads:
            thread.join()
        eventloop.remove_reader(self._loop, self._wake)
        os.close(self._wake)
