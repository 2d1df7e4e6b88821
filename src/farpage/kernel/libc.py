"""The C library through ctypes, and the system call numbers of each architecture.

Everything that depends on the architecture's numbering is in `SyscallNumbers`, so that a new one is
a new table. The numbers are those of the kernel's `arch/x86/entry/syscalls/syscall_64.tbl` and, from 403
on, common to all architectures.
"""

from __future__ import annotations

import ctypes
import os
import platform
from dataclasses import dataclass
from functools import cache

from farpage.errors import Unsupported


@dataclass(frozen=True)
class SyscallNumbers:
    """The numbers of the calls that farpage makes without a wrapper in the C library."""

    close: int
    userfaultfd: int
    pidfd_getfd: int
    io_uring_setup: int
    io_uring_enter: int
    io_uring_register: int
    io_setup: int
    io_getevents: int
    io_submit: int
    sched_setattr: int


_NUMBERS = {
    "x86_64": SyscallNumbers(
        close=3,
        io_setup=206,
        io_getevents=208,
        io_submit=209,
        sched_setattr=314,
        userfaultfd=323,
        io_uring_setup=425,
        io_uring_enter=426,
        io_uring_register=427,
        pidfd_getfd=438,
    ),
}


@cache
def syscall_numbers() -> SyscallNumbers:
    """Return the table of this machine.

    :raise Unsupported: on an architecture without one.
    """
    machine = platform.machine()
    numbers = _NUMBERS.get(machine)
    if numbers is None:
        raise Unsupported(
            "paging on this machine",
            f"no system call numbers are known for {machine!r}",
            f"use one of: {', '.join(_NUMBERS)}",
        )
    return numbers


libc = ctypes.CDLL(None, use_errno=True)
"""Calls release the interpreter lock; `ctypes.get_errno()` has errno."""

libc.syscall.restype = ctypes.c_long
libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]
libc.mlockall.argtypes = [ctypes.c_int]
libc.mmap.argtypes = [
    *(ctypes.c_void_p, ctypes.c_size_t),
    *(ctypes.c_int, ctypes.c_int, ctypes.c_int),
    ctypes.c_int64,
]
libc.mmap.restype = ctypes.c_void_p
libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
libc.ptrace.restype = ctypes.c_long


def syscall(number: int, *arguments: int) -> int:
    """Make a system call with integer arguments and return its result.

    :raise OSError: with its errno.
    """
    result: int = libc.syscall(ctypes.c_long(number), *(ctypes.c_long(value) for value in arguments))
    if result < 0:
        raise last_error()
    return result


def last_error() -> OSError:
    """Return errno of the thread's last call through `libc` as an exception to raise."""
    error = ctypes.get_errno()
    return OSError(error, os.strerror(error))
