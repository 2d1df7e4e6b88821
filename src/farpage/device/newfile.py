"""A volume's file while it is made: it appears under its name whole, or not at all.

Until then it is `.NAME.new`, locked (flock(2)) by whoever makes it, so that what a process that was killed
has left is told from what is being made. Files are begun, cleared away and given their names under the
directory's lock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from farpage.device.base import NAME
from farpage.device.label import sync_folder
from farpage.device.volumefile import NOT_SUPPORTED, ZEROS, Access, fallocate, write_fully

_PREFIX, _SUFFIX = ".", ".new"

DROPPED_BYTES: Final = 16 << 20
"""Of zeros that were written through the page cache it holds no more than this."""


class NewFile:
    """An open file of `size_bytes` without a name yet; a context manager that removes it if it got none."""

    def __init__(self, path: Path, size_bytes: int, *, access: Access) -> None:
        """Begin the file that is to be at `path`.

        :raise FileExistsError: somebody else is making it.
        :raise OSError: as it comes from the file system; nothing is left then.
        """
        self._path = path
        self._temporary = path.with_name(f"{_PREFIX}{path.name}{_SUFFIX}")
        self._size_bytes = size_bytes
        self._access = access
        self._named = False
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        if access is Access.DIRECT:
            flags |= os.O_DIRECT
        self._descriptor = os.open(self._temporary, flags, 0o600)
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(self._descriptor, size_bytes)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file, and remove it unless it has its name."""
        if not self._named:
            self._temporary.unlink(missing_ok=True)
        os.close(self._descriptor)

    def reserve(self) -> None:
        """Have the file system find all of its blocks, which takes no time beside writing them.

        :raise OSError: ENOSPC or EDQUOT, when there are not so many.
        """
        try:
            fallocate(self._descriptor, 0, 0, self._size_bytes)
        except OSError as error:
            if error.errno not in NOT_SUPPORTED:
                raise
            if self.free_bytes() < self._size_bytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error

    def free_bytes(self) -> int:
        """Return the room that its file system has left."""
        status = os.fstatvfs(self._descriptor)
        return status.f_bavail * status.f_frsize

    def fill(self, ended: Callable[[], bool]) -> None:
        """Write zeros to all of it; `ended` is asked before each step whether to give up.

        What is only reserved reads as zeros too, but the file system has to enter into its journal that it
        does so no more when it is written first.

        :raise OSError: ECANCELED when it was given up.
        """
        at = kept = 0
        while at < self._size_bytes:
            if ended():
                raise OSError(errno.ECANCELED, "the device was closed before the volume was made")
            with ZEROS[: self._size_bytes - at] as zeros:
                write_fully(self._descriptor, zeros, at)
                at += len(zeros)
            if self._access is not Access.DIRECT and at - kept >= DROPPED_BYTES:
                self._drop()
                kept = at
        if self._access is not Access.DIRECT:
            self._drop()

    def _drop(self) -> None:
        os.fdatasync(self._descriptor)
        os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)

    def sync(self) -> None:
        """Put it on stable storage.

        :raise OSError:
        """
        os.fsync(self._descriptor)

    def name_it(self) -> None:
        """Give it its name, durably.

        :raise OSError:
        """
        # Whoever opens it, as soon as it has its name, locks it himself.
        fcntl.flock(self._descriptor, fcntl.LOCK_UN)
        self._temporary.rename(self._path)
        self._named = True
        sync_folder(self._path.parent)


def unfinished(folder: Path) -> Iterator[os.stat_result]:
    """Look at the files that are being made, or that were left so."""
    for path in _temporaries(folder):
        with contextlib.suppress(FileNotFoundError):
            yield path.lstat()


def clear_unfinished(folder: Path) -> None:
    """Remove the files that nobody makes any more; under the directory's lock.

    Their room is free at once: whoever makes such a volume anew is to find it.

    :raise OSError: as it comes from the file system.
    """
    for path in _temporaries(folder):
        descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        except BlockingIOError:
            continue
        finally:
            os.close(descriptor)


def _temporaries(folder: Path) -> list[Path]:
    return [
        Path(entry.path)
        for entry in os.scandir(folder)
        if entry.name.startswith(_PREFIX)
        and entry.name.endswith(_SUFFIX)
        and NAME.fullmatch(entry.name[len(_PREFIX) : -len(_SUFFIX)])
        and entry.is_file(follow_symlinks=False)
    ]
