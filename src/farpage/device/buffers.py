"""A pool of page-aligned buffers, as direct I/O needs them."""

from __future__ import annotations

import contextlib

from farpage.device.base import BLOCK_BYTES
from farpage.kernel.memory import HUGE_PAGE_BYTES, LONG_BYTES, AlignedBuffer

KEPT_MAX_BYTES = 64 << 20
"""So much unused memory the pool keeps; more goes back to the system."""

PREALLOCATED = {BLOCK_BYTES: 64, 64 << 10: 16, 1 << 20: 4}
"""Buffers made at the start by size, so that paging out under memory pressure needs no memory."""


class BufferPool:
    """Buffers in powers of two from 4 KiB up. For one thread; how many are out is the caller's bound."""

    def __init__(self) -> None:
        self._free: dict[int, list[AlignedBuffer]] = {}
        self._kept_bytes = 0
        for size_bytes, count in PREALLOCATED.items():
            while len(self._free.get(size_bytes, ())) < count:
                for buffer in _make(size_bytes):
                    self.give_back(buffer)

    def take(self, length: int) -> AlignedBuffer:
        """Return a buffer of at least `length` bytes with any content."""
        size_bytes = max(BLOCK_BYTES, 1 << (length - 1).bit_length())
        if not self._free.get(size_bytes):
            buffer, *others = _make(size_bytes)
            for other in others:
                self.give_back(other)
            return buffer
        self._kept_bytes -= size_bytes
        return self._free[size_bytes].pop()

    def give_back(self, buffer: AlignedBuffer) -> None:
        """Take a buffer back."""
        if self._kept_bytes + buffer.size_bytes > KEPT_MAX_BYTES:
            self._release(buffer)
            return
        self._kept_bytes += buffer.size_bytes
        self._free.setdefault(buffer.size_bytes, []).append(buffer)

    def close(self) -> None:
        """Free the buffers."""
        for free in self._free.values():
            for buffer in free:
                self._release(buffer)
        self._free.clear()
        self._kept_bytes = 0

    @staticmethod
    def _release(buffer: AlignedBuffer) -> None:
        # A slice that a receiver has not let go of yet keeps the memory; it goes with the slice.
        with contextlib.suppress(BufferError):
            buffer.close()


def _make(size_bytes: int) -> list[AlignedBuffer]:
    if LONG_BYTES <= size_bytes < HUGE_PAGE_BYTES:
        return AlignedBuffer.of_huge_page(size_bytes)
    return [AlignedBuffer(size_bytes, populate=size_bytes < LONG_BYTES)]
