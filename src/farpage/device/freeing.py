"""Gives the room of deleted files back piece by piece, so that others get at the storage in between.

A file system may tell its storage what was freed - ext4 mounted with `discard`, when it commits its journal -
and what is read meanwhile waits behind that: tens of milliseconds for some hundred MiB.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from typing import Final

PIECE_BYTES: Final = 16 << 20
PAUSE_SHARE: Final = 3.0
"""So many times as long as a piece took nothing is freed after it."""


def free_slowly(descriptor: int) -> None:
    """Take over a descriptor, open for writing, of a file that has no name any more; returns at once.

    Should the process end meanwhile, the kernel frees the rest. A file with another name is left as it is.
    """
    threading.Thread(target=_free, args=(descriptor,), name="freeing", daemon=True).start()


def _free(descriptor: int) -> None:
    try:
        with contextlib.suppress(OSError):  # closing it frees whatever is left
            stat = os.fstat(descriptor)
            if stat.st_nlink == 0:
                _shrink(descriptor, stat.st_size)
    finally:
        os.close(descriptor)


def _shrink(descriptor: int, size_bytes: int) -> None:
    while size_bytes > 0:
        began = time.monotonic()
        size_bytes = max(size_bytes - PIECE_BYTES, 0)
        try:
            os.lseek(descriptor, size_bytes, os.SEEK_DATA)
        except OSError:
            continue  # a hole up to the end (ENXIO)
        os.ftruncate(descriptor, size_bytes)
        os.fdatasync(descriptor)  # or all pieces are told of together
        time.sleep(PAUSE_SHARE * (time.monotonic() - began))
