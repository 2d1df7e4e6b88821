"""System calls made inside another process, as its own thread would make them.

See `farpage.kernel.ptrace` for the sequence.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from farpage.errors import ExitStatus, FarpageError
from farpage.kernel.process import ProcessStatus, read_status
from farpage.kernel.ptrace import Outcome

_PACKAGE_ROOT = Path(__file__).parents[2]


@dataclass(eq=False)
class ProcessNotFound(FarpageError):
    """There is no such process, or it ended meanwhile."""

    code = "process_not_found"
    template = "process {pid} does not exist or has ended"
    remedy = "look up the number again, for example with 'pgrep -a qemu'"
    exit_status = ExitStatus.NOT_FOUND
    pid: int


@dataclass(eq=False)
class ProcessTraced(FarpageError):
    """Somebody else is the tracer; there can be one."""

    code = "process_traced"
    template = "process {pid} is being traced by {tracer_pid} ({tracer_name})"
    remedy = "end that debugger or tracer, then try again"
    exit_status = ExitStatus.CONFLICT
    pid: int
    tracer_pid: int
    tracer_name: str


@dataclass(eq=False)
class TraceRefused(FarpageError):
    """The kernel does not allow to trace the process."""

    code = "trace_refused"
    template = "process {pid} may not be traced: {cause_text}"
    remedy = "{hint}"
    exit_status = ExitStatus.UNSUPPORTED
    pid: int
    cause_text: str
    hint: str


@dataclass(eq=False)
class ForeignArchitecture(FarpageError):
    """The process is not of the architecture that the system call numbers are for."""

    code = "foreign_architecture"
    template = "process {pid} does not run 64-bit code of this machine"
    remedy = "attach a native 64-bit VM process"
    exit_status = ExitStatus.UNSUPPORTED
    pid: int


@dataclass(eq=False)
class ProcessStalled(FarpageError):
    """No thread of the process stops for the tracer."""

    code = "process_stalled"
    template = "no thread of process {pid} can be stopped: all wait uninterruptibly"
    remedy = "see what 'cat /proc/{pid}/task/*/stack' waits for, then try again"
    exit_status = ExitStatus.CONFLICT
    pid: int


def call_in_process(pid: int, number: int, *arguments: int) -> Outcome:
    """Make one system call in some thread of a process.

    It takes about 70 ms, of which that thread is stopped 0.15 ms. Blocks, so event loops call it in a thread.

    :raise ProcessNotFound: also when it ended meanwhile.
    :raise ProcessTraced: when it has a tracer already.
    :raise TraceRefused: when this user may not trace it.
    :raise ForeignArchitecture: when it is a 32-bit process.
    :raise ProcessStalled: when no thread stops.
    """
    status = _status(pid)
    if status.state in {"Z", "X"}:
        raise ProcessNotFound(pid)
    if status.tracer_pid:
        raise _traced(pid, status.tracer_pid)
    # -P keeps the working directory out of the search path, -S starts without site-packages.
    completed = subprocess.run(
        [sys.executable, "-P", "-S", "-m", "farpage.kernel.injector", str(pid), str(number)]
        + [str(argument) for argument in arguments],
        env={**os.environ, "PYTHONPATH": str(_PACKAGE_ROOT)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        start_new_session=True,
        check=False,
    )
    words = completed.stdout.split()
    if len(words) == 3 and words[0] == "ok":
        return Outcome(int(words[1]), float(words[2]))
    if len(words) == 3 and words[0] == "error":
        raise _failure(pid, words[1], int(words[2]))
    last_line = (completed.stderr.strip() or f"exit status {completed.returncode}").splitlines()[-1]
    raise TraceRefused(pid, f"the injector failed: {last_line}", "report this as a bug")


def _status(pid: int) -> ProcessStatus:
    try:
        return read_status(pid)
    except OSError as error:
        raise ProcessNotFound(pid) from error


def _traced(pid: int, tracer_pid: int) -> ProcessTraced:
    try:
        name = read_status(tracer_pid).name
    except OSError:
        name = "in another PID namespace"
    return ProcessTraced(pid, tracer_pid, name)


def _failure(pid: int, kind: str, error: int) -> FarpageError:
    if kind == "gone":
        return ProcessNotFound(pid)
    if kind == "foreign":
        return ForeignArchitecture(pid)
    if kind == "stalled":
        return ProcessStalled(pid)
    if kind == "no_instruction":
        return TraceRefused(pid, "it has no code with a system call instruction", "attach a VM process")
    status = _status(pid)
    if status.tracer_pid:
        return _traced(pid, status.tracer_pid)
    return _refusal(pid, status, error)


def _refusal(pid: int, status: ProcessStatus, error: int) -> TraceRefused:
    """Say why PTRACE_SEIZE failed; the kernel tells EPERM alone (kernel/ptrace.c, ptrace_attach)."""
    cause = os.strerror(error)
    if status.seccomp_filtered and error in {errno.EPERM, errno.EINVAL} and os.geteuid() == 0:
        return TraceRefused(
            pid,
            f"it runs under a seccomp filter that cannot be suspended ({cause})",
            "use a kernel with CONFIG_CHECKPOINT_RESTORE and run with CAP_SYS_ADMIN, or start the VM without "
            "the filter (QEMU: -sandbox off)",
        )
    if status.user_id != os.geteuid():
        return TraceRefused(
            pid, f"it runs as user {status.user_id} ({cause})", "run as root, or give CAP_SYS_PTRACE"
        )
    return TraceRefused(
        pid,
        cause,
        "run as root or with CAP_SYS_PTRACE; /proc/sys/kernel/yama/ptrace_scope must not be 3",
    )
