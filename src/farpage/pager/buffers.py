"""Page-aligned buffers for page-outs, allocated before they are needed and used again."""

from __future__ import annotations

from typing import Final

from farpage.kernel.memory import AlignedBuffer

BUFFER_BYTES: Final = 256 << 10
PREALLOCATED: Final = 32


class BufferPool:
    """Buffers of BUFFER_BYTES. Paging out must not need memory that paging out has to free."""

    def __init__(self, preallocated: int = PREALLOCATED) -> None:
        self._free = [AlignedBuffer(BUFFER_BYTES, populate=True) for _ in range(preallocated)]
        self._kept: Final = preallocated

    def take(self) -> AlignedBuffer:
        """Return a free buffer; a new one when all are in use, as while a failed server is not yet fenced."""
        return self._free.pop() if self._free else AlignedBuffer(BUFFER_BYTES, populate=True)

    def give(self, buffer: AlignedBuffer) -> None:
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

    def use(self) -> None:
        """Count one command more."""
        self._users += 1

    def release(self) -> None:
        """Count one command less."""
        self._users -= 1
        if self._users == 0:
            self._pool.give(self._buffer)
