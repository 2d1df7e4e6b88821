"""One command that a client has sent, and what has come of its reply so far. No I/O."""

from __future__ import annotations

import bisect
from typing import Final

from farpage.blockio import Done, Extent, ExtentsDone, ReadDone
from farpage.nbd.codec import ProtocolViolation

_FRAGMENTS_MAX: Final = 1 << 16


class Command:
    """One command in flight."""

    __slots__ = (
        "command",
        "covered",
        "data",
        "error",
        "extents",
        "into",
        "length",
        "offset",
        "on_done",
        "on_extents",
        "on_read",
        "parts",
        "started",
    )

    def __init__(self, command: int, offset: int, length: int, started: float) -> None:
        self.command = command
        self.offset = offset
        self.length = length
        self.started = started
        """The loop's time in seconds."""
        self.on_read: ReadDone | None = None
        self.on_done: Done | None = None
        self.on_extents: ExtentsDone | None = None
        self.error = 0
        """The first that it was answered with so far."""
        self.parts = 0
        """Replies that are still to come where it stands for several WRITEs; 0 where it is one command."""
        self.into: memoryview | None = None
        """Where a READ's reply is to be put together; None for a buffer of its own."""
        self.data: memoryview | None = None
        """Where the reply is put together if it does not come in one piece."""
        self.covered: list[tuple[int, int]] = []
        """Ranges of `data` (start, stop) that have arrived: disjoint, sorted, none touching the next."""
        self.extents: list[Extent] | None = None

    def finish(self, error: int, payload: memoryview | None = None) -> None:
        """Call the command's callback."""
        if self.on_read is not None:
            self.on_read(error, payload)
        elif self.on_extents is not None:
            self.on_extents(error, None if error else self.extents)
        elif self.on_done is not None:
            self.on_done(error)

    def assembly(self) -> memoryview:
        """Return the buffer for the whole of a READ."""
        if self.data is None:
            self.data = self.into if self.into is not None else memoryview(bytearray(self.length))
        return self.data

    def cover(self, start: int, stop: int) -> None:
        """Record that a chunk filled `data[start:stop]`.

        :raise ProtocolViolation: if an earlier chunk did so, or the reply is in absurdly many pieces.
        """
        covered = self.covered
        at = bisect.bisect_left(covered, (start, stop))
        before = at > 0 and covered[at - 1][1] >= start
        after = at < len(covered) and covered[at][0] <= stop
        if (before and covered[at - 1][1] > start) or (after and covered[at][0] < stop):
            raise ProtocolViolation("two chunks of a reply overlap")
        if before:
            start = covered[at - 1][0]
        if after:
            stop = covered[at][1]
        covered[at - before : at + after] = [(start, stop)]
        if len(covered) > _FRAGMENTS_MAX:
            raise ProtocolViolation("a reply is in too many pieces")
