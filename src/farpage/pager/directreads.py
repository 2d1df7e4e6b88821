"""A worker's own reads of the storage that VIOSes on its host have lent: over io_uring, else with threads.

Reads go into aligned buffers, and what waits for them is given those. Nothing here ever waits for a device:
one that hangs keeps its buffers, and what it answers after the end of the process is nobody's concern.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from typing import Final, Protocol

from farpage.blockio import DirectFile, Lent, ReadDone
from farpage.device.reads import RingReader
from farpage.device.threads import IoThreads
from farpage.kernel.buffers import AlignedPool
from farpage.kernel.memory import AlignedBuffer

IN_FLIGHT: Final = 128
"""Reads of all clients of a worker with threads; further ones are served."""
LARGEST_BYTES: Final = 1 << 20
KEPT_BYTES: Final = 8 << 20
"""So much unused buffer memory is kept."""
PREALLOCATED: Final = 32
"""Buffers of one page that are there from the start."""
BLOCK_BYTES: Final = 4096


class Engine(Protocol):
    """Carries reads out for an event loop."""

    def read(
        self, descriptor: int, buffer: AlignedBuffer, length: int, offset: int, done: Callable[[int], None]
    ) -> bool:
        """Begin a read; `done` gets the bytes read or a negative errno. False when too many are in flight."""

    def push(self) -> None:
        """Start what was begun."""


class ThreadEngine:
    """Reads in threads, where the kernel has no io_uring or does not allow it."""

    def __init__(self) -> None:
        """Start the threads."""
        self._threads = IoThreads("direct")
        self._in_flight = 0

    def read(
        self, descriptor: int, buffer: AlignedBuffer, length: int, offset: int, done: Callable[[int], None]
    ) -> bool:
        """Begin a read."""
        if self._in_flight >= IN_FLIGHT:
            return False
        self._in_flight += 1
        results: list[int] = []

        def work() -> int:
            with buffer.view[:length] as view:
                results.append(os.preadv(descriptor, [view], offset))
            return 0

        def finished(error: int) -> None:
            self._in_flight -= 1
            done(-error if error else results[0])

        self._threads.submit(finished, work)
        return True

    def push(self) -> None:
        """Nothing is held back."""


class DirectReader:
    """Reads by itself what is lent to this process: a `farpage.volume.connector.Borrower`."""

    def __init__(self, engine: Engine | None = None) -> None:
        """Without an `engine` one is made when it is needed."""
        self._engine = engine
        self._buffers: AlignedPool | None = None

    def file(self, lent: Lent) -> DirectFile:
        """Take what is lent over."""
        if self._engine is None:
            self._engine = open_engine()
        if self._buffers is None:
            self._buffers = AlignedPool(KEPT_BYTES, preallocated={BLOCK_BYTES: PREALLOCATED})
        return BorrowedFile(lent.take(), lent.origin_bytes, self._engine, self._buffers)


def open_engine() -> Engine:
    """Make the best engine that the kernel allows."""
    return RingReader.open() or ThreadEngine()


class BorrowedFile:
    """A `DirectFile` over a descriptor, which it owns."""

    def __init__(self, descriptor: int, origin_bytes: int, engine: Engine, buffers: AlignedPool) -> None:
        """The volume begins at `origin_bytes` of the file."""
        self._descriptor = descriptor
        self._origin = origin_bytes
        self._engine = engine
        self._buffers = buffers
        self._in_flight = 0
        self._closed = False
        self.push = engine.push

    @property
    def place(self) -> tuple[int, int] | None:
        """The descriptor and where the volume begins."""
        return None if self._closed else (self._descriptor, self._origin)

    def read(self, offset: int, length: int, done: ReadDone) -> bool:
        """Read whole blocks; `done` may come after `close`, too."""
        if self._closed or length > LARGEST_BYTES:
            return False
        buffer = self._buffers.take(length)

        def arrived(result: int) -> None:
            self._in_flight -= 1
            try:
                if result != length:
                    done(-result if result < 0 else errno.EIO, None)
                elif length == BLOCK_BYTES:
                    done(0, buffer.view)
                else:
                    with buffer.view[:length] as payload:
                        done(0, payload)
            finally:
                self._buffers.give(buffer)
                if self._closed and not self._in_flight:
                    os.close(self._descriptor)

        if not self._engine.read(self._descriptor, buffer, length, self._origin + offset, arrived):
            self._buffers.give(buffer)
            return False
        self._in_flight += 1
        return True

    def close(self) -> None:
        """Begin nothing any more; the descriptor is closed when nothing is in flight."""
        if not self._closed:
            self._closed = True
            if not self._in_flight:
                os.close(self._descriptor)
