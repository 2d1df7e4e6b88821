"""The process that makes a system call inside another one.

    python -m farpage.kernel.injector PID NUMBER ARGUMENT...

It is a process of its own so that a caller killed at any instant cannot leave a thread with the wrong
registers, and so that nothing else the caller does lengthens the stop. It uses the standard
library alone, to start fast, and prints one line: `ok RESULT STOPPED_SECONDS`, or `error KIND ERRNO`.
"""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from farpage.kernel import registers_x86_64 as architecture
from farpage.kernel.process import read_maps, read_status, read_threads
from farpage.kernel.ptrace import ForeignCode, Outcome, TraceeGone, call_in_thread

STOP_TIMEOUT_SECONDS = 0.5
"""How long a thread may take to stop, before another one is tried."""

THREADS_TRIED = 8

_IOCTL = 16
_CHUNK_BYTES = 1 << 20


class _StopTimeout(Exception):
    """The thread did not stop in time: it is in an uninterruptible wait."""


class _Failed(Exception):
    """`error KIND ERRNO`."""

    def __init__(self, kind: str, error: int = 0) -> None:
        super().__init__(f"error {kind} {error}")


class _StopTimer:
    """Raises in the main thread when a stop takes too long, and only until the stop."""

    def __init__(self) -> None:
        self._armed = False
        signal.signal(signal.SIGALRM, self._expired)

    def _expired(self, _number: int, _frame: object) -> None:
        if self._armed:
            self._armed = False
            raise _StopTimeout

    def start(self) -> None:
        self._armed = True
        signal.setitimer(signal.ITIMER_REAL, STOP_TIMEOUT_SECONDS)

    def stop(self) -> None:
        # The flag first: a signal that is already on its way must not raise later.
        self._armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)


class ProcessMemory:
    """Reads of the target's memory, which stops nothing."""

    def __init__(self, pid: int) -> None:
        self._descriptor = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)

    def read(self, address: int, length: int) -> bytes:
        """Return up to `length` bytes, none where nothing is mapped."""
        try:
            return os.pread(self._descriptor, length, address)
        except OSError:
            return b""


def find_instruction(pid: int, memory: ProcessMemory) -> int:
    """Return the address of a system call instruction; the bytes are enough, whatever they belong to."""
    executable = [mapping for mapping in read_maps(pid) if "x" in mapping.permissions]
    for mapping in sorted(executable, key=lambda mapping: mapping.path != "[vdso]"):
        if mapping.path == "[vsyscall]":
            continue
        for start in range(mapping.start, mapping.end, _CHUNK_BYTES):
            length = min(_CHUNK_BYTES + 1, mapping.end - start)
            found = memory.read(start, length).find(architecture.SYSCALL_INSTRUCTION)
            if found >= 0:
                return start + found
    raise _Failed("no_instruction")


def _check_architecture(pid: int) -> None:
    """Read the ELF header (elf(5)): class 64-bit, and the machine."""
    with open(f"/proc/{pid}/exe", "rb") as file:
        header = file.read(20)
    if header[4:5] != b"\x02" or int.from_bytes(header[18:20], "little") != architecture.ELF_MACHINE:
        raise _Failed("foreign")


def _preference(pid: int, thread: int) -> tuple[int, bool]:
    """Rank a thread: best one that waits in a system call which the kernel restarts by itself.

    Such a thread is in no restartable sequence (rseq(2)), and its stop is not seen by anybody.
    KVM_RUN is an ioctl and returns EINTR to its caller.
    """
    try:
        if read_status(pid, thread).state == "D":
            return 3, thread != pid
        current = Path(f"/proc/{pid}/task/{thread}/syscall").read_text().split()[0]
    except (OSError, IndexError):
        return 3, thread != pid
    if current in {"running", "-1"}:
        return 2, thread != pid
    return int(current == str(_IOCTL)), thread != pid


def _inject(pid: int, number: int, arguments: Sequence[int]) -> Outcome:
    _check_architecture(pid)
    memory = ProcessMemory(pid)
    instruction = find_instruction(pid, memory)
    timer = _StopTimer()
    threads = sorted(read_threads(pid), key=lambda thread: _preference(pid, thread))
    for thread in threads[:THREADS_TRIED]:
        try:
            return call_in_thread(
                thread,
                number,
                arguments,
                read_memory=memory.read,
                spare_instruction=instruction,
                suspend_seccomp=read_status(pid, thread).seccomp_filtered,  # each has filters of its own
                stop_within=timer.start,
                stopped=timer.stop,
            )
        except (_StopTimeout, TraceeGone, FileNotFoundError, ProcessLookupError):
            continue
        finally:
            timer.stop()
    raise _Failed("stalled" if Path(f"/proc/{pid}").exists() else "gone")


def main() -> None:
    """Run once, with the process number, the call's number and its arguments."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(ignored, signal.SIG_IGN)
    pid, number, *arguments = (int(word) for word in sys.argv[1:])
    try:
        outcome = _inject(pid, number, arguments)
        line = f"ok {outcome.result} {outcome.stopped_seconds}"
    except _Failed as failure:
        line = str(failure)
    except ForeignCode:
        line = "error foreign 0"
    except OSError as error:
        kind = "gone" if error.errno in {errno.ENOENT, errno.ESRCH} else "refused"
        line = f"error {kind} {error.errno}"
    sys.stdout.write(line + "\n")


if __name__ == "__main__":
    main()
