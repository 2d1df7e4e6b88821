"""Which page leaves memory next: two queues, first in, first out, with a second chance. No I/O.

New pages enter the *inactive* queue, from whose head victims are taken. A page that comes back soon
after it was paged out - within as many evictions as the client has pages in memory, its refault
distance - was wrongly chosen and enters the *active* queue instead. The active queue gives its oldest
pages back to the inactive one when it holds more than its share, so each has a second chance there.
"""

from __future__ import annotations

from array import array
from collections import deque
from typing import Final

import numpy as np
import numpy.typing as npt

ACTIVE_SHARE: Final = 2 / 3
"""The most that the active queue holds of a client's pages in memory."""
CHUNK_PAGES: Final = 1024

_NOWHERE, _INACTIVE, _ACTIVE = 0, 1, 2


class _Queue:
    """A queue of page numbers at four bytes a page."""

    def __init__(self) -> None:
        self._chunks: deque[array[int]] = deque()
        self._head = 0
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def append(self, page: int) -> None:
        chunks = self._chunks
        if not chunks or len(chunks[-1]) >= CHUNK_PAGES:
            chunks.append(array("I"))
        chunks[-1].append(page)
        self._length += 1

    def take(self, count: int) -> list[int]:
        taken: list[int] = []
        while len(taken) < count and self._length > len(taken):
            chunk = self._chunks[0]
            end = min(self._head + count - len(taken), len(chunk))
            taken += chunk[self._head : end]
            self._head = end
            if end == len(chunk):
                self._chunks.popleft()
                self._head = 0
        self._length -= len(taken)
        return taken


class Replacement:
    """Order of eviction of one client's pages. A page is in one queue at most, once."""

    def __init__(self, pages: int) -> None:
        self._inactive = _Queue()
        self._active = _Queue()
        self._where = bytearray(pages)
        self._evictions = 0
        self._evicted_at: npt.NDArray[np.uint32] = np.zeros(pages, np.uint32)

    def __len__(self) -> int:
        return len(self._inactive) + len(self._active)

    def added(self, page: int) -> None:
        """Take note of a page that came into memory for the first time."""
        if self._where[page] == _NOWHERE:
            self._where[page] = _INACTIVE
            self._inactive.append(page)

    def returned(self, page: int) -> None:
        """Take note of a page that came back from the volume, or that a write kept in memory."""
        if self._where[page] != _NOWHERE:
            return
        left_at = int(self._evicted_at[page])
        if left_at and self._evictions - left_at < len(self):
            self._where[page] = _ACTIVE
            self._active.append(page)
        else:
            self._where[page] = _INACTIVE
            self._inactive.append(page)

    def victims(self, count: int) -> list[int]:
        """Take up to `count` pages out of the queues, those that should leave memory first."""
        surplus = len(self._active) - int(len(self) * ACTIVE_SHARE)
        wanted = max(surplus, count - len(self._inactive))
        for page in self._active.take(max(wanted, 0)):
            self._where[page] = _INACTIVE
            self._inactive.append(page)
        taken = self._inactive.take(count)
        for page in taken:
            self._where[page] = _NOWHERE
        return taken

    def evicted(self, page: int) -> None:
        """Take note that a page left memory for the volume."""
        self._evictions += 1
        self._evicted_at[page] = self._evictions
