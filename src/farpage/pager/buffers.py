"""Page-aligned buffers for page-outs, allocated before they are needed and used again."""

from __future__ import annotations

from typing import Final

from farpage.kernel.memory import AlignedBuffer
from farpage.pager.table import PAGE_BYTES

BUFFER_BYTES: Final = 256 << 10
PREALLOCATED: Final = 64


class PageBuffer(AlignedBuffer):
    """A buffer of BUFFER_BYTES."""

    def __init__(self) -> None:
        super().__init__(BUFFER_BYTES, populate=True)
        self.pages: Final = [
            self.view[offset : offset + PAGE_BYTES] for offset in range(0, BUFFER_BYTES, PAGE_BYTES)
        ]
        """A view of each page: to make one takes as long as the page's checksum."""


class BufferPool:
    """Buffers of BUFFER_BYTES. Paging out must not need memory that paging out has to free."""

    def __init__(self, preallocated: int = PREALLOCATED) -> None:
        self._free = [PageBuffer() for _ in range(preallocated)]
        self._kept: Final = preallocated

    def take(self) -> PageBuffer:
        """Return a free buffer; a new one when all are in use, as while a failed server is not yet fenced."""
        return self._free.pop() if self._free else PageBuffer()

    def give(self, buffer: PageBuffer) -> None:
        """Put a buffer back."""
        if len(self._free) < self._kept:
            self._free.append(buffer)


class SharedBuffer:
    """One buffer that several commands read from; goes back to the pool after the last."""

    def __init__(self, pool: BufferPool) -> None:
        self._pool: Final = pool
        self._buffer: Final = pool.take()
        self._users = 1
        self.view: Final = self._buffer.view
        self.pages: Final = self._buffer.pages

    def content(self, first: int, count: int) -> memoryview:
        """Return a run of its pages."""
        if count == 1:
            return self.pages[first]
        return self.view[first * PAGE_BYTES : (first + count) * PAGE_BYTES]

    def use(self) -> None:
        """Count one command more."""
        self._users += 1

    def release(self) -> None:
        """Count one command less."""
        self._users -= 1
        if self._users == 0:
            self._pool.give(self._buffer)
