"""When a daemon that died is started again."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class RestartBackoff:
    """Pauses that double with each death soon after a start, and begin anew after a long life."""

    first_seconds: float = 0.1
    longest_seconds: float = 10.0
    settled_seconds: float = 30.0
    """A life this long counts as a success."""
    _next_seconds: float = 0.0

    def pause_after(self, lifetime_seconds: float) -> float:
        """Return how long to wait before the next start, given how long the last life was."""
        if lifetime_seconds >= self.settled_seconds or self._next_seconds == 0.0:
            self._next_seconds = self.first_seconds
        pause = self._next_seconds
        self._next_seconds = min(self._next_seconds * 2, self.longest_seconds)
        return pause
