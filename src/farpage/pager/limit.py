"""How much memory a client may take, and when pages must leave. No I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

SMALLEST_LIMIT_PAGES: Final = 256
"""Below a mebibyte a guest's kernel and the pager's own batches step on each other."""


@dataclass(frozen=True)
class Limit:
    """Marks on a client's pages in memory, all in pages.

    Page-outs begin above `high`, so that a fault finds room, and go on down to `low`. No page is brought
    in above `most`; the difference to `pages` absorbs what a batch of faults brings at once.
    """

    pages: int

    @property
    def _headroom(self) -> int:
        return min(max(self.pages // 16, 32), 1024)

    @property
    def in_flight(self) -> int:
        """Most pages on their way to the volume, not counting those held back from a failed server.

        Held pages take memory until that server is fenced, so they must stay a small share of the limit.
        """
        return min(max(self.pages // 8, 64), 2048)

    @property
    def most(self) -> int:
        """No fault is answered above this."""
        return self.pages + self.pages // 64

    @property
    def high(self) -> int:
        """Page-outs begin above this."""
        return self.pages - self._headroom

    @property
    def low(self) -> int:
        """Page-outs end at this."""
        return self.pages - 2 * self._headroom
