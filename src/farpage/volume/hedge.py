"""How fast a replica answers, and how many reads may be repeated to be faster. No I/O."""

from __future__ import annotations

import math
from typing import Final

EXTRA_READS: Final = 0.05
"""Hedged reads for each read; never more."""
MOST_SAVED: Final = 64.0
"""Hedged reads that a quiet time can save up."""
ENOUGH_SAMPLES: Final = 32
"""Before these nobody knows what is late."""

_WEIGHT: Final = 0.1
_BUCKETS_PER_OCTAVE: Final = 4
_BUCKETS: Final = 30 * _BUCKETS_PER_OCTAVE
"""From 1 us to 18 minutes."""
_MOST_SAMPLES: Final = 4096


class Latency:
    """Times that one replica took to answer reads, the newer ones counting more."""

    def __init__(self) -> None:
        self.mean_seconds = 0.0
        """Moving average; 0 before the first answer."""
        self._counts = [0] * _BUCKETS
        self._samples = 0

    def answered(self, seconds: float) -> None:
        """Take one answer into account."""
        mean = self.mean_seconds
        self.mean_seconds = mean + (seconds - mean) * _WEIGHT if mean else seconds
        microseconds = seconds * 1e6
        bucket = int(math.log2(microseconds) * _BUCKETS_PER_OCTAVE) if microseconds > 1 else 0
        self._counts[min(bucket, _BUCKETS - 1)] += 1
        self._samples += 1
        if self._samples >= _MOST_SAMPLES:
            self._counts = [count // 2 for count in self._counts]
            self._samples = sum(self._counts)

    def waited(self, seconds: float) -> None:
        """Take into account that a read waits for that long already."""
        self.mean_seconds = max(self.mean_seconds, seconds)

    def rested(self, factor: float) -> None:
        """Forget a little of how slow it was: what is not asked does not show that it has become fast."""
        self.mean_seconds *= factor

    def p99_seconds(self) -> float:
        """Return the time within which 99 % were answered; infinite while too few were."""
        if self._samples < ENOUGH_SAMPLES:
            return math.inf
        above = self._samples // 100
        for bucket in range(_BUCKETS - 1, -1, -1):
            above -= self._counts[bucket]
            if above < 0:
                return float(2 ** ((bucket + 1) / _BUCKETS_PER_OCTAVE) * 1e-6)
        return math.inf


class HedgeBudget:
    """Keeps the hedged reads to a small share of all reads."""

    def __init__(self) -> None:
        self._saved = 0.0

    def read(self) -> None:
        """Count one read."""
        self._saved = min(self._saved + EXTRA_READS, MOST_SAVED)

    def spend(self) -> bool:
        """Take one hedged read out of the budget, if it holds one."""
        if self._saved < 1:
            return False
        self._saved -= 1
        return True
