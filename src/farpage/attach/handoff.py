"""Checks of what a region hands over: nothing that it says is believed."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from farpage.attach.memory import ClientKind, ClientMemory, why_not_pageable
from farpage.attach.messages import AttachRequest
from farpage.attach.process import UFFD_TARGET
from farpage.errors import ExitStatus, FarpageError, InvalidInput
from farpage.kernel.process import join_adjacent, read_maps
from farpage.kernel.userfaultfd import REQUIRED_FEATURES, Userfaultfd, UserfaultfdState, read_state

_HINT = "use farpage.Region of this version of farpage"


@dataclass(eq=False)
class HandoffRefused(FarpageError):
    """The descriptors or addresses of an attach request are not those of a region."""

    code = "handoff_refused"
    template = "region of process {pid}: {problem}"
    remedy = _HINT
    exit_status = ExitStatus.USAGE
    pid: int
    problem: str


def check_handoff(request: AttachRequest, pid: int, pidfd: int, descriptors: Sequence[int]) -> ClientMemory:
    """Return the memory that a request and its descriptors (userfaultfd, memfd) describe.

    The descriptors stay the caller's when this raises.

    :raise InvalidInput: when there are not two descriptors.
    :raise HandoffRefused: when one is something else, or the memory is not mapped where it is said to be.
    """
    if len(descriptors) != 2:
        raise InvalidInput("descriptors", f"{len(descriptors)} came with the request, two are needed", _HINT)
    uffd, memfd = descriptors
    problem = _uffd_problem(uffd) or _memfd_problem(memfd, request.size_bytes)
    if problem:
        raise HandoffRefused(pid, problem)
    return ClientMemory(
        kind=ClientKind.REGION,
        pid=pid,
        pidfd=pidfd,
        uffd=Userfaultfd(uffd),
        memfd=memfd,
        start_address=request.start_address,
        length_bytes=request.size_bytes,
        memfd_offset_bytes=_mapped_offset(request, pid, memfd),
        remote_uffd=request.uffd_number,
    )


def _target(descriptor: int) -> str:
    return str(Path(f"/proc/self/fd/{descriptor}").readlink())


def _uffd_problem(descriptor: int) -> str | None:
    state = _uffd_state(descriptor)
    if state is None:
        return "the first descriptor is not a userfaultfd"
    if not state.initialized or REQUIRED_FEATURES & ~state.features:
        return "its userfaultfd was not set up with the features that paging needs"
    if not fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_NONBLOCK:
        return "its userfaultfd is not non-blocking"
    return None


def _uffd_state(descriptor: int) -> UserfaultfdState | None:
    if _target(descriptor) != UFFD_TARGET:
        return None
    return read_state(Path(f"/proc/self/fdinfo/{descriptor}"))


def _memfd_problem(descriptor: int, size_bytes: int) -> str | None:
    if not _target(descriptor).startswith("/memfd:"):
        return "the second descriptor is not a memfd"
    if os.fstat(descriptor).st_size < size_bytes:
        return f"its memfd is smaller than {size_bytes} bytes"
    if not fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
        return "its memfd is not sealed against shrinking"
    return why_not_pageable(descriptor)


def _mapped_offset(request: AttachRequest, pid: int, memfd: int) -> int:
    """Return the memfd offset of the region's first byte, from the process's own map."""
    try:
        mappings = join_adjacent(read_maps(pid))
    except OSError as error:
        raise HandoffRefused(
            pid, f"its memory map cannot be read ({os.strerror(error.errno or 0)})"
        ) from error
    inode = os.fstat(memfd).st_ino
    end = request.start_address + request.size_bytes
    for mapping in mappings:
        if mapping.start <= request.start_address and end <= mapping.end:
            if mapping.inode != inode or mapping.memfd_name is None:
                break
            if not (mapping.shared and mapping.writable):
                raise HandoffRefused(pid, "its memory is not mapped shared and writable")
            return mapping.offset + request.start_address - mapping.start
    raise HandoffRefused(pid, f"its memfd is not mapped at {request.start_address:#x}")
