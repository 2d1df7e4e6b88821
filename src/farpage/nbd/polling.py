"""When an event loop should look for events for a moment before it goes to sleep. No I/O."""

from __future__ import annotations

from typing import Final

POLL_SECONDS: Final = 100e-6
"""How long it looks: a page's read from a fast disk, or what waking a sleeping core twice takes."""
LEAST_PAUSE_WAITS: Final = 16
LONGEST_PAUSE_WAITS: Final = 4096
_MOST_SCORE: Final = 4


class Polling:
    """Learns from the waits of one event loop whether its events come soon.

    A thread that sleeps is woken tens of microseconds late where its core has gone to sleep too; one that
    looks again and again is not, but keeps its core busy. So only waits that follow short ones are polled;
    and after one in vain, as on a core that the other side needs to run on, none for a number of waits that
    doubles with each.
    """

    def __init__(self, seconds: float = POLL_SECONDS) -> None:
        """`seconds` is how long its thread looks."""
        self.seconds: Final = seconds
        self.worthwhile = False
        """Whether the next wait should be polled."""
        self._score = 0
        self._pause_waits = LEAST_PAUSE_WAITS
        self._left_waits = 0
        """Waits that are not polled, whatever they are like."""

    def found(self) -> None:
        """Take note of events that came while they were looked for."""
        if self._pause_waits > LEAST_PAUSE_WAITS:
            self._pause_waits -= 1

    def missed(self) -> None:
        """Take note that none came in that time."""
        self.worthwhile = False
        self._left_waits = self._pause_waits
        self._pause_waits = min(self._pause_waits * 2, LONGEST_PAUSE_WAITS)

    def slept(self, seconds: float) -> None:
        """Take note of a wait that was not polled, or not in time."""
        if seconds >= self.seconds:
            self._score = max(self._score - 2, -_MOST_SCORE)
        elif self._score < _MOST_SCORE:
            self._score += 1
        if self._left_waits:
            self._left_waits -= 1
        else:
            self.worthwhile = self._score > 0
