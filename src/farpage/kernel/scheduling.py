"""How soon a thread gives its core to another one: sched_setattr(2).

Since Linux 6.12 a thread of the fair class may ask for a slice of its own, `sched_runtime`, of 0.1 to 100 ms.
One that wakes takes the core at once from a thread with a longer slice than its own, if it is owed time, but
in general not from one with the same (kernel/sched/fair.c, check_preempt_wakeup_fair). The share of the core
that a thread gets in the long run does not depend on it. Older kernels do not look at the field.
"""

from __future__ import annotations

import ctypes
import os
import struct
from typing import Final

from farpage.kernel.libc import syscall, syscall_numbers

LONGEST_SLICE_SECONDS: Final = 0.1

_ATTRIBUTES = struct.Struct("=IIQiIQQQ")  # struct sched_attr, as far as SCHED_ATTR_SIZE_VER0


def set_slice(seconds: float) -> None:
    """Give the calling thread a slice of its own, or with 0 the usual one; nothing but in the fair class.

    :raise OSError: the kernel refuses.
    :raise Unsupported: on an architecture without numbers of system calls.
    """
    policy = os.sched_getscheduler(0)
    if policy not in (os.SCHED_OTHER, os.SCHED_BATCH):
        return
    nice = os.getpriority(os.PRIO_PROCESS, 0)  # the thread's, in spite of the name
    attributes = ctypes.create_string_buffer(
        _ATTRIBUTES.pack(_ATTRIBUTES.size, policy, 0, nice, 0, int(seconds * 1e9), 0, 0)
    )
    syscall(syscall_numbers().sched_setattr, 0, ctypes.addressof(attributes), 0)
