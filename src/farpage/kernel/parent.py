"""A process that does not outlive the one that started it."""

from __future__ import annotations

import os
import signal
import sys

from farpage.kernel.libc import libc

_PR_SET_PDEATHSIG = 1


def end_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends (prctl(2), PR_SET_PDEATHSIG).

    `parent` is the process that should be the parent; when it has died already, this one exits with 1.
    """
    libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    # The parent may have died before the call.
    if os.getppid() != parent:
        sys.exit(1)
