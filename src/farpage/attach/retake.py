"""A client's memory, remembered so that a process which knows nothing else of it can take it again.

Everything that is needed lives in the client's own process: the userfaultfd in its descriptor table, its
memory in its mappings. Whoever takes them again makes neither a new userfaultfd nor a new registration.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from farpage.attach.memory import ClientKind, ClientMemory
from farpage.attach.process import UFFD_TARGET, take, take_memfd, userfaultfds
from farpage.errors import FarpageError
from farpage.kernel.process import (
    ProcessIdentity,
    identify,
    is_gone,
    join_adjacent,
    open_identified,
    read_maps,
)
from farpage.kernel.userfaultfd import Userfaultfd
from farpage.message import Message


@dataclass(eq=False)
class NotRetaken(FarpageError):
    """A client's process is there, but its memory cannot be taken again."""

    code = "not_retaken"
    template = "the memory of process {pid} cannot be taken again: {problem}"
    remedy = (
        "run the hypervisor as root or give it CAP_SYS_PTRACE; accesses to paged-out memory wait meanwhile"
    )
    pid: int
    problem: str


class MemoryRecord(Message, frozen=True, kw_only=True):
    """One client's memory in the words of the kernel; see `ClientMemory` and `ProcessIdentity`."""

    kind: ClientKind
    pid: int
    started_ticks: int
    boot: str
    start_address: int
    length_bytes: int
    memfd_offset_bytes: int
    memfd_inode: int
    remote_uffd: int | None

    @property
    def process(self) -> ProcessIdentity:
        """The client's process."""
        return ProcessIdentity(self.pid, self.started_ticks, self.boot)


def remember(memory: ClientMemory) -> MemoryRecord:
    """Describe memory so that `retake` finds it.

    :raise OSError: the process has ended.
    """
    process = identify(memory.pid)
    return MemoryRecord(
        kind=memory.kind,
        pid=memory.pid,
        started_ticks=process.started_ticks,
        boot=process.boot,
        start_address=memory.start_address,
        length_bytes=memory.length_bytes,
        memfd_offset_bytes=memory.memfd_offset_bytes,
        memfd_inode=os.fstat(memory.memfd).st_ino,
        remote_uffd=memory.remote_uffd,
    )


def retake(record: MemoryRecord) -> ClientMemory | None:
    """Take a client's memory from its process; None when that has ended.

    :raise NotRetaken: when the process does not have it any more, or does not let it be taken.
    """
    with ExitStack() as undo:
        pidfd = open_identified(record.process)
        if pidfd is None:
            return None
        undo.callback(os.close, pidfd)
        try:
            memfd = _take_memfd(record, pidfd)
            undo.callback(os.close, memfd)
            uffd = take(record.pid, pidfd, _uffd_number(record))
            undo.callback(os.close, uffd)
        except (OSError, FarpageError) as error:
            if is_gone(pidfd):
                return None
            problem = error.cause if isinstance(error, FarpageError) else os.strerror(error.errno or 0)
            raise NotRetaken(record.pid, problem) from error
        if str(Path(f"/proc/self/fd/{uffd}").readlink()) != UFFD_TARGET:
            raise NotRetaken(record.pid, "its userfaultfd has been closed")
        undo.pop_all()
    return ClientMemory(
        kind=record.kind,
        pid=record.pid,
        pidfd=pidfd,
        uffd=Userfaultfd(uffd),
        memfd=memfd,
        start_address=record.start_address,
        length_bytes=record.length_bytes,
        memfd_offset_bytes=record.memfd_offset_bytes,
        remote_uffd=record.remote_uffd,
    )


def _take_memfd(record: MemoryRecord, pidfd: int) -> int:
    end = record.start_address + record.length_bytes
    for mapping in join_adjacent(read_maps(record.pid)):
        if mapping.start <= record.start_address and end <= mapping.end:
            offset = mapping.offset + record.start_address - mapping.start
            if (mapping.inode, offset) == (record.memfd_inode, record.memfd_offset_bytes):
                return take_memfd(record.pid, pidfd, mapping)
    raise NotRetaken(record.pid, "its memory is not mapped where it was")


def _uffd_number(record: MemoryRecord) -> int:
    if record.remote_uffd is not None:
        return record.remote_uffd
    found = userfaultfds(record.pid)
    if len(found) != 1:
        raise NotRetaken(
            record.pid, f"it has {len(found)} userfaultfds, and which is the region's is not known"
        )
    return found[0]
