"""Block devices: what the kernel says about one, and giving ranges of it back.

The ioctls are those of linux/fs.h; ranges are two 64-bit numbers, offset and length in bytes.
"""

from __future__ import annotations

import fcntl
import os
import stat
import struct
from typing import Final

_BLKROGET: Final = 0x125E
_BLKSSZGET: Final = 0x1268
_BLKDISCARD: Final = 0x1277
_BLKGETSIZE64: Final = 0x80081272

_INT: Final = struct.Struct("=i")
_NUMBER: Final = struct.Struct("=Q")
_RANGE: Final = struct.Struct("=QQ")
_LOCK: Final = struct.Struct("@hhqqi4x")
"""struct flock of fcntl(2) with 64-bit offsets: type, whence, start, length, pid."""


def is_block_device(descriptor: int) -> bool:
    """Tell whether an open file is a block device."""
    return stat.S_ISBLK(os.fstat(descriptor).st_mode)


def size_bytes(descriptor: int) -> int:
    """Return the size of a block device.

    :raise OSError: ENOTTY for anything else.
    """
    size: int = _NUMBER.unpack(fcntl.ioctl(descriptor, _BLKGETSIZE64, bytes(_NUMBER.size)))[0]
    return size


def logical_block_bytes(descriptor: int) -> int:
    """Return the smallest unit that the device reads and writes.

    :raise OSError: ENOTTY for anything else.
    """
    size: int = _INT.unpack(fcntl.ioctl(descriptor, _BLKSSZGET, bytes(_INT.size)))[0]
    return size


def is_read_only(descriptor: int) -> bool:
    """Tell whether the device refuses writes.

    :raise OSError: ENOTTY for anything else.
    """
    return bool(_INT.unpack(fcntl.ioctl(descriptor, _BLKROGET, bytes(_INT.size)))[0])


def discard(descriptor: int, offset: int, length: int) -> None:
    """Tell the device that a range's contents no longer matter; what it reads as then is undefined.

    :raise OSError: EOPNOTSUPP where the device cannot.
    """
    fcntl.ioctl(descriptor, _BLKDISCARD, _RANGE.pack(offset, length))


def try_lock(descriptor: int, byte: int, *, exclusive: bool) -> bool:
    """Take an advisory lock on one byte of a file, or return False while others hold it.

    It is one of F_OFD_SETLK (fcntl(2)) and belongs to the open file description: it goes when the last
    descriptor of that is closed, so with its process at the latest.

    :raise OSError: ENOLCK and the like.
    """
    kind = fcntl.F_WRLCK if exclusive else fcntl.F_RDLCK
    try:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _LOCK.pack(kind, os.SEEK_SET, byte, 1, 0))
    except BlockingIOError:
        return False
    return True
