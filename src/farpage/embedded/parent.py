"""Ties a child daemon's life to its parent's, so that a killed `farpage up` leaves nothing behind."""

from __future__ import annotations

import os
import signal
import sys

from farpage.kernel.libc import libc

PARENT_VARIABLE = "FARPAGE_PARENT_PID"
"""Names the process that a daemon must not outlive."""

_PR_SET_PDEATHSIG = 1


def follow_parent() -> None:
    """Have the kernel kill this process when the parent named by FARPAGE_PARENT_PID dies (prctl(2)).

    The variable is removed, so that it does not bind this process's own children to somebody else's parent.
    """
    parent = os.environ.pop(PARENT_VARIABLE, "")
    if not parent:
        return
    libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    # The parent may have died before the call.
    if str(os.getppid()) != parent:
        sys.exit(1)
