"""Memory: files in RAM, holes in them, locked and aligned buffers."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from types import TracebackType
from typing import Final

from farpage.errors import Unsupported
from farpage.kernel.libc import last_error, libc

PAGE_SIZE: Final = mmap.PAGESIZE
"""Bytes in one page of this machine."""
HUGE_PAGE_BYTES: Final = 2 << 20
"""Bytes in a huge page of machines with pages of 4 KiB (Documentation/admin-guide/mm/transhuge.rst)."""
LONG_BYTES: Final = 64 << 10
"""From this size on, pools cut their buffers from huge pages: a device is given each as one segment."""

_FALLOC_KEEP_SIZE, _FALLOC_PUNCH_HOLE = 0x01, 0x02
_MAP_NORESERVE, _MAP_FIXED_NOREPLACE = 0x4000, 0x100000
_MCL_CURRENT, _MCL_FUTURE, _MCL_ONFAULT = 1, 2, 4
_MADV_POPULATE_WRITE = 23
"""Linux 5.14."""


def create_memfd(name: str, size_bytes: int, *, sealable: bool = False) -> int:
    """Make a memfd of `size_bytes`, all holes, and return its descriptor (close-on-exec).

    :raise OSError: ENOMEM, EMFILE, EFBIG.
    """
    flags = os.MFD_CLOEXEC | (os.MFD_ALLOW_SEALING if sealable else 0)
    descriptor = os.memfd_create(name, flags)
    try:
        os.ftruncate(descriptor, size_bytes)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def punch_hole(descriptor: int, offset: int, length: int) -> None:
    """Free a range of a file (fallocate(2), FALLOC_FL_PUNCH_HOLE); its size stays.

    Only whole pages are freed; the parts of pages at the edges are zeroed.

    :raise OSError: with errno of fallocate(2).
    """
    if libc.fallocate(descriptor, _FALLOC_PUNCH_HOLE | _FALLOC_KEEP_SIZE, offset, length):
        raise last_error()


def resident_ranges(descriptor: int, offset: int, length: int) -> Iterator[tuple[int, int]]:
    """Yield `(offset, length)` in bytes of the parts of a memfd that hold pages, in rising order.

    Pages in host swap count as held. Pages that come or go meanwhile may be seen or not.
    The file is opened anew, because seeking would move a position that other processes share.

    :raise OSError: when /proc is not mounted.
    """
    own = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        end = offset + length
        while offset < end:
            try:
                start = os.lseek(own, offset, os.SEEK_DATA)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                raise
            if start >= end:
                return
            try:
                offset = min(os.lseek(own, start, os.SEEK_HOLE), end)
            except OSError as error:
                if error.errno == errno.ENXIO:
                    return
                raise
            if offset > start:
                yield start, offset - start
    finally:
        os.close(own)


def resident_bytes(descriptor: int) -> int:
    """Return the bytes that a memfd holds, in RAM and in host swap."""
    return os.fstat(descriptor).st_blocks * 512


def lock_memory() -> None:
    """Keep this process's pages in RAM, present and future ones from their first use on (mlockall(2)).

    :raise Unsupported: when the limit on locked memory does not allow it.
    """
    if libc.mlockall(_MCL_CURRENT | _MCL_FUTURE | _MCL_ONFAULT):
        raise Unsupported(
            "locking the daemon's memory",
            os.strerror(last_error().errno or errno.EIO),
            "raise 'ulimit -l' (systemd: LimitMEMLOCK=infinity) or give it CAP_IPC_LOCK",
        )


def reserve_addresses(start: int, length: int) -> None:
    """Keep an unused range of this process's addresses from being mapped; accesses to it are a SIGSEGV.

    :raise OSError: EEXIST when a part of it is in use.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | _MAP_FIXED_NOREPLACE
    if libc.mmap(start, length, 0, flags, -1, 0) != start:
        raise last_error()


def address_of(buffer: memoryview | bytearray | mmap.mmap | bytes) -> int:
    """Return the address of a contiguous buffer's first byte; the caller keeps the buffer alive."""
    try:
        return ctypes.addressof(ctypes.c_char.from_buffer(buffer))
    except TypeError:  # it is read-only
        import numpy as np

        return int(np.frombuffer(buffer, np.uint8).ctypes.data)


def map_memory(size_bytes: int) -> tuple[mmap.mmap, memoryview]:
    """Map zeroed memory of this process; returns the mapping, and the view of the part of it to be used.

    That begins with a page, and from HUGE_PAGE_BYTES on with a huge page, and is of those where the kernel
    has them: what is contiguous is one segment for a device, and little to pin.
    """
    if size_bytes < HUGE_PAGE_BYTES:
        mapping = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        return mapping, memoryview(mapping)
    mapping = mmap.mmap(-1, size_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    start = -address_of(mapping) % HUGE_PAGE_BYTES
    with contextlib.suppress(OSError):  # EINVAL: the kernel has none
        mapping.madvise(mmap.MADV_HUGEPAGE, start, size_bytes)
    return mapping, memoryview(mapping)[start : start + size_bytes]


class AlignedBuffer:
    """Page-aligned, zeroed memory of this process: `address`, and `view` as a memoryview of bytes.

    Where it is long, it is of huge pages; see `map_memory`. Views that were handed out must be released
    before `close`.
    """

    def __init__(self, size_bytes: int, *, populate: bool = False) -> None:
        """`populate` allocates all pages now, so that later use needs no memory.

        :raise OSError: ENOMEM.
        """
        self._map: mmap.mmap | None
        self._map, view = map_memory(size_bytes)
        self._take(view)
        if populate:
            try:
                start = self.address - address_of(self._map)
                self._map.madvise(_MADV_POPULATE_WRITE, start, size_bytes)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    self.close()
                    raise
                self._touch()

    @staticmethod
    def parts(whole_bytes: int, size_bytes: int) -> list[AlignedBuffer]:
        """Return buffers of `size_bytes` that make up one of `whole_bytes`, a multiple of it, populated.

        Its memory goes with the last of them and its slices.

        :raise OSError: ENOMEM.
        """
        whole = AlignedBuffer(whole_bytes, populate=True)
        parts = []
        for start in range(0, whole_bytes, size_bytes):
            part = AlignedBuffer.__new__(AlignedBuffer)
            part._map = None
            part._take(whole.view[start : start + size_bytes])
            parts.append(part)
        return parts

    def _take(self, view: memoryview) -> None:
        self.view = view
        """The memory."""
        self.size_bytes = len(view)
        """Its length."""
        self.address = address_of(view)
        """Where it begins."""

    def _touch(self) -> None:
        for offset in range(0, self.size_bytes, PAGE_SIZE):
            self.view[offset] = 0

    def close(self) -> None:
        """Give the memory back.

        :raise BufferError: while slices of `view` are in use, unless it is part of another one.
        """
        self.view.release()
        if self._map is not None:
            self._map.close()

    def __enter__(self) -> AlignedBuffer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
