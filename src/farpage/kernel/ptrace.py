"""One system call made by a thread of another process, which then goes on as if nothing had been.

The sequence, after ptrace(2) and the kernel's `kernel/ptrace.c` and `kernel/signal.c`:

1. SEIZE and INTERRUPT: the thread stops on its way to user mode. A system call that it waits in has been
   left with one of the kernel's private restart codes.
2. Its registers and signal mask are saved, all signals blocked, so that none is taken meanwhile, and
   registers set for the wanted call.
3. It runs to the entry and to the exit of that call. Stops at system calls are used and not single
   steps, since these raise SIGTRAP, and the kernel resets the disposition of a SIGTRAP that is ignored or
   blocked.
4. Registers and mask are put back and the thread is stopped once more by INTERRUPT, since only there
   the kernel looks at the restart code again. Then it is let go, and restarts what it waited in.

A thread in a group-stop (SIGSTOP) runs for the call, and the kernel puts it back into the stop when it is
let go.

All requests for one thread have to come from one thread of the tracer. When that thread ends, the kernel
lets go of the tracee, with the registers it then has. So between steps 2 and 4 nothing here raises for
reasons outside the tracee, and `farpage.kernel.inject` runs all of it in a process of its own, which the
end of its caller does not touch.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from farpage.kernel import registers_x86_64 as architecture
from farpage.kernel.libc import last_error, libc

_CONT, _DETACH, _SYSCALL = 7, 17, 24
_GETREGSET, _SETREGSET = 0x4204, 0x4205
_SEIZE, _INTERRUPT = 0x4206, 0x4207
_GETSIGMASK, _SETSIGMASK = 0x420A, 0x420B

_OPTION_SYSGOOD: Final = 1
"""Marks stops at system calls, as SIGTRAP | 0x80."""
_OPTION_SUSPEND_SECCOMP: Final = 1 << 21
_EVENT_STOP: Final = 128
_SYSCALL_STOP: Final = signal.SIGTRAP | 0x80
_NT_PRSTATUS: Final = 1
_WALL: Final = 0x40000000
_MASK_BYTES: Final = 8
_ALL_SIGNALS: Final = (1 << 64) - 1


class TraceeGone(Exception):
    """The thread ended meanwhile."""


class ForeignCode(Exception):
    """The thread executes code of another architecture than this program's."""


@dataclass(frozen=True)
class Outcome:
    """What a system call made by another thread returned, and how long that thread did not run."""

    result: int
    """A negative errno when it failed."""
    stopped_seconds: float


class _IoVector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def call_in_thread(
    thread: int,
    number: int,
    arguments: Sequence[int],
    *,
    read_memory: Callable[[int, int], bytes],
    spare_instruction: int,
    suspend_seccomp: bool = False,
    stop_within: Callable[[], None] = lambda: None,
    stopped: Callable[[], None] = lambda: None,
) -> Outcome:
    """Make one system call in a running thread.

    `read_memory(address, length)` reads the process's memory; `spare_instruction` is the address of a
    system call instruction for threads that are not in a system call of their own. `suspend_seccomp` keeps
    a filter from seeing the call (it might kill the process). `stop_within` is called before waiting for
    the stop and may arrange for an exception; `stopped` is called when the thread has stopped and nothing
    has been changed yet.

    :raise OSError: EPERM when it may not be traced or is being traced; ESRCH when there is none.
    :raise TraceeGone: when it ended meanwhile.
    :raise ForeignCode: when its registers are not this architecture's.
    """
    options = _OPTION_SYSGOOD | (_OPTION_SUSPEND_SECCOMP if suspend_seccomp else 0)
    _request(_SEIZE, thread, 0, options)
    detach_signal = 0
    try:
        stop_within()
        begin = time.perf_counter()
        _stop(thread)
        stopped()
        saved = _get_registers(thread)
        if not architecture.runs_native_code(saved):
            raise ForeignCode
        own = architecture.last_instruction_address(saved)
        # The thread's own instruction is the better one: if it ever went on from here unattended,
        # it would see an odd result of its own call instead of running into foreign code.
        is_own = read_memory(own, len(architecture.SYSCALL_INSTRUCTION)) == architecture.SYSCALL_INSTRUCTION
        instruction = own if is_own else spare_instruction
        mask = _get_mask(thread)
        _set_mask(thread, _ALL_SIGNALS)
        try:
            _set_registers(thread, architecture.for_syscall(saved, instruction, number, arguments))
            result = _run_syscall(thread)
        finally:
            _set_registers(thread, saved)
            _set_mask(thread, mask)
        detach_signal = _stop_for_restart(thread)
    finally:
        # Refused (ESRCH) when the thread is not stopped; it is let go when this thread ends.
        with suppress(OSError, TraceeGone):
            _request(_DETACH, thread, 0, detach_signal)
    return Outcome(result, time.perf_counter() - begin)


def _stop(thread: int) -> None:
    """Stop the thread by INTERRUPT; signals that come first are delivered as they would have been."""
    _request(_INTERRUPT, thread)
    while True:
        event, stop_signal = _wait(thread)
        if event == _EVENT_STOP:
            return
        # Any stop uses up a pending INTERRUPT (kernel/signal.c, ptrace_stop).
        _request(_INTERRUPT, thread)
        _request(_CONT, thread, 0, stop_signal)


def _run_syscall(thread: int) -> int:
    """Let the thread run into and out of the call that its registers hold."""
    entered = False
    pass_on = 0
    while True:
        _request(_SYSCALL, thread, 0, pass_on)
        event, stop_signal = _wait(thread)
        pass_on = 0
        if event == _EVENT_STOP:
            continue
        if stop_signal != _SYSCALL_STOP:
            # SIGSTOP alone cannot be blocked; it moves no registers, so it can take effect at once.
            pass_on = stop_signal
        elif entered:
            return architecture.syscall_result(_get_registers(thread))
        else:
            entered = True


def _stop_for_restart(thread: int) -> int:
    """Bring the thread to where the kernel handles restarts; return the signal to deliver there, or 0."""
    _request(_INTERRUPT, thread)
    _request(_CONT, thread)
    event, stop_signal = _wait(thread)
    return 0 if event else stop_signal


def _request(request: int, thread: int, address: int = 0, data: int = 0) -> None:
    if libc.ptrace(request, thread, address, data) < 0:
        error = last_error()
        if error.errno == errno.ESRCH and request != _SEIZE:
            raise TraceeGone from error
        raise error


def _wait(thread: int) -> tuple[int, int]:
    """Wait for the thread's next stop and return its ptrace event (0 for none) and signal."""
    _, status = os.waitpid(thread, _WALL)
    if not os.WIFSTOPPED(status):
        raise TraceeGone
    return status >> 16, os.WSTOPSIG(status)


def _get_registers(thread: int) -> architecture.RegisterArray:
    registers = architecture.Registers()
    vector = _IoVector(ctypes.addressof(registers), ctypes.sizeof(registers))
    _request(_GETREGSET, thread, _NT_PRSTATUS, ctypes.addressof(vector))
    return registers


def _set_registers(thread: int, registers: architecture.RegisterArray) -> None:
    vector = _IoVector(ctypes.addressof(registers), ctypes.sizeof(registers))
    _request(_SETREGSET, thread, _NT_PRSTATUS, ctypes.addressof(vector))


def _get_mask(thread: int) -> int:
    mask = ctypes.c_uint64()
    _request(_GETSIGMASK, thread, _MASK_BYTES, ctypes.addressof(mask))
    return mask.value


def _set_mask(thread: int, mask: int) -> None:
    value = ctypes.c_uint64(mask)
    _request(_SETSIGMASK, thread, _MASK_BYTES, ctypes.addressof(value))
