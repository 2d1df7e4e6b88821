"""Writes without threads: kernel AIO whose completions the event loop delivers."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from typing import Final, NamedTuple

from farpage.errors import Unsupported
from farpage.kernel.aio import AsyncWrites
from farpage.log import get_logger
from farpage.nbd import eventloop

log = get_logger()

WRITES_IN_FLIGHT: Final = 256
"""Further ones are written by threads."""


class Write(NamedTuple):
    """A write: its `data` is kept while the kernel reads it."""

    data: memoryview
    refusal: Callable[[], int]
    """Asked right before the system call that starts the writes of a turn, once for all that come with it; an
    errno refuses them."""
    done: Callable[[int], None]
    """Gets the bytes written or a negative errno."""


class AsyncWriter:
    """Direct writes of one device; made, used and closed in the running event loop's thread.

    Writes that are started together go to the kernel in one system call.
    """

    def __init__(self, writes: AsyncWrites) -> None:
        self._kernel = writes
        self._loop = asyncio.get_running_loop()
        self._writes: dict[int, Write] = {}
        self._next_token = 0
        self._submitting = False
        self._closed = False
        self._idle: asyncio.Future[None] | None = None
        eventloop.add_reader(self._loop, writes.fileno(), self._deliver)

    @classmethod
    def open(cls) -> AsyncWriter | None:
        """Make one; None where the kernel does not allow it, and threads have to write."""
        try:
            return cls(AsyncWrites(WRITES_IN_FLIGHT))
        except Unsupported as error:
            log.info("writing_with_threads", reason=error.cause)
            return None

    def write(self, descriptor: int, address: int, offset: int, write: Write) -> bool:
        """Start a write to a file that was opened with O_DIRECT; False when too many are in flight.

        `address` is that of its data, a multiple of a block.
        """
        token = self._next_token
        if not self._kernel.write(descriptor, address, len(write.data), offset, token):
            return False
        self._next_token += 1
        self._writes[token] = write
        if not self._submitting:
            self._submitting = True
            eventloop.defer(self._loop, self._submit)
        return True

    def _submit(self) -> None:
        if self._closed:
            return
        self._submitting = False
        tokens = self._kernel.queued
        if refusals := self._refusals(tokens):
            ended = [(token, refusals.get(token, -errno.EAGAIN)) for token in self._kernel.drop()]
        else:
            ended = self._kernel.submit()
        self._end(ended)

    def _refusals(self, tokens: list[int]) -> dict[int, int]:
        asked: dict[Callable[[], int], int] = {}
        refused: dict[int, int] = {}
        for token in tokens:
            refusal = self._writes[token].refusal
            if refusal not in asked:
                try:
                    asked[refusal] = refusal()
                except OSError as problem:
                    asked[refusal] = problem.errno or errno.EIO
            if error := asked[refusal]:
                refused[token] = -error
        return refused

    def _deliver(self) -> None:
        self._end(self._kernel.completions())

    def _end(self, ended: list[tuple[int, int]]) -> None:
        for token, result in ended:
            _, _, done = self._writes.pop(token)
            try:
                done(result)
            except Exception:
                log.exception("completion_failed")
        if self._idle is not None and not self._writes and not self._idle.done():
            self._idle.set_result(None)

    async def close(self) -> None:
        """Wait for the writes in flight, as long as the device hangs, and free the context."""
        if self._writes:
            self._idle = self._loop.create_future()
            await self._idle
        self._closed = True
        eventloop.remove_reader(self._loop, self._kernel.fileno())
        self._kernel.close()
