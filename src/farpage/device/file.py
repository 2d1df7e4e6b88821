"""A volume in a file: commands become system calls in threads (`volumefile.py`).

Direct reads and writes need no thread: reads go to io_uring, writes to kernel AIO (`kernel/aio.py` says why).

With direct I/O what is aligned goes between the caller's memory and the device; the rest takes
a detour over aligned buffers. Without it the kernel's page cache sees to that.
"""

from __future__ import annotations

import asyncio
import errno
import os
from collections import deque
from collections.abc import Callable
from functools import partial
from typing import Any, Final

from farpage.blockio import BlockLimits, Done, Extent, ExtentsDone, Feature, Lent, ReadDone, SharedFile
from farpage.device.base import BLOCK_BYTES, never
from farpage.device.engine import Engine
from farpage.device.reads import RingReader
from farpage.device.spans import SpanGate
from farpage.device.volumefile import NOT_SUPPORTED, Access, VolumeFile
from farpage.device.writes import AsyncWriter, Write
from farpage.kernel.memory import AlignedBuffer, address_of
from farpage.nbd import eventloop

_preadv, _RWF_NOWAIT = os.preadv, os.RWF_NOWAIT

FEATURES: Final = (
    Feature.FLUSH
    | Feature.FUA
    | Feature.TRIM
    | Feature.ZERO
    | Feature.FAST_ZERO
    | Feature.EXTENTS
    | Feature.MULTI_CONN
)

WRITTEN_TOGETHER_MAX_BYTES: Final = 1 << 20
"""So much of what comes while a thread writes is left for it to write next."""
READS_OF_ONE_MAX: Final = 64
"""Reads of one opened volume that the device has at a time: enough to keep it busy, while those of another
do not come after thousands."""

_CLIENT_ERRNO: Final = {
    errno.EDQUOT: errno.ENOSPC,
    errno.EFBIG: errno.ENOSPC,
    errno.EROFS: errno.EPERM,
    errno.EACCES: errno.EPERM,
} | {number: number for number in (errno.EPERM, errno.ENOMEM, errno.ENOSPC, errno.ENOTSUP, errno.ESHUTDOWN)}


def client_errno(error: int) -> int:
    """Return what a command finishes with: the error itself where it tells the client something, else EIO."""
    return _CLIENT_ERRNO.get(error, errno.EIO) if error else 0


class FileVolume:
    """`BlockIO` over an open file.

    Changes are refused with ESHUTDOWN when the leave to write is over as they come, or later, by the file.
    `gate` is common to all who have the file open in this process.
    """

    limits = BlockLimits(minimum=1, preferred=BLOCK_BYTES, maximum=32 << 20)

    def __init__(
        self,
        file: VolumeFile,
        *,
        engine: Engine,
        gate: SpanGate,
    ) -> None:
        """Take the file over.

        Without a reader of the `engine`, and for what it does not take, threads read.
        """
        access = file.access
        self.size_bytes = file.size_bytes
        self.read_only = file.read_only
        self.features = FEATURES | (Feature.CACHE if access is Access.BUFFERED else Feature.NONE)
        self._file = file
        self._descriptor = file.descriptor
        self._origin = file.origin_bytes
        self._direct = access is Access.DIRECT
        self._full = file.full
        self._nowait = access is Access.BUFFERED
        self._threads = engine.threads
        self._reader = engine.reader if access is Access.DIRECT else None
        # Where asking for the owner may have to wait for the device, threads ask, and write.
        self._writer = engine.writer if access is Access.DIRECT and file.quick_refusal else None
        self._refusal = file.refusal
        self._buffers = engine.buffers
        self._gate = gate
        self._reading = 0
        """Reads begun and not finished."""
        self._waiting: deque[tuple[Done, AlignedBuffer, int, int]] = deque()
        """Reads that came while too many were under way, in their order."""
        self._writes: deque[tuple[Done, memoryview, int]] = deque()
        """Writes that wait for the thread which writes, in their order."""
        self._writing = False
        self._in_flight = 0
        self._idle: asyncio.Future[None] | None = None

    # Commands, in the event loop

    def read_now(self, offset: int, into: memoryview) -> bool:
        """Fill `into` from the page cache; never with direct I/O."""
        if not self._nowait:
            return False
        try:
            return _preadv(self._descriptor, (into,), self._origin + offset, _RWF_NOWAIT) == len(into)
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
            self._reading -= 1
            if self._waiting:
                self._begin_read(*self._waiting.popleft())
            try:
                if error:
                    done(error, None)
                else:
                    with buffer.view[offset - start : offset - start + length] as payload:
                        done(0, payload)
            finally:
                self._buffers.give(buffer)

        if self._reading < READS_OF_ONE_MAX:
            self._begin_read(finished, buffer, start, end - start)
        else:
            self._waiting.append((finished, buffer, start, end - start))

    def write(self, offset: int, data: memoryview, done: Done, *, fua: bool = False) -> None:
        """Write without a copy where `data`, its place and its length are multiples of a block."""
        length = len(data)
        if not self._may_change(offset, length, done):
            return
        if not self._direct and fua:
            self._submit(done, self._file.write, data, offset, fua)
            return
        if not self._direct:
            self._write_together(done, data, offset)
            return
        start, end = _blocks(offset, length)
        aligned = start == offset and end == offset + length
        if aligned and (address := address_of(data)) % BLOCK_BYTES == 0:
            if self._writer is None or fua:
                self._change(start, end, done, self._file.write, data, offset, fua)
            else:
                self._write_aligned(self._writer, address, offset, data, done)
            return
        buffer = self._buffers.take(end - start)

        def finished(error: int) -> None:
            self._buffers.give(buffer)
            done(error)

        if aligned:
            self._change(start, end, finished, self._file.write_copied, buffer, data, offset, fua)
        else:
            self._change(
                start,
                end,
                finished,
                self._file.rewrite,
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
        """Punch a hole, or zero the range and keep it allocated; write zeros where the file system can't.

        To a full volume zeros are written, and never `fast`.
        """
        if self._may_change(offset, length, done):
            start, end = _blocks(offset, length)
            # The kernel zeroes parts of blocks itself, in one go with respect to other changes.
            exclusive = self._full and end - start > length
            self._change(
                start, end, done, self._file.zero, offset, length, punch, fast, fua, exclusive=exclusive
            )

    def trim(self, offset: int, length: int, done: Done, *, fua: bool = False) -> None:
        """Give the whole blocks of the range back to the file system, unless the volume is full."""
        if not self._may_change(offset, length, done):
            return
        start = (offset + BLOCK_BYTES - 1) // BLOCK_BYTES * BLOCK_BYTES
        end = (offset + length) // BLOCK_BYTES * BLOCK_BYTES
        if start >= end:
            done(0)
            return
        self._change(start, end, done, self._file.trim, start, end - start, fua)

    def cache(self, offset: int, length: int, done: Done) -> None:
        """Have the kernel read the range ahead; not with direct I/O."""
        self._check_range(offset, length)
        if Feature.CACHE in self.features:
            self._submit(done, self._file.cache, offset, length)
        else:
            done(errno.ENOTSUP)

    def flush(self, done: Done) -> None:
        """Put the data and what is needed to find it on stable storage (fdatasync(2))."""
        if self.read_only:
            done(0)
        else:
            self._submit(done, self._file.flush)

    def extents(self, offset: int, length: int, done: ExtentsDone) -> None:
        """Report data and holes (lseek(2), SEEK_DATA), at most `EXTENTS_MAX` of them."""
        self._check_range(offset, length)
        found: list[Extent] = []

        def finished(error: int) -> None:
            done(error, None if error else found)

        self._submit(finished, self._file.extents, offset, length, found)

    def share_file(self) -> SharedFile | None:
        """Return another descriptor of the file, for others to read and write with in threads of theirs."""
        if not self._nowait and not self._direct:
            return None
        file = self._file
        return SharedFile(
            os.dup(self._descriptor),
            self._origin,
            direct=self._direct,
            refusal=None if self.read_only else file.refusal,
            over=None if file.over is never else file.over,
            share=self._gate.share,
        )

    async def lend(self) -> Lent | None:
        """Open the storage once more, for somebody to read; None without direct I/O.

        Past the page cache a read sees every write that was acknowledged, whichever process made it.
        """
        if not self._direct:
            return None
        try:
            return Lent(await self._threads.run(self._file.open_to_read), self._origin)
        except OSError:
            return None

    async def close(self) -> None:
        """Wait for the commands in flight and close the file."""
        if self._in_flight:
            self._idle = asyncio.get_running_loop().create_future()
            await self._idle
        if self._descriptor >= 0:
            self._descriptor = -1
            await self._threads.run(os.close, self._file.detach())

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
        if self._file.over():
            done(errno.ESHUTDOWN)
            return False
        return True

    def _submit(self, done: Done, work: Callable[..., int], *arguments: Any) -> None:
        self._in_flight += 1
        self._threads.submit(partial(self._finish, done), work, *arguments)

    def _begin_read(self, done: Done, buffer: AlignedBuffer, offset: int, length: int) -> None:
        self._reading += 1
        if self._reader is None or not self._start_read(self._reader, done, buffer, offset, length):
            self._submit(done, self._file.read, buffer, offset, length)

    def _start_read(
        self, reader: RingReader, done: Done, buffer: AlignedBuffer, offset: int, length: int
    ) -> bool:
        """Read without a thread, unless that turns out to be more than one plain read."""

        def completed(result: int) -> None:
            if result == length:
                self._finish(done, 0)
            else:  # short, or refused: the threads find out why
                self._threads.submit(partial(self._finish, done), self._file.read, buffer, offset, length)

        started = reader.read(self._descriptor, buffer, length, self._origin + offset, completed)
        self._in_flight += started
        return started

    def _write_together(self, done: Done, data: memoryview, offset: int) -> None:
        """Write to the page cache, where one write after the other is as fast as all at a time.

        A thread for each would take longer to get the interpreter's lock than to write.
        """
        self._in_flight += 1
        self._writes.append((done, data, offset))
        if not self._writing:
            self._writing = True
            eventloop.defer(asyncio.get_running_loop(), self._start_writes)

    def _start_writes(self) -> None:
        """Have a thread write what waits."""
        dones: list[Done] = []
        writes: list[tuple[memoryview, int]] = []
        total_bytes = 0
        while self._writes and total_bytes < WRITTEN_TOGETHER_MAX_BYTES:
            done, data, offset = self._writes.popleft()
            dones.append(done)
            writes.append((data, offset))
            total_bytes += len(data)
        errors: list[int] = []

        def finished(error: int) -> None:
            self._writing = bool(self._writes)
            if self._writing:
                self._start_writes()
            for index, done in enumerate(dones):
                self._finish(done, errors[index] if index < len(errors) else error)

        self._threads.submit(finished, self._file.write_each, writes, errors)

    def _write_aligned(
        self, writer: AsyncWriter, address: int, offset: int, data: memoryview, done: Done
    ) -> None:
        """Write without a thread, unless that turns out to have to wait for more than the device."""
        length = len(data)
        self._in_flight += 1

        def begin(token: int) -> None:
            def finished(error: int) -> None:
                self._gate.leave(token)
                self._finish(done, error)

            def completed(result: int) -> None:
                if result == length:
                    finished(0)
                    return
                if result == -errno.EOPNOTSUPP:
                    self._writer = None
                # Into a hole, refused, or in part: the threads find out why, and do it.
                self._threads.submit(finished, self._file.write, data, offset, False)

            write = Write(data, self._refusal, completed)
            if not writer.write(self._descriptor, address, self._origin + offset, write):
                self._threads.submit(finished, self._file.write, data, offset, False)

        self._gate.enter(offset, offset + length, begin)

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


def _blocks(offset: int, length: int) -> tuple[int, int]:
    """Return start and end of the whole blocks that hold the range."""
    return (
        offset // BLOCK_BYTES * BLOCK_BYTES,
        (offset + length + BLOCK_BYTES - 1) // BLOCK_BYTES * BLOCK_BYTES,
    )
