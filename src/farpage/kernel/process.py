"""Other processes: their mappings, descriptors, state and end, from /proc and pidfds.

See proc(5), pidfd_open(2) and pidfd_getfd(2).

Uses the standard library alone: `farpage.kernel.injector` has to start fast.
"""

from __future__ import annotations

import os
import re
import select
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from farpage.kernel.libc import syscall, syscall_numbers

_PIDFD_THREAD = os.O_EXCL
"""For a single thread (linux/pidfd.h, since Linux 6.9)."""
_PF_EXITING = 0x4
"""Among the flags of /proc/PID/stat (proc_pid_stat(5); linux/sched.h)."""

_MAPS_LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) ([0-9a-f]+) (\S+) (\d+) *(.*)")


@dataclass(frozen=True)
class Mapping:
    """One range of an address space; addresses and the file offset are in bytes."""

    start: int
    end: int
    permissions: str
    """As in /proc/PID/maps: `rwxs` or `rwxp`, with `-` for what is not allowed."""
    offset: int
    device: str
    inode: int
    path: str

    @property
    def length(self) -> int:
        """Bytes mapped."""
        return self.end - self.start

    @property
    def shared(self) -> bool:
        """Whether writes reach the file."""
        return self.permissions[3] == "s"

    @property
    def writable(self) -> bool:
        """Whether it may be written to."""
        return self.permissions[1] == "w"

    @property
    def memfd_name(self) -> str | None:
        """Name of the memfd that is mapped, None for anything else."""
        if not self.path.startswith("/memfd:"):
            return None
        return self.path.removeprefix("/memfd:").removesuffix(" (deleted)")


def parse_maps(text: str) -> list[Mapping]:
    """Parse the text of /proc/PID/maps; lines of another form are left out."""
    mappings = []
    for line in text.splitlines():
        match = _MAPS_LINE.fullmatch(line)
        if match:
            start, end, permissions, offset, device, inode, path = match.groups()
            mappings.append(
                Mapping(int(start, 16), int(end, 16), permissions, int(offset, 16), device, int(inode), path)
            )
    return mappings


def read_maps(pid: int) -> list[Mapping]:
    """Return the address space of a process in rising order.

    :raise OSError: ENOENT or ESRCH when it is gone, EACCES when it may not be seen.
    """
    return parse_maps(Path(f"/proc/{pid}/maps").read_text(errors="surrogateescape"))


def join_adjacent(mappings: Iterable[Mapping]) -> list[Mapping]:
    """Join neighbours that continue the same file with the same permissions.

    The kernel splits a mapping where its flags differ (madvise, userfaultfd), which the user did not.
    """
    joined: list[Mapping] = []
    for mapping in mappings:
        last = joined[-1] if joined else None
        if (
            last is not None
            and mapping.inode
            and (last.end, last.permissions, last.device, last.inode)
            == (mapping.start, mapping.permissions, mapping.device, mapping.inode)
            and last.offset + last.length == mapping.offset
        ):
            joined[-1] = replace(last, end=mapping.end)
        else:
            joined.append(mapping)
    return joined


@dataclass(frozen=True)
class OpenFile:
    """One entry of a process's descriptor table."""

    number: int
    target: str
    """What the descriptor links to: a path, or a form like `anon_inode:[userfaultfd]`."""
    device: int
    inode: int


def read_descriptors(pid: int | str) -> list[OpenFile]:
    """Return the descriptors of a process, lowest first; those that close meanwhile may be missing.

    :raise OSError: ENOENT when it is gone, EACCES when it may not be seen.
    """
    files = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            target, status = link.readlink(), link.stat()
        except OSError:
            continue
        files.append(OpenFile(int(link.name), str(target), status.st_dev, status.st_ino))
    return sorted(files, key=lambda file: file.number)


@dataclass(frozen=True)
class ProcessStatus:
    """The part of /proc/PID/status that decides whether and how a process can be attached."""

    name: str
    state: str
    """One letter, as ps(1) shows it."""
    tracer_pid: int
    """0 when nobody traces it."""
    seccomp_filtered: bool
    user_id: int


def read_status(pid: int, thread: int | None = None) -> ProcessStatus:
    """Return the status of a process or of one of its threads.

    :raise OSError: ENOENT or ESRCH when it is gone.
    """
    folder = f"/proc/{pid}" if thread is None else f"/proc/{pid}/task/{thread}"
    text = Path(folder, "status").read_text(errors="replace")
    fields = {key: value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    return ProcessStatus(
        name=fields["Name"],
        state=fields["State"][:1],
        tracer_pid=int(fields.get("TracerPid", "0")),
        seccomp_filtered=fields.get("Seccomp", "0") != "0",
        user_id=int(fields["Uid"].split()[1]),
    )


def read_threads(pid: int) -> list[int]:
    """Return the thread numbers of a process, the main thread first.

    :raise OSError: ENOENT when it is gone.
    """
    threads = sorted(int(folder.name) for folder in Path(f"/proc/{pid}/task").iterdir())
    return sorted(threads, key=lambda thread: thread != pid)


@dataclass(frozen=True)
class ProcessIdentity:
    """A process as no other one of the same number is."""

    pid: int
    started_ticks: int
    """Clock ticks between the host's boot and its start."""
    boot: str
    """Random name of the host's boot."""


def identify(pid: int) -> ProcessIdentity:
    """Return the identity of the process that has a number now.

    :raise OSError: ENOENT or ESRCH when there is none.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ProcessIdentity(pid, int(_stat_fields(pid)[19]), boot)


def _stat_fields(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the third on (proc_pid_stat(5))."""
    text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    # The second one is the program's name, which may hold brackets and spaces too.
    return text[text.rindex(")") + 2 :].split()


def open_identified(process: ProcessIdentity) -> int | None:
    """Return a pidfd of a process, None when it has ended: its number may belong to another one now."""
    try:
        pidfd = os.pidfd_open(process.pid)
    except OSError:
        return None
    try:
        # After the pidfd is open: it is of the process that is looked at, or of one that has ended.
        if identify(process.pid) == process and not is_gone(pidfd):
            return pidfd
    except OSError:
        pass
    os.close(pidfd)
    return None


def is_gone(pidfd: int) -> bool:
    """Tell without waiting whether the process behind a pidfd has ended (a zombie has)."""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def open_thread(thread: int) -> int:
    """Return a pidfd of a thread that does not lead its process; it is readable when the thread has ended.

    :raise OSError: ESRCH when there is none, EINVAL before Linux 6.9.
    """
    return os.pidfd_open(thread, _PIDFD_THREAD)


def is_exiting(pid: int) -> bool:
    """Tell whether a process has begun to exit: its main thread runs no program any more."""
    try:
        return bool(int(_stat_fields(pid)[6]) & _PF_EXITING)
    except OSError:  # it is gone
        return True


def pid_of(pidfd: int) -> int | None:
    """Return the number that a pidfd's process has for this one (proc(5), fdinfo).

    None when it has ended, when this process does not see it, and for a descriptor of another kind.
    """
    for line in Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == "Pid":
            return int(value) if int(value) > 0 else None
    return None


def take_descriptor(pidfd: int, number: int) -> int:
    """Duplicate a descriptor of another process into this one, close-on-exec (pidfd_getfd(2), Linux 5.6).

    :raise OSError: EBADF when it has none of that number, ESRCH when it is gone, EPERM without
        permission to trace it.
    """
    return syscall(syscall_numbers().pidfd_getfd, pidfd, number, 0)


def set_oom_score_adjustment(value: int, pid: int | str = "self") -> None:
    """Make the kernel less (to -1000: never) or more (to 1000) likely to kill a process when memory is short.

    :raise OSError: EACCES when lowering it without CAP_SYS_RESOURCE.
    """
    Path(f"/proc/{pid}/oom_score_adj").write_text(str(value))
