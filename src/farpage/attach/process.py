"""Attaching an unmodified, running process: find its shared memory, make a userfaultfd inside it, take both.

The userfaultfd has to belong to the process whose memory it is for, and userfaultfd(2) makes it for its
caller. So the call is made by one of the process's own threads (`farpage.kernel.inject`) and the descriptor
is duplicated with pidfd_getfd(2). The original stays in the process, and so lives as long as the memory: when
the last reference to a userfaultfd closes, missing pages read zeros.
"""

from __future__ import annotations

import fcntl
import os
import re
from collections.abc import Collection
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from farpage.attach.memory import AlreadyAttached, ClientKind, ClientMemory, NotPageable, why_not_pageable
from farpage.errors import ExitStatus, FarpageError, Unsupported
from farpage.kernel.inject import ProcessNotFound, TraceRefused, call_in_process
from farpage.kernel.libc import syscall_numbers
from farpage.kernel.process import (
    Mapping,
    ProcessIdentity,
    is_gone,
    join_adjacent,
    open_identified,
    read_descriptors,
    read_maps,
    take_descriptor,
)
from farpage.kernel.userfaultfd import CREATE_FLAGS, Userfaultfd

_FIRST_LINE = re.compile(r"([0-9a-f]+)-[0-9a-f]+ ")
"""Of a mapping in /proc/PID/smaps."""

UFFD_TARGET = "anon_inode:[userfaultfd]"
"""What a userfaultfd in /proc/PID/fd links to."""

QEMU_HINT = (
    "start QEMU with '-object memory-backend-memfd,id=ram,size=SIZE,share=on -machine ...,memory-backend=ram'"
)


@dataclass(eq=False)
class NoSharedMemory(FarpageError):
    """The process maps no shared, writable memfd."""

    code = "no_shared_memory"
    template = "process {pid} has no {what}"
    remedy = "{hint}"
    exit_status = ExitStatus.NOT_FOUND
    pid: int
    what: str
    hint: str


@dataclass(eq=False)
class SeveralMemories(FarpageError):
    """More than one mapping is as good as the other."""

    code = "several_memories"
    template = "process {pid} has several shared memories of that size: {candidates}"
    remedy = "choose one with --memory NAME, or --memory 0xADDRESS where the names are the same"
    exit_status = ExitStatus.CONFLICT
    pid: int
    candidates: str


def candidates(mappings: list[Mapping]) -> list[Mapping]:
    """Return the mappings that can be paged: shared, writable memfds, largest first."""
    shared = [
        mapping
        for mapping in join_adjacent(mappings)
        if mapping.memfd_name is not None and mapping.shared and mapping.writable
    ]
    return sorted(shared, key=lambda mapping: -mapping.length)


def choose_memory(pid: int, mappings: list[Mapping], memory: str | None = None) -> Mapping:
    """Choose the guest memory: the largest candidate, or the one of a memfd name or start address (`0x...`).

    :raise NoSharedMemory: when there is none, or none of that name.
    :raise SeveralMemories: when two are equally large.
    """
    found = candidates(mappings)
    if not found:
        raise NoSharedMemory(pid, "shared memory from a memfd", QEMU_HINT)
    if memory is not None:
        named = [mapping for mapping in found if memory in (mapping.memfd_name, hex(mapping.start))]
        if not named:
            raise NoSharedMemory(pid, f"shared memory {memory!r}", f"choose from: {_describe(found)}")
        found = named
    if len(found) > 1 and found[0].length == found[1].length:
        raise SeveralMemories(pid, _describe(found))
    return found[0]


def _describe(mappings: list[Mapping]) -> str:
    return ", ".join(
        f"{mapping.memfd_name} at {mapping.start:#x} ({mapping.length / (1 << 20):g} MiB)"
        for mapping in mappings
    )


def open_process(pid: int, memory: str | None = None) -> ClientMemory:
    """Take the memory of a running process; nothing is registered yet. Blocks for about 0.1 s.

    :raise ProcessNotFound: when there is no such process.
    :raise NoSharedMemory: or SeveralMemories, when there is nothing or too much to choose from.
    :raise ProcessTraced: or TraceRefused, ForeignArchitecture, ProcessStalled: see `farpage.kernel.inject`.
    :raise AlreadyAttached: when it is registered with a userfaultfd.
    :raise NotPageable: when its pages cannot be given back and filled one by one.
    :raise Unsupported: when the kernel lacks features.
    """
    with ExitStack() as undo:
        pidfd = _open_pidfd(pid)
        undo.callback(os.close, pidfd)
        mapping = choose_memory(pid, _read_maps(pid), memory)
        memfd = take_memfd(pid, pidfd, mapping)
        undo.callback(os.close, memfd)
        if problem := why_not_pageable(memfd):
            raise NotPageable(pid, problem)
        if any(mapping.start <= start < mapping.end for start in _registered(pid)):
            raise AlreadyAttached(pid)
        remote = _make_remote_uffd(pid)
        undo.callback(_close_remote_quietly, pid, remote)
        uffd = Userfaultfd(take(pid, pidfd, remote))
        undo.callback(uffd.close)
        uffd.handshake()
        undo.pop_all()
    return ClientMemory(
        kind=ClientKind.PROCESS,
        pid=pid,
        pidfd=pidfd,
        uffd=uffd,
        memfd=memfd,
        start_address=mapping.start,
        length_bytes=mapping.length,
        memfd_offset_bytes=mapping.offset,
        remote_uffd=remote,
    )


def close_process(client: ClientMemory) -> None:
    """Close the userfaultfd inside the process, after `unregister`, and all descriptors here.

    A process that has ended meanwhile is as good.

    :raise ProcessTraced: or TraceRefused, ProcessStalled: the descriptors here are closed, and
        the one in the process stays open there, without effect.
    """
    try:
        # The number of a process that has ended may belong to another one by now.
        # A region's userfaultfd is closed by the process that made it.
        number = client.remote_uffd if client.kind is ClientKind.PROCESS else None
        if number is not None and not is_gone(client.pidfd):
            _close_remote(client.pid, number)
    finally:
        client.close_descriptors()


def userfaultfds(pid: int) -> tuple[int, ...]:
    """Return the numbers of a process's userfaultfds; none when it is gone or may not be looked at."""
    try:
        return tuple(file.number for file in read_descriptors(pid) if file.target == UFFD_TARGET)
    except OSError:
        return ()


def close_orphan(process: ProcessIdentity, before: Collection[int]) -> bool:
    """Close the userfaultfd that was made in a process by somebody who died before telling which it was.

    `before` are the userfaultfds that the process had until then. Only one that has had no handshake, and so
    can have nothing registered, or none but farpage's, with nothing registered, is closed; returns whether.

    :raise FarpageError: what injecting raises.
    """
    pidfd = open_identified(process)
    if pidfd is None:
        return False
    try:
        found = [number for number in userfaultfds(process.pid) if number not in before]
        if len(found) != 1 or _registered(process.pid):
            return False
        _close_remote(process.pid, found[0])
        return True
    finally:
        os.close(pidfd)


def _registered(pid: int) -> list[int]:
    """Return where registered mappings of a process begin: um, uw or ui in their flags (proc_pid_smaps(5)).

    Of one whose mappings may not be read, or that is gone, all might be: that is [0].
    """
    start, found = 0, []
    try:
        with open(f"/proc/{pid}/smaps", errors="replace") as lines:
            for line in lines:
                if line.startswith("VmFlags:"):
                    if not {"um", "uw", "ui"}.isdisjoint(line.split()):
                        found.append(start)
                elif first := _FIRST_LINE.match(line):
                    start = int(first[1], 16)
    except OSError:
        return [0]
    return found


def _open_pidfd(pid: int) -> int:
    if pid <= 0:
        raise ProcessNotFound(pid)
    try:
        return os.pidfd_open(pid)
    except OSError as error:
        raise ProcessNotFound(pid) from error


def _read_maps(pid: int) -> list[Mapping]:
    try:
        return read_maps(pid)
    except PermissionError as error:
        raise TraceRefused(
            pid, "its memory map may not be read", "run as root or give CAP_SYS_PTRACE"
        ) from error
    except OSError as error:
        raise ProcessNotFound(pid) from error


def take_memfd(pid: int, pidfd: int, mapping: Mapping) -> int:
    """Take the file of a mapping from the descriptor table or, if it was closed there, from the mapping."""
    try:
        for file in read_descriptors(pid):
            if file.inode == mapping.inode and file.target == mapping.path:
                memfd = take(pid, pidfd, file.number)
                if fcntl.fcntl(memfd, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDWR:
                    return memfd
                os.close(memfd)
        path = f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}"
        return os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise NoSharedMemory(
            pid,
            f"open descriptor of its shared memory {mapping.memfd_name!r}",
            "run with CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN, which may take it from the mapping",
        ) from error


def take(pid: int, pidfd: int, number: int) -> int:
    """Duplicate a descriptor of a process into this one.

    :raise ProcessNotFound: when it has ended.
    :raise TraceRefused: when its descriptors may not be taken.
    :raise OSError: EBADF when it has none of that number.
    """
    try:
        return take_descriptor(pidfd, number)
    except ProcessLookupError as error:
        raise ProcessNotFound(pid) from error
    except PermissionError as error:
        raise TraceRefused(
            pid, "its descriptors may not be taken", "run as root or give CAP_SYS_PTRACE"
        ) from error


def _make_remote_uffd(pid: int) -> int:
    outcome = call_in_process(pid, syscall_numbers().userfaultfd, CREATE_FLAGS)
    if outcome.result < 0:
        raise Unsupported(
            f"userfaultfd in process {pid}",
            os.strerror(-outcome.result),
            "set 'sysctl vm.unprivileged_userfaultfd=1', or run the VM with CAP_SYS_PTRACE",
        )
    return outcome.result


def _close_remote(pid: int, number: int) -> None:
    """Close a userfaultfd in a process, but no other file that has its number now."""
    try:
        if str(Path(f"/proc/{pid}/fd/{number}").readlink()) != UFFD_TARGET:
            return
    except OSError:
        return
    try:
        call_in_process(pid, syscall_numbers().close, number)
    except ProcessNotFound:
        return


def _close_remote_quietly(pid: int, number: int) -> None:
    with suppress(FarpageError):
        _close_remote(pid, number)
