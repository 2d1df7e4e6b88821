"""What queues of the kernel have in common that an event loop fills and empties."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from typing import Generic, Protocol, TypeAlias, TypeVar

from farpage.log import get_logger
from farpage.nbd import eventloop

log = get_logger()


class Queue(Protocol):
    """A queue of the kernel; a token tells each command from the others."""

    def fileno(self) -> int:
        """Return a descriptor that is readable while there are completions."""

    def completions(self) -> list[tuple[int, int]]:
        """Take what has finished, as `(token, result)`."""

    def close(self) -> None:
        """Free the queue, in which nothing is in flight."""


Ended: TypeAlias = Callable[[int], None]
"""Gets the result."""

AnyQueue = TypeVar("AnyQueue", bound=Queue)
Kept = TypeVar("Kept")
"""What is kept of a command while the kernel has its memory."""


class KernelQueue(Generic[AnyQueue, Kept]):
    """Commands in flight; made, used and closed in the running event loop's thread.

    Those that are begun together go to the kernel in one system call.
    """

    def __init__(self, queue: AnyQueue) -> None:
        self._queue = queue
        self._loop = asyncio.get_running_loop()
        self._kept: dict[int, tuple[Ended, Kept]] = {}
        """By token."""
        self._next_token = 0
        self._submitting = False
        self._closed = False
        self._idle: asyncio.Future[None] | None = None
        eventloop.add_reader(self._loop, queue.fileno(), self._deliver)

    def _begun(self, ended: Ended, kept: Kept) -> None:
        """Take note of a command that was queued under the next token."""
        self._kept[self._next_token] = (ended, kept)
        self._next_token += 1
        if not self._submitting:
            self._submitting = True
            eventloop.defer(self._loop, self._submit)

    def push(self) -> None:
        """Start what was begun now, and not when the loop comes to it."""
        if self._submitting:
            self._submit()

    def _submit(self) -> None:
        """Start what was begun."""
        raise NotImplementedError

    def _deliver(self) -> None:
        self._end(self._queue.completions())

    def _end(self, ended: Iterable[tuple[int, int]]) -> None:
        for token, result in ended:
            done, _ = self._kept.pop(token)
            try:
                done(result)
            except Exception:
                log.exception("completion_failed")
        if self._idle is not None and not self._kept and not self._idle.done():
            self._idle.set_result(None)

    async def close(self) -> None:
        """Wait for what is in flight, as long as the device hangs, and free the queue."""
        if self._kept:
            self._idle = self._loop.create_future()
            await self._idle
        self._closed = True
        eventloop.remove_reader(self._loop, self._queue.fileno())
        self._queue.close()
