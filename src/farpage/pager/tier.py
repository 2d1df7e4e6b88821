"""The RAM tier: pages that left memory, compressed, so that those that come back soon need no device. No I/O.

What it holds is on the volume as well, so it may be dropped at any time and redundancy is never less for it.
It has a page only while the page is nowhere else in memory: who brings a page in takes it out of here.
So it never has a content that is not the newest; and what it gives is held against the page's checksum.

The oldest entry leaves first. As an entry ends with its use, that is the one that was not used for longest.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from farpage.pager.checksum import page_checksum
from farpage.pager.compression import pack, unpack
from farpage.pager.table import PAGE_BYTES

ENTRY_BYTES: Final = 320
"""What an entry takes beside its content: measured, a dictionary's link and key, and what malloc adds."""

MOST_HELD: Final = 16
"""Pages that are held as they are."""

FAILURES: Final = 8
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
        self._entries: OrderedDict[int, bytes] = OrderedDict()
        self._held: dict[int, bytes] = {}
        self._appetite = _Appetite()
        self.stored_bytes = 0
        """Size of all contents as they are kept."""

    def __len__(self) -> int:
        """Return the pages that it holds."""
        return len(self._entries)

    def __contains__(self, page: int) -> bool:
        """Tell whether it holds a page."""
        return page in self._entries or page in self._held

    @property
    def taken_bytes(self) -> int:
        """Memory that it takes."""
        return self.stored_bytes + len(self._entries) * ENTRY_BYTES

    @property
    def taken_pages(self) -> int:
        """The same in pages, rounded up."""
        entry_bytes = self.stored_bytes + len(self._entries) * ENTRY_BYTES
        return (entry_bytes + PAGE_BYTES - 1) // PAGE_BYTES + len(self._held)

    def wanted(self, count: int) -> int:
        """Return how many pages of a run that leaves memory are to be offered to `keep`: its first ones."""
        return self._appetite.portion(count) if self._most_bytes else 0

    def keep(self, first: int, content: memoryview) -> None:
        """Take a run of whole pages in, those that get small; the oldest make room."""
        entries, appetite = self._entries, self._appetite
        for offset in range(0, len(content), PAGE_BYTES):
            packed = pack(content[offset : offset + PAGE_BYTES])
            appetite.tasted(packed is not None)
            if packed is not None:
                page = first + offset // PAGE_BYTES
                self.forget(page)
                entries[page] = packed
                self.stored_bytes += len(packed)
            elif appetite.lost:
                break
        self._trim()

    def hold(self, page: int, content: bytes) -> None:
        """Take in one page as it is: it was read ahead, and is about to be asked for.

        A few of them are held at a time, whatever there is room for.
        """
        self.forget(page)
        if len(self._held) >= MOST_HELD:
            del self._held[next(iter(self._held))]
        self._held[page] = content

    def take(self, page: int, checksum: int) -> bytes | None:
        """Give a page and hold it no more; None when it is not here, or is not what has this checksum."""
        packed = self._entries.pop(page, None)
        if packed is None:
            return _checked(self._held.pop(page, None), checksum)
        self.stored_bytes -= len(packed)
        self._appetite.hits += 1
        return _opened(packed, checksum)

    def look(self, page: int, checksum: int) -> bytes | None:
        """Return a page and go on holding it; None as for `take`."""
        packed = self._entries.get(page)
        return _checked(self._held.get(page), checksum) if packed is None else _opened(packed, checksum)

    def forget(self, first: int, count: int = 1) -> None:
        """Drop those of a range of pages that are here."""
        entries, held = self._entries, self._held
        if held:
            for page in range(first, first + count):
                held.pop(page, None)
        if not entries:
            return
        for page in range(first, first + count):
            packed = entries.pop(page, None)
            if packed is not None:
                self.stored_bytes -= len(packed)

    def resize(self, most_bytes: int) -> None:
        """Change how much it may take."""
        self._most_bytes = most_bytes
        self._trim()

    def clear(self) -> None:
        """Drop everything."""
        self._entries.clear()
        self._held.clear()
        self.stored_bytes = 0

    def _trim(self) -> None:
        while self.taken_bytes > self._most_bytes:
            _, packed = self._entries.popitem(last=False)
            self.stored_bytes -= len(packed)
            self._appetite.dropped(len(self._entries))


def _opened(packed: bytes, checksum: int) -> bytes | None:
    try:
        content = unpack(packed)
    except ValueError:
        return None
    return _checked(content, checksum)


def _checked(content: bytes | None, checksum: int) -> bytes | None:
    return content if content and page_checksum(memoryview(content)) == checksum else None


class _Appetite:
    """Decides what is worth compressing: not what does not get small, nor what never comes back."""

    def __init__(self) -> None:
        self.hits = 0
        """Pages taken out since the trial began."""
        self._failures = 0
        self._until_sample = 0
        self._fruitless = False
        self._until_run = 0
        self._kept = 0

    @property
    def lost(self) -> bool:
        """Whether only samples are tried, because pages do not compress."""
        return self._failures >= FAILURES

    def portion(self, count: int) -> int:
        """Return how many pages to try of a run of `count`."""
        if self._fruitless:
            self._until_run -= 1
            if self._until_run > 0:
                return 0
            self._until_run = FRUITLESS_EVERY
        if not self.lost:
            return count
        self._until_sample -= count
        if self._until_sample > 0:
            return 0
        self._until_sample = SAMPLE_EVERY
        return 1

    def tasted(self, good: bool) -> None:
        """Take note of one page that was compressed, and whether it got small."""
        if good:
            self._failures = 0
            self._kept += 1
        else:
            self._failures += 1

    def dropped(self, entries: int) -> None:
        """Take note that an entry was dropped unused, with `entries` left: from now on one can judge."""
        if self._kept >= max(entries, TRIAL_ENTRIES):
            self._fruitless = self.hits * FRUITLESS_SHARE < self._kept
            self._kept = self.hits = 0
