"""Keeps a copy to a bandwidth, and knows how fast it goes. No I/O; times are loop seconds."""

from __future__ import annotations

from typing import Final

_WINDOW_SECONDS: Final = 2.0


class Pace:
    """Bytes that may leave now, and bytes that have left lately."""

    def __init__(self, bytes_per_second: float) -> None:
        self.bytes_per_second = bytes_per_second
        self._free_at = 0.0
        self._before = (0.0, 0)
        self._now = (0.0, 0)
        self._total = 0

    def delay(self, now_seconds: float) -> float:
        """Return how long to wait before the next bytes may leave; 0 for not at all."""
        return max(self._free_at - now_seconds, 0.0)

    def took(self, length_bytes: int, now_seconds: float) -> None:
        """Count bytes that leave now."""
        self._free_at = max(self._free_at, now_seconds) + length_bytes / self.bytes_per_second

    def copied(self, length_bytes: int, now_seconds: float) -> None:
        """Count bytes that have arrived."""
        self._total += length_bytes
        if now_seconds - self._now[0] >= _WINDOW_SECONDS:
            self._before, self._now = self._now, (now_seconds, self._total - length_bytes)

    def rate(self, now_seconds: float) -> float:
        """Return the bytes a second of the last seconds."""
        since, at = self._before if self._before[0] else self._now
        elapsed = now_seconds - since
        return (self._total - at) / elapsed if since and elapsed > 0.01 else 0.0
