"""States of a path and of a replica, in the words that users see."""

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


class ReplicaHealth(enum.StrEnum):
    """What a replica is good for at the moment, in the words that users see."""

    IN_SYNC = "in_sync"
    """Has every acknowledged page."""
    STALE = "stale"
    """Has missed pages, and cannot be written to now."""
    RESYNCING = "resyncing"
    """Gets every new page, and meanwhile what it has missed."""
