"""Figures of several rounds: medians, ranges, and ratios taken within a round. No I/O."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Self, TypeVar

from pydantic import BaseModel, ConfigDict

Item = TypeVar("Item")


class Spread(BaseModel):
    """A figure over the rounds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Self:
        """Summarize one value a round; at least one."""
        return cls(median=statistics.median(values), lowest=min(values), highest=max(values))

    def text(self, decimals: int = 0) -> str:
        """Return `median (lowest-highest)`."""
        return f"{self.median:.{decimals}f} ({self.lowest:.{decimals}f}-{self.highest:.{decimals}f})"


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread | None:
    """Compare round by round, since what else the machine did then met both; None where a value is 0."""
    if not all(theirs):
        return None
    return Spread.of([our / their for our, their in zip(ours, theirs, strict=True)])


def turns(contenders: Sequence[Item], number: int) -> list[Item]:
    """Return the order of a round: each begins in turn, so that none is always first."""
    first = number % len(contenders)
    return [*contenders[first:], *contenders[:first]]
