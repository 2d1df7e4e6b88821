"""Memory for payloads: page-aligned, reused, bounded.

Devices opened with O_DIRECT want aligned memory (open(2)), and paging out must not wait for memory that
paging out has to free; so buffers come from size classes that are kept once used. Long ones are cut from huge
pages, of which a device reads or writes a part as one segment.
"""

from __future__ import annotations

from typing import Final

from farpage.kernel.memory import HUGE_PAGE_BYTES, LONG_BYTES, PAGE_SIZE, map_memory

UNIX_SEND_BYTES: Final = 1 << 20
"""Send buffer of a UNIX socket: it does not grow by itself as TCP's do, and each time that it is full costs
both ends a wake-up. The kernel gives at most net.core.wmem_max (socket(7))."""
_SHORT_SLAB_BYTES: Final = 1 << 20
_LARGE_BYTES: Final = 1 << 20


class AlignedPool:
    """Page-aligned buffers in powers of two; used from one thread."""

    def __init__(self, idle_max_bytes: int = 64 << 20) -> None:
        """Keep at most `idle_max_bytes` of unused large buffers; small ones stay up to their highest use."""
        self._idle_max_bytes = idle_max_bytes
        self.idle_bytes = 0
        """Unused large buffers."""
        self._free: dict[int, list[memoryview]] = {}

    def take(self, length: int) -> memoryview:
        """Return a writable buffer of at least `length` bytes; its own length is its size class."""
        size = PAGE_SIZE if length <= PAGE_SIZE else 1 << (length - 1).bit_length()
        free = self._free.setdefault(size, [])
        if not free:
            _, slab = map_memory(max(size, HUGE_PAGE_BYTES if size >= LONG_BYTES else _SHORT_SLAB_BYTES))
            free.extend(slab[at : at + size] for at in range(0, len(slab), size))
            if size >= _LARGE_BYTES:
                self.idle_bytes += len(slab)
        if size >= _LARGE_BYTES:
            self.idle_bytes -= size
        return free.pop()

    def give(self, buffer: memoryview) -> None:
        """Take back a whole buffer that `take` returned and that nobody uses any more."""
        size = len(buffer)
        if size >= _LARGE_BYTES:
            if self.idle_bytes + size > self._idle_max_bytes:
                return
            self.idle_bytes += size
        self._free.setdefault(size, []).append(buffer)
