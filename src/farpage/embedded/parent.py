"""Ties a child daemon's life to its parent's, so that a killed `farpage up` leaves nothing behind."""

from __future__ import annotations

import os

from farpage.kernel.parent import end_with_parent

PARENT_VARIABLE = "FARPAGE_PARENT_PID"
"""Names the process that a daemon must not outlive."""


def follow_parent() -> None:
    """Have the kernel kill this process when the parent named by FARPAGE_PARENT_PID dies.

    The variable is removed, so that it does not bind this process's own children to somebody else's parent.
    """
    parent = os.environ.pop(PARENT_VARIABLE, "")
    if parent:
        end_with_parent(int(parent))
