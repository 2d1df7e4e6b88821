"""What a replica has missed: one byte a page, in memory that may outlive the process. No I/O."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

_SEARCH_PAGES: Final = 1 << 16


class DirtyStore(Protocol):
    """Where dirty maps are kept, by the identifier of the replica's device."""

    @property
    def dirty_maps(self) -> tuple[str, ...]:
        """The devices that have one."""

    def dirty_map(self, device_id: str, *, missed: bool = False) -> memoryview:
        """Return a device's map, one byte a page; a new one is all zeros, or all ones when all is `missed`.

        :raise FarpageError: when there is no room for another one.
        """

    def drop_dirty_map(self, device_id: str) -> None:
        """Free a device's map; nothing happens when there is none."""


class MemoryDirtyStore:
    """Dirty maps that end with the process."""

    def __init__(self, pages: int) -> None:
        self._pages = pages
        self._maps: dict[str, bytearray] = {}

    @property
    def dirty_maps(self) -> tuple[str, ...]:
        """The devices that have one."""
        return tuple(self._maps)

    def dirty_map(self, device_id: str, *, missed: bool = False) -> memoryview:
        """Return a device's map; a new one is all zeros, or all ones when all is `missed`."""
        new = bytearray((bytes([missed])) * self._pages)
        return memoryview(self._maps.setdefault(device_id, new))

    def drop_dirty_map(self, device_id: str) -> None:
        """Free a device's map."""
        self._maps.pop(device_id, None)


class DirtyMap:
    """The pages that a replica has missed: not 0 in `storage`, whose other content is kept."""

    def __init__(self, storage: memoryview) -> None:
        self._storage = storage
        self._pages: NDArray[np.uint8] = np.frombuffer(storage, dtype=np.uint8)
        self.count = int(np.count_nonzero(self._pages))

    def release(self) -> None:
        """Let go of the memory."""
        self._pages = np.zeros(0, dtype=np.uint8)
        self._storage.release()

    def mark(self, first: int, count: int) -> None:
        """Note that `count` pages from `first` on are missed."""
        pages = self._pages[first : first + count]
        self.count += count - int(np.count_nonzero(pages))
        pages[:] = 1

    def clear(self, first: int, count: int) -> None:
        """Note that the replica has them now."""
        pages = self._pages[first : first + count]
        self.count -= int(np.count_nonzero(pages))
        pages[:] = 0

    def keep(self, wanted: NDArray[np.bool_]) -> None:
        """Forget the pages that nobody will read before they are written again."""
        self._pages[: len(wanted)] *= wanted
        self.count = int(np.count_nonzero(self._pages))

    def any(self, first: int, count: int) -> bool:
        """Tell whether one of these pages is missed."""
        return bool(self._pages[first : first + count].any())

    def next_run(self, start: int, longest: int, skip: AbstractSet[int]) -> tuple[int, int] | None:
        """Find missed pages that lie together, from `start` on and then from the beginning: (first, count).

        At most `longest`, and none that is in `skip`; None when there are no others.
        """
        if not self.count:
            return None
        return self._run_within(start, len(self._pages), longest, skip) or self._run_within(
            0, min(start, len(self._pages)), longest, skip
        )

    def _run_within(
        self, start: int, end: int, longest: int, skip: AbstractSet[int]
    ) -> tuple[int, int] | None:
        at = start
        while at < end:
            block = self._pages[at : min(at + _SEARCH_PAGES, end)]
            found = int(block.argmax())
            if not block[found]:
                at += len(block)
                continue
            first = at + found
            count = 0
            while (
                count < longest
                and first + count < end
                and self._pages[first + count]
                and first + count not in skip
            ):
                count += 1
            if count:
                return first, count
            at = first + 1
        return None
