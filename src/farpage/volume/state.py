"""States of a path, in the words that users see."""

from __future__ import annotations

import enum


class PathState(enum.StrEnum):
    """What a path from a client over a VIOS to its volume is good for."""

    ACTIVE = "active"
    """Carries the client's commands."""
    STANDBY = "standby"
    """Connected and probed; takes over when the active path fails."""
    SUSPECT = "suspect"
    """A command is older than `path_timeout`, and no other path could take over yet."""
    FAILED = "failed"
    """Not usable; tried again with growing pauses."""
