"""The RAM tier: pages that left memory, compressed, so that those that come back soon need no device. No I/O.

What it holds is on the volume as well, so it may be dropped at any time and redundancy is never less for it.
It has a page only while the page is nowhere else in memory: who brings a page in takes it out of here.
So it never has a content that is not the newest; and what it gives is held against the page's checksum.

The oldest entry leaves first. As an entry ends with its use, that is the one that was not used for longest.
"""

from __future__ import annotations

from typing import Final

from farpage.pager import store
from farpage.pager.table import PAGE_BYTES

ENTRY_BYTES: Final = store.ENTRY_BYTES
"""What an entry takes beside its content, on average."""

FAILURES: Final = store.FAILURES
"""After so many pages in a row that do not compress, only samples are tried."""
SAMPLE_EVERY: Final = 32
"""One page of so many is such a sample."""
FRUITLESS_SHARE: Final = 64
"""A tier from which less than one page of so many comes back takes only samples of what is offered."""
TRIAL_ENTRIES: Final = 1024
"""Entries that are made before that is judged, or as many as there is room for."""
FRUITLESS_EVERY: Final = 8
"""One run of so many is such a sample."""


class RamTier:
    """Compressed pages of one client, at most `most_bytes` of them with all that they take."""

    def __init__(self, most_bytes: int = 0) -> None:
        self._most_bytes = most_bytes
        self.store: Final = store.new_store(most_bytes)
        self._appetite = _Appetite(self.store)

    def __len__(self) -> int:
        """Return the pages that it holds compressed."""
        return len(self.store)

    def __contains__(self, page: int) -> bool:
        """Tell whether it holds a page."""
        return page in self.store

    @property
    def stored_bytes(self) -> int:
        """Size of all contents as they are kept."""
        return self.store.stored_bytes

    @property
    def taken_bytes(self) -> int:
        """Memory that compressed pages take."""
        return self.store.taken_bytes

    @property
    def taken_pages(self) -> int:
        """The same in pages, rounded up, and those that are held as they are."""
        return (self.store.taken_bytes + PAGE_BYTES - 1) // PAGE_BYTES + self.store.held

    def wanted(self, count: int) -> int:
        """Return how many pages of a run that leaves memory are to be offered to `keep`: its first ones."""
        return self._appetite.portion(count) if self._most_bytes else 0

    def keep(self, first: int, content: memoryview) -> None:
        """Take a run of whole pages in, those that get small; the oldest make room."""
        self.store.keep(first, content)

    def hold(self, page: int, content: memoryview) -> None:
        """Take in one page as it is: it was read ahead, and is about to be asked for.

        A few of them are held at a time, whatever there is room for.
        """
        self.store.hold(page, content)

    def take(self, page: int, checksum: int) -> bytes | None:
        """Give a page and hold it no more; None when it is not here, or is not what has this checksum."""
        return self.store.take(page, checksum)

    def look(self, page: int, checksum: int) -> bytes | None:
        """Return a page and go on holding it; None as for `take`."""
        return self.store.look(page, checksum)

    def forget(self, first: int, count: int = 1) -> None:
        """Drop those of a range of pages that are here."""
        self.store.forget(first, count)

    def resize(self, most_bytes: int) -> None:
        """Change how much it may take."""
        self._most_bytes = most_bytes
        self.store.resize(most_bytes)

    def clear(self) -> None:
        """Drop everything."""
        self.store.clear()


class _Appetite:
    """Decides what is worth compressing: not what does not get small, nor what never comes back."""

    def __init__(self, kept_in: store.Store) -> None:
        self._store = kept_in
        self._until_sample = 0
        self._fruitless = False
        self._until_run = 0
        self._kept = self._given = self._dropped = 0
        """What the store had counted when the trial began."""

    def portion(self, count: int) -> int:
        """Return how many pages to try of a run of `count`."""
        if self._store.dropped != self._dropped or self._fruitless:
            self._judge()
        if self._fruitless:
            self._until_run -= 1
            if self._until_run > 0:
                return 0
            self._until_run = FRUITLESS_EVERY
        if self._store.failures < FAILURES:
            return count
        self._until_sample -= count
        if self._until_sample > 0:
            return 0
        self._until_sample = SAMPLE_EVERY
        return 1

    def _judge(self) -> None:
        """Compare what came back with what was kept.

        That little does is known when as much was kept as there is room for; that enough does, with the first
        pages that do, however large the tier is.
        """
        found = self._store
        kept, given = found.kept - self._kept, found.given - self._given
        if self._fruitless and given * FRUITLESS_SHARE >= max(kept, TRIAL_ENTRIES):
            self._fruitless = False
        elif found.dropped != self._dropped and kept >= max(len(found), TRIAL_ENTRIES):
            self._fruitless = given * FRUITLESS_SHARE < kept
        else:
            return
        self._kept, self._given, self._dropped = found.kept, found.given, found.dropped
