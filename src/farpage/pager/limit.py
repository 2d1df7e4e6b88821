"""How much memory a client may take, and when pages must leave. No I/O."""

from __future__ import annotations

from typing import Final

LARGEST_TIER_PERCENT: Final = 50
"""The most of a limit that compressed pages may take; what is left must hold what a client works with."""

DEFAULT_TIER_PERCENT: Final = 10

SMALLEST_LIMIT_PAGES: Final = 256
"""Below a mebibyte a guest's kernel and the pager's own batches step on each other."""

IN_FLIGHT_MAX: Final = 1024
"""Half of the commands that a VIOS takes of one connection at a time, should each page be one: all may wait
for the intermediate client of a move, and pages that are present are read all the same."""


class Limit:
    """Marks on a client's pages in memory, all in pages and in rising order: low, high, pages, most."""

    def __init__(self, pages: int) -> None:
        headroom = min(max(pages // 16, 32), 1024)
        self.pages: Final = pages
        """The limit itself."""
        self.low: Final = pages - 2 * headroom
        """Page-outs end at this."""
        self.high: Final = pages - headroom
        """Page-outs begin above this, so that a fault finds room."""
        self.most: Final = pages + pages // 64
        """No fault is answered above this; what a batch of faults brings at once may exceed the limit."""
        self.reading: Final = pages // 2
        """Most pages on their way into memory: what has come is used before it has to leave for others."""
        self.in_flight: Final = min(max(pages // 8, 64), IN_FLIGHT_MAX)
        """Most pages on their way to the volume, not counting those held back from a failed server.

        Held pages take memory until that server is fenced, so they must stay a small share of the limit.
        """
