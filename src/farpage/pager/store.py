"""What the RAM tier keeps: pages made small, by their number and by their age. No I/O.

There are two that do the same: `PythonStore`, and the compiled one of `farpage.pager._store`, which is used
where it was built and the libraries that it calls are found.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final, Protocol

from farpage.pager.checksum import page_checksum
from farpage.pager.compiled import COMPILED, libraries
from farpage.pager.compression import pack, unpack
from farpage.pager.table import PAGE_BYTES

FAILURES: Final = 8
"""A run is given up with so many pages in a row that do not compress."""

MOST_HELD: Final = 16
"""Pages that are held as they are."""


class Store(Protocol):
    """Pages made small. What they take is bounded: the oldest leave first. Beside them a few as they are."""

    def __len__(self) -> int:
        """Return the pages that it holds made small."""

    def __contains__(self, page: int) -> bool:
        """Tell whether it holds a page."""

    @property
    def stored_bytes(self) -> int:
        """Size of all contents as they are kept."""

    @property
    def taken_bytes(self) -> int:
        """Memory that they take; without those that are held as they are."""

    @property
    def held(self) -> int:
        """Pages that are held as they are, at most MOST_HELD."""

    @property
    def failures(self) -> int:
        """Pages that did not get small since one did."""

    @property
    def kept(self) -> int:
        """Pages that got small and were taken in, ever."""

    @property
    def given(self) -> int:
        """Pages that were taken out, ever."""

    @property
    def dropped(self) -> int:
        """Pages that left unused to make room, ever."""

    def keep(self, first: int, content: memoryview) -> int:
        """Take a run of whole pages in, those that get small, and return how many did."""

    def hold(self, page: int, content: memoryview | bytes) -> None:
        """Take in one page as it is, whatever there is room for, in the place of an older content.

        With more than MOST_HELD of them the oldest leaves.

        :raise ValueError: it is not a whole page.
        """

    def take(self, page: int, checksum: int) -> bytes | None:
        """Give a page and hold it no more; None when it is not here, or is not what has this checksum."""

    def look(self, page: int, checksum: int) -> bytes | None:
        """Return a page and go on holding it; None as for `take`."""

    def forget(self, first: int, count: int = 1) -> None:
        """Drop those of a range of pages that are here."""

    def resize(self, most_bytes: int) -> None:
        """Change how much it may take."""

    def clear(self) -> None:
        """Drop everything."""


class PythonStore:
    """The store without a compiler."""

    ENTRY_BYTES: Final = 320
    """What an entry takes beside its content: measured, a dictionary's link and key, and what malloc adds."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._entries: OrderedDict[int, bytes] = OrderedDict()
        self._held: dict[int, bytes] = {}
        self.stored_bytes = self.failures = self.kept = self.given = self.dropped = 0

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, page: int) -> bool:
        return page in self._entries or page in self._held

    @property
    def taken_bytes(self) -> int:
        """See `Store`."""
        return self.stored_bytes + len(self._entries) * self.ENTRY_BYTES

    @property
    def held(self) -> int:
        """See `Store`."""
        return len(self._held)

    def hold(self, page: int, content: memoryview | bytes) -> None:
        """See `Store`."""
        if len(content) != PAGE_BYTES:
            raise ValueError(f"a page of {len(content)} bytes")
        self.forget(page)
        if len(self._held) >= MOST_HELD:
            del self._held[next(iter(self._held))]
        self._held[page] = bytes(content)

    def keep(self, first: int, content: memoryview) -> int:
        """Take a run of whole pages in, those that get small, and return how many did."""
        kept = 0
        for offset in range(0, len(content) - PAGE_BYTES + 1, PAGE_BYTES):
            page = first + offset // PAGE_BYTES
            self.forget(page)
            packed = pack(content[offset : offset + PAGE_BYTES])
            if packed is not None:
                self._entries[page] = packed
                self.stored_bytes += len(packed)
                self.failures = 0
                kept += 1
            else:
                self.failures += 1
                if self.failures >= FAILURES:
                    break
        self.kept += kept
        self._trim()
        return kept

    def take(self, page: int, checksum: int) -> bytes | None:
        """Give a page and hold it no more; None when it is not here, or is not what has this checksum."""
        if self._held and (held := self._held.pop(page, None)) is not None:
            return _checked(held, checksum)
        packed = self._entries.pop(page, None)
        if packed is None:
            return None
        self.stored_bytes -= len(packed)
        content = _opened(packed, checksum)
        if content is not None:
            self.given += 1
        return content

    def look(self, page: int, checksum: int) -> bytes | None:
        """Return a page and go on holding it; None as for `take`."""
        if self._held and (held := self._held.get(page)) is not None:
            return _checked(held, checksum)
        packed = self._entries.get(page)
        return None if packed is None else _opened(packed, checksum)

    def forget(self, first: int, count: int = 1) -> None:
        """Drop those of a range of pages that are here."""
        entries = self._entries
        pages: Sequence[int] = range(first, first + count)
        for page in [page for page in self._held if page in pages]:
            del self._held[page]
        if count > len(entries):
            pages = [page for page in entries if page in pages]
        for page in pages:
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
            self.dropped += 1


ENTRY_BYTES: Final = COMPILED.store.ENTRY_BYTES if COMPILED else PythonStore.ENTRY_BYTES
"""What an entry takes beside its content, on average."""


def new_store(most_bytes: int) -> Store:
    """Return a store that takes at most `most_bytes`: the compiled one if that is possible here."""
    called = libraries() if COMPILED else None
    return COMPILED.store(most_bytes, *called) if COMPILED and called else PythonStore(most_bytes)


def _opened(packed: bytes, checksum: int) -> bytes | None:
    try:
        content = unpack(packed)
    except ValueError:
        return None
    return _checked(content, checksum)


def _checked(content: bytes, checksum: int) -> bytes | None:
    return content if page_checksum(memoryview(content)) == checksum else None
