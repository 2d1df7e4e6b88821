"""How far a scrub has come. No I/O."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class ScrubState(enum.StrEnum):
    """How a scrub stands, in the words that users see."""

    RUNNING = "running"
    FINISHED = "finished"
    STOPPED = "stopped"


@dataclass
class ScrubProgress:
    """What a scrub has done. A page counts in `wrong_pages` once for each replica that had other content."""

    rate_bytes: int
    pages_total: int
    started_seconds: float
    """Loop seconds (CLOCK_MONOTONIC), like `ended_seconds`."""
    state: ScrubState = ScrubState.RUNNING
    pages_done: int = 0
    """Pages looked at, whether stored or not, up to `pages_total`."""
    compared_pages: int = 0
    """Pages read and compared, on each replica."""
    wrong_pages: int = 0
    repaired_pages: int = 0
    lost_pages: int = 0
    """Pages that are right on no replica, nor in memory."""
    ended_seconds: float | None = None
