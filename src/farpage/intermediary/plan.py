"""What is to be copied, from two maps: what the target lacks, and what of that the source holds. Pure."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from farpage.blockio import Allocation, Extent


@dataclass(frozen=True)
class Run:
    """`length` bytes at `offset`: data to be read and written, or a hole to be made."""

    offset: int
    length: int
    hole: bool

    @property
    def stop(self) -> int:
        """The first byte after it."""
        return self.offset + self.length

    def split(self, length: int) -> tuple[Run, Run | None]:
        """Cut at most `length` bytes off its beginning; None where nothing is left."""
        if self.length <= length:
            return self, None
        rest = Run(self.offset + length, self.length - length, self.hole)
        return Run(self.offset, length, self.hole), rest


def absent(offset: int, extents: Iterable[Extent]) -> tuple[list[tuple[int, int]], int]:
    """Return the ranges (offset, length) that a target's map at `offset` says are absent, and where it ends.

    The map of a copying volume calls what is present data, and what is absent a hole.
    """
    ranges: list[tuple[int, int]] = []
    at = offset
    for extent in extents:
        if extent.allocation & Allocation.HOLE:
            if ranges and sum(ranges[-1]) == at:
                ranges[-1] = (ranges[-1][0], ranges[-1][1] + extent.length)
            else:
                ranges.append((at, extent.length))
        at += extent.length
    return ranges, at


def runs(
    ranges: Sequence[tuple[int, int]], offset: int, extents: Iterable[Extent]
) -> tuple[list[Run], list[tuple[int, int]]]:
    """Return what to copy of `ranges` as far as the source's map reaches, and the ranges beyond that.

    `extents` are the source's map from `offset` on; the ranges (offset, length) are sorted and begin there or
    later. What reads as zeros is a hole, allocated or not.
    """
    found: list[Run] = []
    left = deque(ranges)
    at = offset
    for extent in extents:
        stop = at + extent.length
        hole = bool(extent.allocation & Allocation.ZERO)
        while left and left[0][0] < stop:
            first, length = left.popleft()
            known = min(first + length, stop) - first
            if found and found[-1].stop == first and found[-1].hole == hole:
                found[-1] = Run(found[-1].offset, found[-1].length + known, hole)
            else:
                found.append(Run(first, known, hole))
            if known < length:
                left.appendleft((first + known, length - known))
        at = stop
    return found, list(left)
