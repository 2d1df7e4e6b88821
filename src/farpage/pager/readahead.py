"""How many pages to fetch at a fault: windows that grow while they are used. No I/O.

`_readahead.pyx` is the same as machine code and is used where it was built.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Protocol

from farpage.pager.compiled import COMPILED

LARGEST_WINDOW_PAGES: Final = 64
STREAMS: Final = 8
"""Sequential streams that are followed at a time."""


class ReadAhead(Protocol):
    """Finds rising sequential streams among faults; a fault outside of all gets its page alone."""

    def window(self, page: int) -> int:
        """Return how many pages from `page` on to bring in, at least one, and remember it."""


def new_read_ahead(largest_window_pages: int = LARGEST_WINDOW_PAGES, *, gaps: bool = True) -> ReadAhead:
    """Return the compiled one if that is possible here.

    A stream may leave out pages, as many as its window has; with `gaps` False it may not.
    """
    make = COMPILED.read_ahead if COMPILED else PythonReadAhead
    return make(largest_window_pages, gaps=gaps)


@dataclass(slots=True, eq=False)
class _Stream:
    """A rising run of faults: the last one, and the page behind the window that it was given."""

    last_page: int
    next_page: int
    window: int


class PythonReadAhead:
    """It without a compiler."""

    def __init__(self, largest_window_pages: int = LARGEST_WINDOW_PAGES, *, gaps: bool = True) -> None:
        self._largest = largest_window_pages
        self._gaps = gaps
        self._streams: list[_Stream] = []

    def window(self, page: int) -> int:
        """See `ReadAhead`."""
        streams = self._streams
        for stream in streams:
            # Before the window's end it counts too, when less than the window was brought in; and a
            # little beyond it, when pages in between were in memory already.
            reach = stream.next_page + stream.window if self._gaps else stream.next_page
            if stream.last_page < page <= reach:
                stream.window = min(stream.window * 2, self._largest)
                stream.last_page = page
                stream.next_page = page + stream.window
                streams.remove(stream)
                streams.append(stream)
                return stream.window
        if len(streams) >= STREAMS:
            del streams[0]
        streams.append(_Stream(page, page + 1, 1))
        return 1
