"""What the daemons on the page-out path do to themselves at their start."""

from __future__ import annotations

import gc
import os
import resource
import sys
from contextlib import suppress
from pathlib import Path

from farpage.errors import FarpageError
from farpage.kernel.memory import lock_memory
from farpage.kernel.process import set_oom_score_adjustment
from farpage.log import get_logger

OOM_SCORE_ADJUSTMENT = -900
"""The kernel kills other processes first: memory is freed by these daemons."""

NICENESS = -10
"""On a host whose cores are all busy a page-in would wait for several time slices otherwise."""

CONTROL_NICENESS = -5
"""Of the control process, before guests and behind pagers: what a mirror that has lost a replica pages out
waits until that is recorded."""

SWITCH_SECONDS = 0.0002
"""A thread that computes lets another one go on after this time. It is 5 ms by default, which commands of
clients would wait for after each of their system calls while the control API answers."""

log = get_logger()


def begin_to_start() -> None:
    """Share the interpreter between threads fairly, and collect no garbage until `started`.

    What is loaded stays, and looking through it takes time.
    """
    sys.setswitchinterval(SWITCH_SECONDS)
    gc.disable()


def started() -> None:
    """Collect garbage from now on, but without looking through all that was loaded: pages would wait."""
    gc.freeze()
    gc.enable()


def allow_descriptors() -> None:
    """Let this process, and those that it starts, have as many descriptors as the hard limit says.

    The soft one, 1024 mostly, is for programs that use select(2).
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def prepare_for_paging() -> None:
    """Lock this process's memory, spare it from the OOM killer and let it run early, as far as allowed.

    Paging out must not need memory that paging out has to free, and a guest waits for each wake-up.
    """
    try:
        lock_memory()
    except FarpageError as error:
        log.warning("memory_not_locked", problem=str(error))
    try:
        set_oom_score_adjustment(OOM_SCORE_ADJUSTMENT)
    except OSError as error:
        log.warning("oom_score_not_lowered", problem=str(error))
    run_early(NICENESS)


def run_early(niceness: int) -> None:
    """Raise the priority of this process, of each of its threads (setpriority(2), C library differences)."""
    try:
        for thread in Path("/proc/self/task").iterdir():
            with suppress(ProcessLookupError):  # it has ended
                os.setpriority(os.PRIO_PROCESS, int(thread.name), niceness)
    except OSError as error:
        log.warning("priority_not_raised", problem=str(error))
