"""A client's memory, as all ways of attaching hand it to the pager."""

from __future__ import annotations

import enum
import errno
import fcntl
import os
import time
from contextlib import suppress
from dataclasses import dataclass

from farpage.definition.states import PAGE_BYTES
from farpage.errors import ExitStatus, FarpageError
from farpage.kernel.userfaultfd import Mode, Userfaultfd

PROBES = 100
PROBE_PAUSE_SECONDS = 0.001

_SEAL_FUTURE_WRITE = 0x10
"""F_SEAL_FUTURE_WRITE, Linux 5.1."""

REGISTER_MODE = Mode.MISSING | Mode.WP | Mode.MINOR


class ClientKind(enum.StrEnum):
    """How a client was attached."""

    PROCESS = "process"
    """An unmodified running process, whose userfaultfd was made by injection."""
    REGION = "region"
    """A `farpage.Region` of a process that asked for it."""


@dataclass(eq=False)
class AlreadyAttached(FarpageError):
    """The memory has a pager: farpage, or another user of userfaultfd such as a post-copy migration."""

    code = "already_attached"
    template = "the memory of process {pid} is registered with a userfaultfd already"
    remedy = "detach it there first ('farpage client list'), or wait for a migration to end"
    exit_status = ExitStatus.CONFLICT
    pid: int


@dataclass(eq=False)
class NotPageable(FarpageError):
    """The kernel does not accept the mapping for paging."""

    code = "not_pageable"
    template = "the memory of process {pid} cannot be paged: {cause_text}"
    remedy = "it must stay mapped, shared and writable, from a memfd without write seals"
    exit_status = ExitStatus.UNSUPPORTED
    pid: int
    cause_text: str


def why_not_pageable(memfd: int) -> str | None:
    """Say what keeps pages of a memfd from being given back and filled one by one; None if nothing does."""
    if os.fstatvfs(memfd).f_bsize != PAGE_BYTES:
        return "its memfd is of huge pages (hugetlb)"
    if fcntl.fcntl(memfd, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
        return "its memfd is not open for reading and writing"
    if fcntl.fcntl(memfd, fcntl.F_GET_SEALS) & (fcntl.F_SEAL_WRITE | _SEAL_FUTURE_WRITE):
        return "its memfd is sealed against writing, so pages could not be freed"
    return None


@dataclass(frozen=True)
class ClientMemory:
    """One contiguous range of a client's memory and the descriptors to page it; it owns the descriptors.

    Client page n is at `start_address + n * page size` in the client's address space and at
    `memfd_offset_bytes + n * page size` in the memfd.
    """

    kind: ClientKind
    pid: int
    pidfd: int
    uffd: Userfaultfd
    memfd: int
    start_address: int
    length_bytes: int
    memfd_offset_bytes: int
    remote_uffd: int | None
    """Number of the userfaultfd in the client's own descriptor table; None when it is not known."""

    def register(self) -> None:
        """Report missing pages, writes to protected pages and pages without a mapping from now on.

        :raise AlreadyAttached: when another userfaultfd has the range or a part of it.
        :raise NotPageable: when the mapping has gone or is of another kind meanwhile.
        """
        try:
            self.uffd.register(self.start_address, self.length_bytes, REGISTER_MODE)
        except OSError as error:
            if error.errno == errno.EBUSY:
                raise AlreadyAttached(self.pid) from error
            cause = os.strerror(error.errno or errno.EIO)
            raise NotPageable(self.pid, f"UFFDIO_REGISTER: {cause}") from error

    def is_registered(self) -> bool:
        """Tell whether the memory is registered with a userfaultfd; only for when nobody pages it.

        A page is write-protected for that, which its next pager takes back at the first write.

        :raise ProcessLookupError: when the client is gone.
        """
        for _ in range(PROBES):
            # ENOENT: the mapping has no userfaultfd (mm/userfaultfd.c, mwriteprotect_range); EINVAL: this
            # one has not had its handshake.
            result = self.uffd.write_protect(self.start_address, PAGE_BYTES, True)
            if result == 0:
                return True
            if result in (-errno.ENOENT, -errno.EINVAL):
                return False
            if result == -errno.ESRCH:
                raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH))
            time.sleep(PROBE_PAUSE_SECONDS)
        return (
            True  # its mappings keep changing: that the client is taken for a paged one is the safe mistake
        )

    def unregister(self) -> None:
        """Stop reporting; all pages must be present, since missing ones read zeros from now on.

        :raise OSError: ENOMEM or ESRCH when the client is gone, EINVAL when it has unmapped the range.
        """
        self.uffd.unregister(self.start_address, self.length_bytes)

    def close_descriptors(self) -> None:
        """Close this process's descriptors; the client's own are untouched."""
        self.uffd.close()
        for descriptor in (self.memfd, self.pidfd):
            with suppress(OSError):
                os.close(descriptor)
