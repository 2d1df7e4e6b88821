"""Page-aligned buffers that are used again, as direct I/O wants them (open(2), O_DIRECT).

Paging out must not wait for memory that paging out has to free, so buffers stay once they were used. Long
ones are cut from huge pages: a device is given each as one segment.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Final

from farpage.kernel.memory import HUGE_PAGE_BYTES, LONG_BYTES, PAGE_SIZE, AlignedBuffer

KEPT_MAX_BYTES: Final = 64 << 20
_SHORT_TOGETHER_BYTES: Final = 256 << 10
"""Short buffers are made by so many bytes at a time: the kernel has at most vm.max_map_count mappings."""


class AlignedPool:
    """Buffers in powers of two from one page up. For one thread; how many are out is the caller's bound."""

    def __init__(
        self, kept_max_bytes: int = KEPT_MAX_BYTES, *, preallocated: Mapping[int, int] | None = None
    ) -> None:
        """Keep at most `kept_max_bytes` that nobody uses; `preallocated` are numbers of buffers by size."""
        self._kept_max_bytes = kept_max_bytes
        self.kept_bytes = 0
        """Unused buffers."""
        self._free: dict[int, list[AlignedBuffer]] = {}
        for size_bytes, count in (preallocated or {}).items():
            while len(self._free.get(size_bytes, ())) < count:
                self._keep(_make(size_bytes))

    def take(self, length: int) -> AlignedBuffer:
        """Return a buffer of at least `length` bytes with any content.

        :raise OSError: ENOMEM.
        """
        size_bytes = max(PAGE_SIZE, 1 << (length - 1).bit_length())
        free = self._free.get(size_bytes)
        if free:
            self.kept_bytes -= size_bytes
            return free.pop()
        buffer, *others = _make(size_bytes)
        self._keep(others)
        return buffer

    def _keep(self, buffers: list[AlignedBuffer]) -> None:
        for buffer in buffers:
            self.give(buffer)

    def give(self, buffer: AlignedBuffer) -> None:
        """Take a buffer back, which nobody uses any more."""
        if self.kept_bytes + buffer.size_bytes > self._kept_max_bytes:
            _release(buffer)
            return
        self.kept_bytes += buffer.size_bytes
        self._free.setdefault(buffer.size_bytes, []).append(buffer)

    def close(self) -> None:
        """Free the buffers."""
        for free in self._free.values():
            for buffer in free:
                _release(buffer)
        self._free.clear()
        self.kept_bytes = 0


def _release(buffer: AlignedBuffer) -> None:
    # A slice that a receiver has not let go of yet keeps the memory; it goes with the slice.
    with contextlib.suppress(BufferError):
        buffer.close()


def _make(size_bytes: int) -> list[AlignedBuffer]:
    if size_bytes >= HUGE_PAGE_BYTES:
        return [AlignedBuffer(size_bytes)]
    return AlignedBuffer.parts(
        HUGE_PAGE_BYTES if size_bytes >= LONG_BYTES else _SHORT_TOGETHER_BYTES, size_bytes
    )
