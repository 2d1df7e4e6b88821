"""How much memory a process's memfd really holds, from the kernel and not from the pager's books."""

from __future__ import annotations

import contextlib
import os
from dataclasses import dataclass
from pathlib import Path

from farpage.errors import ExitStatus, FarpageError

BLOCK_BYTES = 512
"""Unit of st_blocks (inode(7)); for a memfd it counts the pages that are allocated."""


@dataclass(eq=False)
class NoMemfd(FarpageError):
    """The guest's process has no memfd."""

    code = "no_memfd"
    template = "process {pid} has no memfd of {size_bytes} bytes or more"
    remedy = "start the guest with shared memfd memory"
    exit_status = ExitStatus.NOT_FOUND
    pid: int
    size_bytes: int


def find_memfd(pid: int, size_bytes: int) -> Path:
    """Return the path under /proc of the process's first memfd that is at least this large.

    :raise NoMemfd: there is none.
    """
    for link in sorted(Path(f"/proc/{pid}/fd").iterdir(), key=lambda entry: int(entry.name)):
        with contextlib.suppress(OSError):
            if str(link.readlink()).startswith("/memfd:") and link.stat().st_size >= size_bytes:
                return link
    raise NoMemfd(pid, size_bytes)


def resident_bytes(memfd: Path) -> int:
    """Return the memory that the memfd holds.

    :raise OSError: the process has ended.
    """
    return os.stat(memfd).st_blocks * BLOCK_BYTES  # noqa: PTH116 - the same call, once less wrapped


@dataclass
class ResidentWatch:
    """Remembers the most that was resident after the limit was first reached."""

    limit_bytes: int
    latest_bytes: int = 0
    max_bytes: int = 0
    """0 until the limit is reached."""

    def sample(self, value_bytes: int) -> None:
        """Take note of one measurement."""
        self.latest_bytes = value_bytes
        if self.max_bytes or value_bytes <= self.limit_bytes:
            self.max_bytes = max(self.max_bytes, value_bytes)
