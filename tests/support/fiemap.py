"""The extents of files, as the file system tells them (FS_IOC_FIEMAP, linux/fiemap.h)."""

from __future__ import annotations

import fcntl
import struct
from pathlib import Path
from typing import Final

_FS_IOC_FIEMAP: Final = 0xC020660B
_FLAG_SYNC: Final = 0x1
_LAST: Final = 0x1
_UNWRITTEN: Final = 0x800
_HEADER: Final = struct.Struct("=QQIIII")
_EXTENT: Final = struct.Struct("=QQQQQIIII")
_MANY: Final = 4096


def extent_bytes(path: Path) -> tuple[int, int]:
    """Return how many bytes of a file are in extents that were written, and in such that were not.

    :raise OSError: EOPNOTSUPP where the file system does not tell.
    """
    asked = bytearray(_HEADER.size + _MANY * _EXTENT.size)
    _HEADER.pack_into(asked, 0, 0, (1 << 64) - 1, _FLAG_SYNC, 0, _MANY, 0)
    with path.open("rb") as file:
        fcntl.ioctl(file, _FS_IOC_FIEMAP, asked)
    count = _HEADER.unpack_from(asked)[3]
    found = [0, 0]
    for index in range(count):
        _, _, length, _, _, flags, *_ = _EXTENT.unpack_from(asked, _HEADER.size + index * _EXTENT.size)
        found[bool(flags & _UNWRITTEN)] += length
    assert count == 0 or flags & _LAST, "the file has more extents"
    return found[0], found[1]
