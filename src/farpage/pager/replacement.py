"""Which page leaves memory next: two queues, first in, first out, with a second chance. No I/O.

New pages enter the *inactive* queue, from whose head victims are taken. A page that comes back soon
after it was paged out - within as many evictions as the client has pages in memory, its refault
distance - was wrongly chosen and enters the *active* queue instead. The active queue gives its oldest
pages back to the inactive one when it holds more than its share, so each has a second chance there.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np

from farpage.pager.compiled import COMPILED

ACTIVE_SHARE: Final = 2 / 3
"""The most that the active queue holds of a client's pages in memory."""
CHUNK_PAGES: Final = 1024
TICKS: Final = 4096
"""Parts of its pages to which a client's refault distances are known, so that two bytes a page do."""
TICKS_KEPT: Final = (1 << 16) - 1
"""Then they begin anew: what left sixteen times the client's memory ago may pass for recent."""
MOST_PAGES: Final = 1 << 32
"""The queues have four bytes for each."""

_NOWHERE, _INACTIVE, _ACTIVE = 0, 1, 2


class _Queue:
    """A queue of page numbers at four bytes a page."""

    def __init__(self) -> None:
        self._chunks: deque[array[int]] = deque()
        self._head = 0
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def extend(self, pages: Sequence[int]) -> None:
        chunks = self._chunks
        if not chunks or len(chunks[-1]) >= CHUNK_PAGES:
            chunks.append(array("I"))
        chunks[-1].extend(pages)
        self._length += len(pages)

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


class Replacement(Protocol):
    """Order of eviction of one client's pages. A page is in one queue at most, once.

    Every run of pages must be one of the client's (IndexError).
    """

    def __len__(self) -> int:
        """Return the pages in it."""

    def added(self, first: int, count: int = 1) -> None:
        """Take note of pages that came into memory for the first time."""

    def returned(self, first: int, count: int = 1) -> None:
        """Take note of pages that came back from the volume, or that a write kept in memory."""

    def victims(self, count: int) -> list[int]:
        """Take up to `count` pages out of the queues, those that should leave memory first."""

    def evicted(self, first: int, count: int = 1) -> None:
        """Take note that pages left memory for the volume."""


BYTES_A_PAGE: Final = 3
"""What an order takes for each page of the client; the queues take four more for each one in memory."""


def new_replacement(pages: int) -> Replacement:
    """Return the order of a client of so many pages: the compiled one if that is possible here."""
    return COMPILED.order(pages) if COMPILED else PythonReplacement(pages)


class PythonReplacement:
    """The order without a compiler."""

    def __init__(self, pages: int) -> None:
        if not 0 <= pages <= MOST_PAGES:
            raise ValueError(f"an order of {pages} pages")
        self._pages: Final = pages
        self._inactive = _Queue()
        self._active = _Queue()
        self._where = bytearray(pages)
        self._evictions = 0
        self._evictions_a_tick: Final = max(pages // TICKS, 1)
        self._left_at = np.zeros(pages, np.uint16).data
        """The tick at which a page left, from 1; 0 for never."""

    def __len__(self) -> int:
        return len(self._inactive) + len(self._active)

    def added(self, first: int, count: int = 1) -> None:
        """Take note of pages that came into memory for the first time."""
        self._check(first, count)
        self._enter(range(first, first + count), _INACTIVE)

    def returned(self, first: int, count: int = 1) -> None:
        """Take note of pages that came back from the volume, or that a write kept in memory."""
        self._check(first, count)
        if not count:
            return
        # Those of one run left and come back together, so the first one speaks for all.
        left_at = self._left_at[first]
        ticks = (self._tick - left_at) % TICKS_KEPT
        soon = left_at and ticks * self._evictions_a_tick < len(self)
        where = _ACTIVE if soon else _INACTIVE
        if count > 1:
            self._enter(range(first, first + count), where)
        elif self._where[first] == _NOWHERE:
            self._where[first] = where
            (self._active if soon else self._inactive).append(first)

    def _check(self, first: int, count: int) -> None:
        if first < 0 or count < 0 or first + count > self._pages:
            raise IndexError(f"{count} pages from {first} on are not within {self._pages}")

    def _enter(self, pages: range, where: int) -> None:
        first, count = pages.start, len(pages)
        known = self._where[first : first + count]
        if any(known):
            for page in pages:
                if self._where[page] == _NOWHERE:
                    self._enter(range(page, page + 1), where)
            return
        self._where[first : first + count] = bytes((where,)) * count
        (self._active if where == _ACTIVE else self._inactive).extend(pages)

    def victims(self, count: int) -> list[int]:
        """Take up to `count` pages out of the queues, those that should leave memory first."""
        surplus = len(self._active) - int(len(self) * ACTIVE_SHARE)
        wanted = max(surplus, count - len(self._inactive))
        demoted = self._active.take(max(wanted, 0))
        for page in demoted:
            self._where[page] = _INACTIVE
        self._inactive.extend(demoted)
        taken = self._inactive.take(count)
        for page in taken:
            self._where[page] = _NOWHERE
        return taken

    def evicted(self, first: int, count: int = 1) -> None:
        """Take note that pages left memory for the volume."""
        self._check(first, count)
        self._evictions += count
        if count == 1:
            self._left_at[first] = self._tick
        else:
            self._left_at[first : first + count] = array("H", (self._tick,)) * count

    @property
    def _tick(self) -> int:
        return self._evictions // self._evictions_a_tick % TICKS_KEPT + 1
