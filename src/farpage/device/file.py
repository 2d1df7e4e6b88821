"""A volume in a file: commands become system calls, made in threads; direct reads go through io_uring.

With direct I/O what is aligned goes between the caller's memory and the device; the rest takes
a detour over aligned buffers. Without it the kernel's page cache sees to that.
"""

from __future__ import annotations

import asyncio
import enum
import errno
import os
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from farpage.blockio import Allocation, BlockLimits, Done, Extent, ExtentsDone, Feature, ReadDone
from farpage.device.base import BLOCK_BYTES, never
from farpage.device.engine import Engine
from farpage.device.reads import RingReader
from farpage.device.spans import SpanGate
from farpage.kernel.libc import last_error, libc
from farpage.kernel.memory import AlignedBuffer, address_of

_FALLOC_KEEP_SIZE: Final = 0x01
FALLOC_PUNCH_HOLE: Final = 0x02
FALLOC_ZERO_RANGE: Final = 0x10
"""linux/falloc.h"""

EXTENTS_MAX: Final = 1024
"""So many extents at most are looked up for one command."""

FEATURES: Final = (
    Feature.FLUSH
    | Feature.FUA
    | Feature.TRIM
    | Feature.ZERO
    | Feature.FAST_ZERO
    | Feature.EXTENTS
    | Feature.MULTI_CONN
)

_ZEROS: Final = bytes(1 << 20)
NOT_SUPPORTED: Final = (errno.EOPNOTSUPP, errno.ENOSYS)
_CLIENT_ERRNO: Final = {
    errno.EDQUOT: errno.ENOSPC,
    errno.EFBIG: errno.ENOSPC,
    errno.EROFS: errno.EPERM,
    errno.EACCES: errno.EPERM,
} | {number: number for number in (errno.EPERM, errno.ENOMEM, errno.ENOSPC, errno.ENOTSUP, errno.ESHUTDOWN)}


class Access(enum.StrEnum):
    """How a volume's file is accessed."""

    DIRECT = "direct"
    """O_DIRECT."""
    DROP = "buffered, page cache dropped"
    """For file systems without O_DIRECT: through the page cache, which is dropped after use."""
    BUFFERED = "buffered"


def client_errno(error: int) -> int:
    """Return what a command finishes with: the error itself where it tells the client something, else EIO."""
    return _CLIENT_ERRNO.get(error, errno.EIO) if error else 0


class FileVolume:
    """`BlockIO` over an open file whose descriptor it owns; `size_bytes` is a multiple of `BLOCK_BYTES`.

    `superseded` is asked in the thread before each change: True refuses it with ESHUTDOWN. So is `over`, when
    a command comes and again right before the system call that changes the file; it must be cheap. `gate`
    is common to all who have the file open in this process. The volume begins at `origin_bytes` of the file,
    a multiple of `BLOCK_BYTES`.
    """

    limits = BlockLimits(minimum=1, preferred=BLOCK_BYTES, maximum=32 << 20)

    def __init__(
        self,
        descriptor: int,
        size_bytes: int,
        *,
        access: Access,
        engine: Engine,
        gate: SpanGate,
        superseded: Callable[[], bool] | None,
        origin_bytes: int = 0,
        over: Callable[[], bool] = never,
    ) -> None:
        """Take over `descriptor`; `superseded` is None for a read-only volume.

        Without a reader of the `engine`, and for what it does not take, threads read.
        """
        self.size_bytes = size_bytes
        self.read_only = superseded is None
        self.features = FEATURES | (Feature.CACHE if access is Access.BUFFERED else Feature.NONE)
        self._descriptor = descriptor
        self._origin = origin_bytes
        self._superseded = superseded if superseded is not None else never
        self._over = over
        self._direct = access is Access.DIRECT
        self._drop = access is Access.DROP
        self._nowait = access is Access.BUFFERED
        self._threads = engine.threads
        self._reader = engine.reader if access is Access.DIRECT else None
        self._buffers = engine.buffers
        self._gate = gate
        self._in_flight = 0
        self._idle: asyncio.Future[None] | None = None
        self._sync_error = 0

    # Commands, in the event loop

    def read_now(self, offset: int, into: memoryview) -> bool:
        """Fill `into` from the page cache; never with direct I/O."""
        if not self._nowait:
            return False
        try:
            return os.preadv(self._descriptor, [into], self._origin + offset, os.RWF_NOWAIT) == len(into)
        except BlockingIOError:
            return False
        except OSError as error:
            # The file system cannot; any other error is found again, and reported, by `read`.
            self._nowait = error.errno not in NOT_SUPPORTED
            return False

    def read(self, offset: int, length: int, done: ReadDone) -> None:
        """Read into a buffer that is valid while `done` runs."""
        self._check_range(offset, length)
        if length == 0:
            done(0, memoryview(b""))
            return
        start, end = _blocks(offset, length) if self._direct else (offset, offset + length)
        buffer = self._buffers.take(end - start)

        def finished(error: int) -> None:
            try:
                if error:
                    done(error, None)
                else:
                    with buffer.view[offset - start : offset - start + length] as payload:
                        done(0, payload)
            finally:
                self._buffers.give_back(buffer)

        if self._reader is None or not self._start_read(self._reader, finished, buffer, start, end - start):
            self._submit(finished, self._do_read, buffer, start, end - start)

    def write(self, offset: int, data: memoryview, done: Done, *, fua: bool = False) -> None:
        """Write without a copy where `data`, its place and its length are multiples of a block."""
        length = len(data)
        if not self._may_change(offset, length, done):
            return
        if not self._direct:
            self._submit(done, self._do_write, data, offset, fua)
            return
        start, end = _blocks(offset, length)
        aligned = start == offset and end == offset + length
        if aligned and address_of(data) % BLOCK_BYTES == 0:
            self._change(start, end, done, self._do_write, data, offset, fua)
            return
        buffer = self._buffers.take(end - start)

        def finished(error: int) -> None:
            self._buffers.give_back(buffer)
            done(error)

        if aligned:
            self._change(start, end, finished, self._do_write_copied, buffer, data, offset, fua)
        else:
            self._change(
                start,
                end,
                finished,
                self._do_rewrite,
                buffer,
                (start, end),
                data,
                offset,
                fua,
                exclusive=True,
            )

    def zero(
        self,
        offset: int,
        length: int,
        done: Done,
        *,
        punch: bool = True,
        fast: bool = False,
        fua: bool = False,
    ) -> None:
        """Punch a hole, or zero the range and keep it allocated; write zeros where the file system can't."""
        if self._may_change(offset, length, done):
            start, end = _blocks(offset, length)
            # The kernel zeroes parts of blocks itself, in one go with respect to other changes.
            self._change(start, end, done, self._do_zero, offset, length, punch, fast, fua)

    def trim(self, offset: int, length: int, done: Done, *, fua: bool = False) -> None:
        """Give the whole blocks of the range back to the file system."""
        if not self._may_change(offset, length, done):
            return
        start = (offset + BLOCK_BYTES - 1) // BLOCK_BYTES * BLOCK_BYTES
        end = (offset + length) // BLOCK_BYTES * BLOCK_BYTES
        if start >= end:
            done(0)
            return
        self._change(start, end, done, self._do_trim, start, end - start, fua)

    def cache(self, offset: int, length: int, done: Done) -> None:
        """Have the kernel read the range ahead; not with direct I/O."""
        self._check_range(offset, length)
        if Feature.CACHE in self.features:
            self._submit(done, self._do_cache, offset, length)
        else:
            done(errno.ENOTSUP)

    def flush(self, done: Done) -> None:
        """Put the data and what is needed to find it on stable storage (fdatasync(2))."""
        if self.read_only:
            done(0)
        else:
            self._submit(done, self._do_flush)

    def extents(self, offset: int, length: int, done: ExtentsDone) -> None:
        """Report data and holes (lseek(2), SEEK_DATA), at most `EXTENTS_MAX` of them."""
        self._check_range(offset, length)
        found: list[Extent] = []

        def finished(error: int) -> None:
            done(error, None if error else found)

        self._submit(finished, self._do_extents, offset, length, found)

    async def close(self) -> None:
        """Wait for the commands in flight and close the file."""
        if self._in_flight:
            self._idle = asyncio.get_running_loop().create_future()
            await self._idle
        # It holds the volume's header open, and whoever still refers to this volume may do so for long.
        self._superseded = never
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            await self._threads.run(os.close, descriptor)

    # Between the event loop and the threads

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size_bytes:
            raise ValueError(f"{length} bytes at {offset} are outside a volume of {self.size_bytes} bytes")
        if self._descriptor < 0:
            raise ValueError("the volume is closed")

    def _may_change(self, offset: int, length: int, done: Done) -> bool:
        self._check_range(offset, length)
        if self.read_only or length == 0:
            done(errno.EPERM if self.read_only else 0)
            return False
        if self._over():
            done(errno.ESHUTDOWN)
            return False
        return True

    def _submit(self, done: Done, work: Callable[..., int], *arguments: Any) -> None:
        self._in_flight += 1
        self._threads.submit(partial(self._finish, done), work, *arguments)

    def _start_read(
        self, reader: RingReader, done: Done, buffer: AlignedBuffer, offset: int, length: int
    ) -> bool:
        """Read without a thread, unless that turns out to be more than one plain read."""

        def completed(result: int) -> None:
            if result == length:
                self._finish(done, 0)
            else:  # short, or refused: the threads find out why
                self._threads.submit(partial(self._finish, done), self._do_read, buffer, offset, length)

        started = reader.read(self._descriptor, buffer, length, self._origin + offset, completed)
        self._in_flight += started
        return started

    def _finish(self, done: Done, error: int) -> None:
        self._in_flight -= 1
        try:
            done(client_errno(error))
        finally:
            if self._in_flight == 0 and self._idle is not None and not self._idle.done():
                self._idle.set_result(None)

    def _change(
        self,
        start: int,
        end: int,
        done: Done,
        work: Callable[..., int],
        *arguments: Any,
        exclusive: bool = False,
    ) -> None:
        """Submit a change of the blocks from `start` to `end` when no conflicting one is under way."""
        # A change that waits at the gate counts as in flight.
        self._in_flight += 1

        def begin(token: int) -> None:
            def finished(error: int) -> None:
                self._gate.leave(token)
                self._finish(done, error)

            self._threads.submit(finished, work, *arguments)

        self._gate.enter(start, end, begin, exclusive=exclusive)

    # System calls, in the threads

    def _is_whole(self) -> bool:
        """Tell whether the file reaches to the volume's end."""
        return os.fstat(self._descriptor).st_size >= self._origin + self.size_bytes

    def _do_read(self, buffer: AlignedBuffer, offset: int, length: int) -> int:
        with buffer.view[:length] as view:
            read_fully(self._descriptor, view, self._origin + offset)
        if self._drop:
            self._advise(offset, length, os.POSIX_FADV_DONTNEED)
        return 0

    def _do_write(self, data: memoryview, offset: int, fua: bool) -> int:
        if self._superseded():
            return errno.ESHUTDOWN
        # Beyond the end of a file that was cut, a write would make what is missing before it read as zeros.
        if not self._is_whole():
            return errno.EIO
        if self._over():
            return errno.ESHUTDOWN
        write_fully(self._descriptor, data, self._origin + offset)
        if self._drop:
            self._advise(offset, len(data), os.POSIX_FADV_DONTNEED)
        return self._sync() if fua else 0

    def _do_write_copied(self, buffer: AlignedBuffer, data: memoryview, offset: int, fua: bool) -> int:
        with buffer.view[: len(data)] as view:
            view[:] = data
            return self._do_write(view, offset, fua)

    def _do_rewrite(
        self, buffer: AlignedBuffer, span: tuple[int, int], data: memoryview, offset: int, fua: bool
    ) -> int:
        """Write a range that is not made of whole blocks: read its first and last, change them, write all."""
        start, end = span
        with buffer.view[: end - start] as view:
            with view[:BLOCK_BYTES] as first:
                read_fully(self._descriptor, first, self._origin + start)
            if end - start > BLOCK_BYTES:
                with view[-BLOCK_BYTES:] as last:
                    read_fully(self._descriptor, last, self._origin + end - BLOCK_BYTES)
            view[offset - start : offset - start + len(data)] = data
            return self._do_write(view, start, fua)

    def _do_zero(self, offset: int, length: int, punch: bool, fast: bool, fua: bool) -> int:
        if self._superseded():
            return errno.ESHUTDOWN
        mode = FALLOC_PUNCH_HOLE if punch else FALLOC_ZERO_RANGE
        if self._over():
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
        descriptor = os.open(f"/proc/self/fd/{self._descriptor}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            at, end = self._origin + offset, self._origin + offset + length
            while at < end:
                size = min(len(_ZEROS), end - at)
                if self._over():
                    raise OSError(errno.ESHUTDOWN, "the lease has run out")
                write_fully(descriptor, memoryview(_ZEROS)[:size], at)
                at += size
            if self._direct:
                # What is read with direct I/O next must not miss it (open(2), NOTES).
                os.fdatasync(descriptor)
        finally:
            os.close(descriptor)

    def _do_trim(self, offset: int, length: int, fua: bool) -> int:
        if self._superseded() or self._over():
            return errno.ESHUTDOWN
        try:
            self._allocate(FALLOC_PUNCH_HOLE, offset, length)
        except OSError as error:
            # A trim is a hint; a file system without holes keeps the contents.
            if error.errno not in NOT_SUPPORTED:
                raise
        return self._sync() if fua else 0

    def _do_cache(self, offset: int, length: int) -> int:
        self._advise(offset, length, os.POSIX_FADV_WILLNEED)
        return 0

    def _allocate(self, mode: int, offset: int, length: int) -> None:
        """Make a range a hole, or zeros (fallocate(2)); the file's size stays."""
        fallocate(self._descriptor, mode, self._origin + offset, length)

    def _advise(self, offset: int, length: int, advice: int) -> None:
        os.posix_fadvise(self._descriptor, self._origin + offset, length, advice)

    def _do_flush(self) -> int:
        error = self._sync()
        if self._drop:
            self._advise(0, self.size_bytes, os.POSIX_FADV_DONTNEED)
        return error

    def _sync(self) -> int:
        """Sync; a failure stays, as the kernel reports it once, then takes the lost pages for clean."""
        if self._sync_error == 0:
            try:
                os.fdatasync(self._descriptor)
            except OSError as error:
                self._sync_error = error.errno or errno.EIO
        return self._sync_error

    def _do_extents(self, offset: int, length: int, found: list[Extent]) -> int:
        descriptor = self._descriptor
        if not self._is_whole():
            return errno.EIO
        offset, end = self._origin + offset, self._origin + offset + length
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


def _blocks(offset: int, length: int) -> tuple[int, int]:
    """Return start and end of the whole blocks that hold the range."""
    return (
        offset // BLOCK_BYTES * BLOCK_BYTES,
        (offset + length + BLOCK_BYTES - 1) // BLOCK_BYTES * BLOCK_BYTES,
    )


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
