"""Reads without threads: an io_uring whose completions the event loop delivers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from farpage.device.kernelqueue import KernelQueue
from farpage.errors import Unsupported
from farpage.kernel.io_uring import Ring
from farpage.kernel.memory import AlignedBuffer
from farpage.log import get_logger

log = get_logger()

BEGUN_TOGETHER: Final = 4
"""So many reads are started with one system call; a device that waits for more does nothing meanwhile."""
READS_IN_FLIGHT: Final = 256
"""Further ones are read by threads."""
RETRY_SECONDS: Final = 0.001


class RingReader(KernelQueue[Ring, AlignedBuffer]):
    """Direct reads; see `KernelQueue`. A buffer is kept while the kernel writes to it."""

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
        if not self._queue.read(descriptor, buffer.address, length, offset, self._next_token):
            return False
        self._begun(done, buffer)
        if self._queue.unsubmitted == BEGUN_TOGETHER:
            self._submit()
        return True

    def _submit(self) -> None:
        if self._closed:
            return
        self._submitting = False
        try:
            self._queue.submit()
        except OSError as error:  # no memory at the moment; what is in flight brings some back
            log.warning("reads_delayed", problem=str(error))
            self._submitting = True
            self._loop.call_later(RETRY_SECONDS, self._submit)
