"""Archives in cpio's newc form, which the kernel unpacks as initramfs.

The format is described in the kernel's Documentation/driver-api/early-userspace/buffer-format.rst. Archives
may follow one another in one file. Equal entries make equal bytes.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable
from dataclasses import dataclass

_TRAILER = "TRAILER!!!"


@dataclass(frozen=True)
class Entry:
    """One file, folder or symbolic link; `path` is relative to the root."""

    path: str
    mode: int
    """Type and permissions, as in st_mode."""
    data: bytes = b""
    """Contents of a file, target of a link."""


def file_entry(path: str, data: bytes, permissions: int = 0o755) -> Entry:
    """Return a regular file."""
    return Entry(path, stat.S_IFREG | permissions, data)


def link_entry(path: str, target: str) -> Entry:
    """Return a symbolic link."""
    return Entry(path, stat.S_IFLNK | 0o777, target.encode())


def archive(entries: Iterable[Entry]) -> bytes:
    """Return the archive of the entries and of the folders above them, in order of their paths."""
    files = {entry.path: entry for entry in entries}
    for path in list(files):
        parts = path.split("/")[:-1]
        for depth in range(1, len(parts) + 1):
            folder = "/".join(parts[:depth])
            files.setdefault(folder, Entry(folder, stat.S_IFDIR | 0o755))
    members = [_member(number, files[path]) for number, path in enumerate(sorted(files), start=1)]
    return b"".join([*members, _member(0, Entry(_TRAILER, 0))])


def _member(inode: int, entry: Entry) -> bytes:
    name = entry.path.encode() + b"\0"
    links, no_time, no_device = 1, 0, (0, 0, 0, 0)
    numbers = (inode, entry.mode, 0, 0, links, no_time, len(entry.data), *no_device, len(name), 0)
    header = b"070701" + b"".join(b"%08X" % number for number in numbers)
    return _padded(header + name) + _padded(entry.data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
