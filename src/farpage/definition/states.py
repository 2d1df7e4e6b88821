"""The words of the definition that data workers need too: they do not load the model for them."""

from __future__ import annotations

import enum

PAGE_BYTES = 4096


class ReplicaState(enum.StrEnum):
    """What a replica's contents are worth."""

    IN_SYNC = "in_sync"
    STALE = "stale"
    COPYING = "copying"
    RETIRED = "retired"


class Redundancy(enum.StrEnum):
    """What a client's volume survives: nothing, the loss of a path, or the loss of a device too."""

    NONE = "none"
    PATH = "path"
    MIRROR = "mirror"
