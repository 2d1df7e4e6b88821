"""The file of a volume: its system calls, made in threads. Each returns 0 or an errno, or raises OSError.

What changes the file looks first, in the thread, whether the volume is still its owner's.
"""

from __future__ import annotations

import enum
import errno
import os
from collections.abc import Callable
from typing import Final

from farpage.blockio import Allocation, Extent
from farpage.device.base import BLOCK_BYTES, never
from farpage.kernel.libc import last_error, libc
from farpage.kernel.memory import AlignedBuffer

_FALLOC_KEEP_SIZE: Final = 0x01
FALLOC_PUNCH_HOLE: Final = 0x02
FALLOC_ZERO_RANGE: Final = 0x10
"""linux/falloc.h"""

BUFFERED_WRITE_BYTES: Final = 256 << 10
"""The page cache is filled in steps of this: for longer writes it takes larger folios, and on some kernels
takes several times as long for the same bytes."""

EXTENTS_MAX: Final = 1024
"""So many extents at most are looked up for one command."""

ZEROS: Final = AlignedBuffer(1 << 20).view.toreadonly()
"""Fit for direct I/O."""
NOT_SUPPORTED: Final = (errno.EOPNOTSUPP, errno.ENOSYS)


class Access(enum.StrEnum):
    """How a volume's file is accessed."""

    DIRECT = "direct"
    """O_DIRECT."""
    DROP = "buffered, page cache dropped"
    """For file systems without O_DIRECT: through the page cache, which is dropped after use."""
    BUFFERED = "buffered"


class VolumeFile:
    """An open file whose descriptor it owns; `size_bytes` is a multiple of `BLOCK_BYTES`.

    `superseded` is asked before each change: True refuses it with ESHUTDOWN. So is `over`, right before the
    system call that changes the file; it must be cheap. The volume begins at `origin_bytes` of the file, a
    multiple of `BLOCK_BYTES`. One that is `full` has all of its blocks, and none is ever given back.
    """

    quick_refusal = True
    """Whether `refusal` never waits for the device."""

    def __init__(
        self,
        descriptor: int,
        size_bytes: int,
        *,
        access: Access,
        superseded: Callable[[], bool] | None,
        origin_bytes: int = 0,
        over: Callable[[], bool] = never,
        full: bool = False,
    ) -> None:
        """Take over `descriptor`; `superseded` is None for a read-only volume."""
        self.descriptor = descriptor
        self.size_bytes = size_bytes
        self.origin_bytes = origin_bytes
        self.access = access
        self.read_only = superseded is None
        self.over = over
        self.full = full
        self._superseded = superseded if superseded is not None else never
        self._sync_error = 0

    def _is_whole(self) -> bool:
        """Tell whether the file reaches to the volume's end."""
        return os.fstat(self.descriptor).st_size >= self.origin_bytes + self.size_bytes

    def read(self, buffer: AlignedBuffer, offset: int, length: int) -> int:
        """Read into the beginning of a buffer."""
        with buffer.view[:length] as view:
            read_fully(self.descriptor, view, self.origin_bytes + offset)
        self._drop(offset, length)
        return 0

    def refusal(self) -> int:
        """Return the errno with which writes are refused now; 0 when they are not.

        :raise OSError: it cannot be told.
        """
        if self._superseded():
            return errno.ESHUTDOWN
        # Beyond the end of a file that was cut, a write would make what is missing before it read as zeros.
        if not self._is_whole():
            return errno.EIO
        return errno.ESHUTDOWN if self.over() else 0

    def write(self, data: memoryview, offset: int, fua: bool) -> int:
        """Write, unless the volume or the leave to write is somebody else's by now."""
        if error := self.refusal():
            return error
        return self._write(data, offset, fua)

    def write_each(self, writes: list[tuple[memoryview, int]], errors: list[int]) -> int:
        """Write what came together, data and offset, one after the other; appends an errno or 0 for each.

        Whether the volume is somebody else's is asked once for all of them.
        """
        refused = self.refusal()
        for data, offset in writes:
            try:
                errors.append(refused or self._write(data, offset, False))
            except OSError as problem:
                errors.append(problem.errno or errno.EIO)
        return 0

    def _write(self, data: memoryview, offset: int, fua: bool) -> int:
        step = len(data) if self.access is Access.DIRECT else BUFFERED_WRITE_BYTES
        for at in range(0, len(data), step):
            if self.over():
                return errno.ESHUTDOWN
            with data[at : at + step] as part:
                write_fully(self.descriptor, part, self.origin_bytes + offset + at)
        self._drop(offset, len(data))
        return self._sync() if fua else 0

    def write_copied(self, buffer: AlignedBuffer, data: memoryview, offset: int, fua: bool) -> int:
        """Write by way of an aligned buffer."""
        with buffer.view[: len(data)] as view:
            view[:] = data
            return self.write(view, offset, fua)

    def rewrite(
        self, buffer: AlignedBuffer, span: tuple[int, int], data: memoryview, offset: int, fua: bool
    ) -> int:
        """Write a range that is not made of whole blocks: read its first and last, change them, write all."""
        start, end = span
        with buffer.view[: end - start] as view:
            with view[:BLOCK_BYTES] as first:
                read_fully(self.descriptor, first, self.origin_bytes + start)
            if end - start > BLOCK_BYTES:
                with view[-BLOCK_BYTES:] as last:
                    read_fully(self.descriptor, last, self.origin_bytes + end - BLOCK_BYTES)
            view[offset - start : offset - start + len(data)] = data
            return self.write(view, start, fua)

    def zero(self, offset: int, length: int, punch: bool, fast: bool, fua: bool) -> int:
        """Punch a hole, or zero the range and keep it allocated; of a full volume, write zeros.

        Of that a range which is not made of whole blocks is not to be changed otherwise meanwhile.
        """
        if self._superseded():
            return errno.ESHUTDOWN
        if self.full:
            # What the file system only marks as zeros has to be allocated anew as a write comes.
            if fast:
                return errno.ENOTSUP
            if self.access is Access.DIRECT:
                self._write_zeros_direct(offset, length)
            else:
                self._write_zeros(offset, length)
                self._drop(offset, length)
            return self._sync() if fua else 0
        mode = FALLOC_PUNCH_HOLE if punch else FALLOC_ZERO_RANGE
        if self.over():
            return errno.ESHUTDOWN
        try:
            self._allocate(mode, offset, length)
        except OSError as error:
            if error.errno not in NOT_SUPPORTED:
                raise
            if fast:
                return errno.ENOTSUP
            self._write_zeros(offset, length)
        return self._sync() if fua else 0

    def _write_zeros(self, offset: int, length: int) -> None:
        """Write zeros through the page cache, which takes any alignment."""
        descriptor = os.open(f"/proc/self/fd/{self.descriptor}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            at, end = self.origin_bytes + offset, self.origin_bytes + offset + length
            while at < end:
                size = min(len(ZEROS), end - at)
                self._go_on()
                write_fully(descriptor, ZEROS[:size], at)
                at += size
            if self.access is Access.DIRECT:
                # What is read with direct I/O next must not miss it (open(2), NOTES).
                os.fdatasync(descriptor)
        finally:
            os.close(descriptor)

    def _write_zeros_direct(self, offset: int, length: int) -> None:
        """Write zeros past the page cache; blocks that are in the range in part are read and changed."""
        at, end = self.origin_bytes + offset, self.origin_bytes + offset + length
        while at < end:
            before = at % BLOCK_BYTES
            size = min(len(ZEROS), (end - at) // BLOCK_BYTES * BLOCK_BYTES)
            if not before and size:
                self._go_on()
                write_fully(self.descriptor, ZEROS[:size], at)
            else:
                size = min(BLOCK_BYTES - before, end - at)
                with AlignedBuffer(BLOCK_BYTES) as block:
                    read_fully(self.descriptor, block.view, at - before)
                    block.view[before : before + size] = ZEROS[:size]
                    self._go_on()
                    write_fully(self.descriptor, block.view, at - before)
            at += size

    def _go_on(self) -> None:
        if error := self.refusal():
            raise OSError(error, "the volume is not to be written to any more")

    def trim(self, offset: int, length: int, fua: bool) -> int:
        """Give the range back to the file system; a full volume keeps it, with what is in it."""
        if self._superseded() or self.over():
            return errno.ESHUTDOWN
        if self.full:
            return 0
        try:
            self._allocate(FALLOC_PUNCH_HOLE, offset, length)
        except OSError as error:
            # A trim is a hint; a file system without holes keeps the contents.
            if error.errno not in NOT_SUPPORTED:
                raise
        return self._sync() if fua else 0

    def cache(self, offset: int, length: int) -> int:
        """Have the kernel read the range ahead."""
        self._advise(offset, length, os.POSIX_FADV_WILLNEED)
        return 0

    def flush(self) -> int:
        """Put the data and what is needed to find it on stable storage."""
        error = self._sync()
        self._drop(0, self.size_bytes)
        return error

    def extents(self, offset: int, length: int, found: list[Extent]) -> int:
        """Append data and holes to `found`, at most `EXTENTS_MAX` of them."""
        descriptor = self.descriptor
        if not self._is_whole():
            return errno.EIO
        offset, end = self.origin_bytes + offset, self.origin_bytes + offset + length
        while offset < end and len(found) < EXTENTS_MAX:
            data = min(_seek(descriptor, offset, os.SEEK_DATA, end), end)
            if data > offset:
                found.append(Extent(data - offset, Allocation.HOLE | Allocation.ZERO))
                offset = data
                continue
            hole = min(_seek(descriptor, offset, os.SEEK_HOLE, end), end)
            if hole <= offset:
                # Punched between the two calls; the next round sees the hole.
                continue
            found.append(Extent(hole - offset, Allocation.DATA))
            offset = hole
        return 0

    def _allocate(self, mode: int, offset: int, length: int) -> None:
        """Make a range a hole, or zeros (fallocate(2)); the file's size stays."""
        fallocate(self.descriptor, mode, self.origin_bytes + offset, length)

    def _drop(self, offset: int, length: int) -> None:
        """Have the page cache forget the range where it is not to be used."""
        if self.access is Access.DROP:
            self._advise(offset, length, os.POSIX_FADV_DONTNEED)

    def _advise(self, offset: int, length: int, advice: int) -> None:
        os.posix_fadvise(self.descriptor, self.origin_bytes + offset, length, advice)

    def _sync(self) -> int:
        """Sync; a failure stays, as the kernel reports it once, then takes the lost pages for clean."""
        if self._sync_error == 0:
            try:
                os.fdatasync(self.descriptor)
            except OSError as error:
                self._sync_error = error.errno or errno.EIO
        return self._sync_error

    def open_to_read(self) -> int:
        """Open the file once more, read-only and for direct I/O; without the lock of the one that is open.

        :raise OSError:
        """
        return os.open(f"/proc/self/fd/{self.descriptor}", os.O_RDONLY | os.O_DIRECT | os.O_CLOEXEC)

    def detach(self) -> int:
        """Let go of the descriptor, which the caller closes, and of who tells whether it is superseded."""
        # That holds the volume's header open, and whoever still refers to this volume may do so for long.
        self._superseded = never
        descriptor, self.descriptor = self.descriptor, -1
        return descriptor


def read_fully(descriptor: int, into: memoryview, offset: int) -> None:
    """Fill `into`; the file's end before that means that somebody has cut the file."""
    filled = os.preadv(descriptor, [into], offset)
    while filled < len(into):
        with into[filled:] as rest:
            count = os.preadv(descriptor, [rest], offset + filled)
        if count == 0:
            raise OSError(errno.EIO, "the file ends within the volume")
        filled += count


def write_fully(descriptor: int, data: memoryview, offset: int) -> None:
    """Write all of `data`.

    :raise OSError:
    """
    written = os.pwritev(descriptor, [data], offset)
    while written < len(data):
        with data[written:] as rest:
            count = os.pwritev(descriptor, [rest], offset + written)
        if count == 0:
            raise OSError(errno.EIO, "nothing was written")
        written += count


def fallocate(descriptor: int, mode: int, offset: int, length: int) -> None:
    """Change the allocation of a range; the file's size stays (fallocate(2)).

    :raise OSError:
    """
    if libc.fallocate(descriptor, mode | _FALLOC_KEEP_SIZE, offset, length):
        raise last_error()


def _seek(descriptor: int, offset: int, whence: int, at_end: int) -> int:
    """Find the next data or hole; `at_end` when there is none behind `offset` (ENXIO)."""
    try:
        return os.lseek(descriptor, offset, whence)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return at_end
        raise
