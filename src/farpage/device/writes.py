"""Writes without threads: kernel AIO whose completions the event loop delivers."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Final, NamedTuple

from farpage.device.kernelqueue import KernelQueue
from farpage.errors import Unsupported
from farpage.kernel.aio import AsyncWrites
from farpage.log import get_logger

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


class AsyncWriter(KernelQueue[AsyncWrites, Write]):
    """Direct writes; see `KernelQueue`."""

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
        if not self._queue.write(descriptor, address, len(write.data), offset, self._next_token):
            return False
        self._begun(write.done, write)
        return True

    def _submit(self) -> None:
        if self._closed:
            return
        self._submitting = False
        tokens = self._queue.queued
        if refusals := self._refusals(tokens):
            ended = [(token, refusals.get(token, -errno.EAGAIN)) for token in self._queue.drop()]
        else:
            ended = self._queue.submit()
        self._end(ended)

    def _refusals(self, tokens: list[int]) -> dict[int, int]:
        asked: dict[Callable[[], int], int] = {}
        refused: dict[int, int] = {}
        for token in tokens:
            refusal = self._kept[token][1].refusal
            if refusal not in asked:
                try:
                    asked[refusal] = refusal()
                except OSError as problem:
                    asked[refusal] = problem.errno or errno.EIO
            if error := asked[refusal]:
                refused[token] = -error
        return refused
