"""Reads without threads: an io_uring whose completions the event loop delivers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from farpage.errors import Unsupported
from farpage.kernel.io_uring import Ring
from farpage.kernel.memory import AlignedBuffer
from farpage.log import get_logger
from farpage.nbd import eventloop

log = get_logger()

READS_IN_FLIGHT: Final = 256
"""Further ones are read by threads."""


class RingReader:
    """Direct reads of one device; made, used and closed in the running event loop's thread.

    Reads that are started together go to the kernel in one system call.
    """

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._loop = asyncio.get_running_loop()
        self._reads: dict[int, tuple[Callable[[int], None], AlignedBuffer]] = {}
        """By token; the buffer is kept while the kernel writes to it."""
        self._next_token = 0
        self._submitting = False
        self._closed = False
        self._idle: asyncio.Future[None] | None = None
        eventloop.add_reader(self._loop, ring.fileno(), self._deliver)

    @classmethod
    def open(cls) -> RingReader | None:
        """Make one; None where the kernel does not allow it, and threads have to read."""
        try:
            return cls(Ring(READS_IN_FLIGHT))
        except Unsupported as error:
            log.info("reading_with_threads", reason=error.cause)
            return None

    def read(
        self, descriptor: int, buffer: AlignedBuffer, length: int, offset: int, done: Callable[[int], None]
    ) -> bool:
        """Start a read of a file that was opened with O_DIRECT; False when too many are in flight.

        `done` gets the bytes read or a negative errno.
        """
        token = self._next_token
        if not self._ring.read(descriptor, buffer.address, length, offset, token):
            return False
        self._next_token += 1
        self._reads[token] = (done, buffer)
        if not self._submitting:
            self._submitting = True
            eventloop.defer(self._loop, self._submit)
        return True

    def push(self) -> None:
        """Start what was begun now, and not when the loop comes to it."""
        if self._submitting:
            self._submit()

    def _submit(self) -> None:
        if self._closed:
            return
        self._submitting = False
        try:
            self._ring.submit()
        except OSError as error:  # no memory at the moment; what is in flight brings some back
            log.warning("reads_delayed", problem=str(error))
            self._submitting = True
            self._loop.call_later(0.001, self._submit)

    def _deliver(self) -> None:
        for token, result in self._ring.completions():
            done, _ = self._reads.pop(token)
            try:
                done(result)
            except Exception:
                log.exception("completion_failed")
        if self._idle is not None and not self._reads and not self._idle.done():
            self._idle.set_result(None)

    async def close(self) -> None:
        """Wait for the reads in flight, as long as the device hangs, and free the ring."""
        if self._reads:
            self._idle = self._loop.create_future()
            await self._idle
        self._closed = True
        eventloop.remove_reader(self._loop, self._ring.fileno())
        self._ring.close()
