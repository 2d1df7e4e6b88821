"""How much memory a guest's memfd really holds, from the kernel and not from the pager's books."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from farpage.errors import ExitStatus, FarpageError

BLOCK_BYTES = 512
"""Unit of st_blocks (inode(7)); for a memfd it counts the pages that are allocated."""


@dataclass(eq=False)
class NoMemfd(FarpageError):
    """No process holds the guest's memory."""

    code = "no_memfd"
    template = "none of the processes {pids} has a memfd of {size_bytes} bytes open"
    remedy = "start the guest with shared memfd memory, and run as the user that it runs as"
    exit_status = ExitStatus.NOT_FOUND
    pids: str
    size_bytes: int


class Memfd:
    """Somebody else's memfd, held open by its path alone (O_PATH), which allows to ask and nothing more."""

    def __init__(self, pids: Iterable[int], size_bytes: int) -> None:
        """Find a memfd of this very size in one of the processes.

        :raise NoMemfd: there is none.
        """
        pids = tuple(pids)
        for pid in pids:
            for link in _descriptors(pid):
                # A descriptor may be closed under our eyes.
                with contextlib.suppress(OSError):
                    if str(link.readlink()).startswith("/memfd:") and link.stat().st_size == size_bytes:
                        self._descriptor = os.open(link, os.O_PATH | os.O_CLOEXEC)
                        return
        raise NoMemfd(", ".join(map(str, pids)), size_bytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def resident_bytes(self) -> int:
        """The memory that it holds now."""
        return os.fstat(self._descriptor).st_blocks * BLOCK_BYTES

    def close(self) -> None:
        """Let go of it; the memory of a guest that has ended is freed then."""
        os.close(self._descriptor)


def _descriptors(pid: int) -> list[Path]:
    try:
        return list(Path(f"/proc/{pid}/fd").iterdir())
    except OSError:
        return []


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
