"""How much memory a client may take, and when pages must leave. No I/O."""

from __future__ import annotations

from typing import Final

LARGEST_TIER_PERCENT: Final = 50
"""The most of a limit that compressed pages may take; what is left must hold what a client works with."""

DEFAULT_TIER_PERCENT: Final = 10

SMALLEST_LIMIT_PAGES: Final = 256
"""Below a mebibyte a guest's kernel and the pager's own batches step on each other."""

SMALLEST_HEADROOM_PAGES: Final = 32
LARGEST_HEADROOM_PAGES: Final = 1024
LEAD_SECONDS: Final = 0.05
"""Page-outs begin so long before a client comes to its limit, at the pace at which it takes pages: some round
trips to a device, and what a VIOS' loop is behind under load."""

SMALLEST_AHEAD_PAGES: Final = 8

IN_FLIGHT_MAX: Final = 1024
"""Half of the commands that a VIOS takes of one connection at a time, should each page be one: all may wait
for the intermediate client of a move, and pages that are present are read all the same."""


class Limit:
    """Marks on a client's pages in memory, all in pages and in rising order: low, high, pages, most.

    How far low and high are below the limit follows the client's pace: memory that is kept free for one that
    takes little would be of no use to anybody.
    """

    def __init__(self, pages: int, largest_headroom: int | None = None) -> None:
        """Make the marks of a client that takes pages as fast as any.

        Without a `largest_headroom` high is at most a sixteenth below the limit.
        """
        self.pages: Final = pages
        """The limit itself."""
        self._largest_headroom: Final = largest_headroom or min(
            max(pages // 16, SMALLEST_HEADROOM_PAGES), LARGEST_HEADROOM_PAGES
        )
        self._set_headroom(self._largest_headroom)
        self.most: Final = pages + pages // 64
        """No fault is answered above this; what a batch of faults brings at once may exceed the limit."""
        self.reading: Final = pages // 2
        """Most pages on their way into memory: what has come is used before it has to leave for others."""
        self.ahead: Final = max(pages // 16, SMALLEST_AHEAD_PAGES)
        """Most pages that are read ahead of one access."""
        self.in_flight: Final = min(max(pages // 8, 64), IN_FLIGHT_MAX)
        """Most pages on their way to the volume, not counting those held back from a failed server.

        Held pages take memory until that server is fenced, so they must stay a small share of the limit.
        """

    def _set_headroom(self, pages: int) -> None:
        self._headroom = pages
        self.low = self.pages - 2 * pages
        """Page-outs end at this."""
        self.high = self.pages - pages
        """Page-outs begin above this, so that a fault finds room."""

    def follow(self, pages: int, seconds: float) -> None:
        """Set low and high by the pages that the client took in the time since they were set last.

        They go down at once and up by steps, as a client that pauses goes on without notice.
        """
        if seconds <= 0:
            return
        needed = int(min(pages / seconds * LEAD_SECONDS, self._largest_headroom))
        least = max(needed, self._headroom * 3 // 4, SMALLEST_HEADROOM_PAGES)
        self._set_headroom(min(least, self._largest_headroom))
