"""A thread's registers on x86-64, as PTRACE_GETREGSET gives them for NT_PRSTATUS.

The layout is `struct user_regs_struct` of `arch/x86/include/asm/user_64.h`; the system call convention is in
syscall(2). A module for another architecture offers the same names.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Final, TypeAlias

ELF_MACHINE: Final = 62
"""EM_X86_64."""

SYSCALL_INSTRUCTION: Final = b"\x0f\x05"

REGISTER_NAMES: Final = (
    *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8"),
    *("rax", "rcx", "rdx", "rsi", "rdi", "orig_rax", "rip", "cs", "eflags", "rsp", "ss"),
    *("fs_base", "gs_base", "ds", "es", "fs", "gs"),
)
_INDEX = {name: index for index, name in enumerate(REGISTER_NAMES)}
_ARGUMENTS = tuple(_INDEX[name] for name in ("rdi", "rsi", "rdx", "r10", "r8", "r9"))
_RAX, _ORIG_RAX, _RIP, _CS = (_INDEX[name] for name in ("rax", "orig_rax", "rip", "cs"))
_USER_64_BIT_CODE: Final = 0x33
"""__USER_CS of `arch/x86/include/asm/segment.h`."""
_NO_SYSCALL: Final = (1 << 64) - 1

RegisterArray: TypeAlias = ctypes.Array[ctypes.c_uint64]
Registers = ctypes.c_uint64 * len(REGISTER_NAMES)


def runs_native_code(registers: RegisterArray) -> bool:
    """Tell whether the thread executes 64-bit code, so that the system call numbers are right for it."""
    return int(registers[_CS]) == _USER_64_BIT_CODE


def last_instruction_address(registers: RegisterArray) -> int:
    """Return where the system call instruction is, if the thread stopped in or just after a system call."""
    return int(registers[_RIP]) - len(SYSCALL_INSTRUCTION)


def for_syscall(
    saved: RegisterArray, instruction: int, number: int, arguments: Sequence[int]
) -> RegisterArray:
    """Return registers with which the thread makes a system call by the instruction at an address."""
    registers = Registers(*saved)
    registers[_RIP] = instruction
    registers[_RAX] = number
    # Without this the kernel would take the thread to be inside the call that it was
    # stopped in, and restart that one (arch/x86/kernel/signal.c, arch_do_signal_or_restart).
    registers[_ORIG_RAX] = _NO_SYSCALL
    for index, value in zip(_ARGUMENTS, arguments, strict=False):
        registers[index] = value & _NO_SYSCALL
    return registers


def syscall_result(registers: RegisterArray) -> int:
    """Return what the system call that just ended returned: a negative errno when it failed."""
    return ctypes.c_int64(registers[_RAX]).value
