"""The page table of a client: one byte of state and four of checksum a page. No I/O.

A state says where the page's only valid content is:

    ZERO        nowhere: it reads as zeros          ON_DEVICE   on the volume
    CLEAN       in memory and on the volume         READING     on the volume, on its way into memory
    DIRTY       in memory                           POISONED    lost: accesses fail
    WRITING     in memory, protected, on its way to the volume
    REWRITTEN   in memory, changed while an older content is on its way to the volume

Two commands for one page are never in flight together: a REWRITTEN page is not paged out again
before the older write is acknowledged.
"""

from __future__ import annotations

from array import array
from typing import Final

import numpy as np
import numpy.typing as npt

from farpage.pager.states import CLEAN, DIRTY, ENTRY_BYTES, REWRITTEN, STATE_COUNT, WRITING

PAGE_BYTES: Final = 4096


class PageTable:
    """States and checksums of `pages` pages, with a count of the pages in each state."""

    def __init__(self, pages: int, storage: memoryview | None = None) -> None:
        """Lay the table over `storage` (`pages * ENTRY_BYTES` bytes, kept as they are), or over new zeros.

        :raise ValueError: when the storage has another size.
        """
        if storage is None:
            storage = memoryview(bytearray(pages * ENTRY_BYTES))
        if len(storage) != pages * ENTRY_BYTES:
            raise ValueError(f"{pages} pages need {pages * ENTRY_BYTES} bytes of table, not {len(storage)}")
        self.pages: Final = pages
        self.checksums: Final[npt.NDArray[np.uint32]] = np.frombuffer(storage, np.uint32, pages)
        self.states: Final[npt.NDArray[np.uint8]] = np.frombuffer(storage, np.uint8, pages, offset=pages * 4)
        self.state: Final = memoryview(storage)[pages * 4 :]
        """The same states, for access page by page, which numpy makes slow."""
        self.checksum: Final = memoryview(storage)[: pages * 4].cast("I")
        """The same checksums, likewise."""
        self.counts: Final[array[int]] = array("q", np.bincount(self.states, minlength=STATE_COUNT).tolist())
        """Pages in each state."""

    @property
    def resident(self) -> int:
        """Pages that take room in memory."""
        counts = self.counts
        return counts[CLEAN] + counts[DIRTY] + counts[WRITING] + counts[REWRITTEN]

    def put(self, page: int, new: int) -> None:
        """Set one page's state."""
        old = self.state[page]
        self.counts[old] -= 1
        self.counts[new] += 1
        self.state[page] = new

    def move(self, first: int, count: int, old: int, new: int) -> None:
        """Set the state of `count` pages that the caller knows to be all `old`."""
        self.counts[old] -= count
        self.counts[new] += count
        if count == 1:
            self.state[first] = new
        else:
            self.states[first : first + count] = new

    def restate(self, states: npt.NDArray[np.uint8]) -> None:
        """Set the state of every page."""
        self.states[:] = states
        self.counts[:] = array("q", np.bincount(states, minlength=STATE_COUNT).tolist())

    def run(self, first: int, most: int, state: int) -> int:
        """Return how many pages from `first` on, at most `most`, are in `state` without a gap."""
        if self.state[first] != state:
            return 0
        states = bytes(self.state[first : first + most])
        return len(states) - len(states.lstrip(bytes((state,))))

    def runs(self, first: int, count: int) -> list[tuple[int, int, int]]:
        """Return `(first, count, state)` for each run of equal states in a range."""
        states = bytes(self.state[first : first + count])
        runs: list[tuple[int, int, int]] = []
        at = 0
        while at < count:
            state = states[at]
            end = count - len(states[at:].lstrip(states[at : at + 1]))
            runs.append((first + at, end - at, state))
            at = end
        return runs

    def where(self, state: int) -> npt.NDArray[np.int64]:
        """Return the pages in one state, rising."""
        return np.flatnonzero(self.states == state)


def runs_of(pages: list[int]) -> list[tuple[int, int]]:
    """Group rising page numbers into `(first, count)` runs without gaps."""
    runs: list[tuple[int, int]] = []
    first = previous = -2
    for page in pages:
        if page != previous + 1:
            if first >= 0:
                runs.append((first, previous - first + 1))
            first = page
        previous = page
    if first >= 0:
        runs.append((first, previous - first + 1))
    return runs
