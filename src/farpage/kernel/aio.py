"""Kernel AIO: writes that the kernel carries out while the caller goes on, many started with one system call.

Not io_uring, for what it leaves behind. A process that is killed with writes in an io_uring is gone at once,
while its writes are still on their way to the device: they are waited for later, by a kernel thread
(io_uring/io_uring.c, io_ring_exit_work). For those of kernel AIO the exit of the process waits (fs/aio.c,
exit_aio), as it does for threads within write(2). So whoever learns that the process is gone knows that
nothing that it has written can arrive any more.

Structures and constants are those of `include/uapi/linux/aio_abi.h`; what they mean is described in
io_setup(2), io_submit(2) and io_getevents(2).
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from contextlib import suppress
from typing import Final

from farpage.errors import Unsupported
from farpage.kernel.libc import last_error, libc, syscall, syscall_numbers

_CMD_PWRITE: Final = 1
_FLAG_RESFD: Final = 1
_RWF_NOWAIT: Final = 8
_IOCB: Final = struct.Struct("=QIIHhIQQqQII")
"""`struct iocb`: data, key, rw_flags, opcode, reqprio, fildes, buf, nbytes, offset, reserved2, flags,
resfd."""
_EVENT: Final = struct.Struct("=QQqq")
"""`struct io_event`: data, obj, res, res2."""


_spare: Final[dict[int, list[int]]] = {}
"""Contexts that nobody uses, by their entries. The kernel ends one only after an RCU grace period, some 40 ms
(fs/aio.c, kill_ioctx), and whoever asks it to waits: so one that was made is used again."""

# Contexts belong to the address space that they were made in (fs/aio.c, exit_aio).
os.register_at_fork(after_in_child=_spare.clear)


class AsyncWrites:
    """A context of kernel AIO; for one thread.

    `fileno` is an eventfd that becomes readable when writes have finished.
    """

    def __init__(self, entries: int = 256, *, waits: bool = False) -> None:
        """Make the context; up to `entries` writes may be in flight.

        With `waits`, `submit` waits where a write cannot be begun otherwise, as into a hole of a file.

        :raise Unsupported: the kernel has no AIO, or no more of it (`fs.aio-max-nr`).
        """
        self._numbers: Final = syscall_numbers()
        self.entries: Final = entries
        """Most writes in flight."""
        self.in_flight = 0
        """Writes whose completion has not been taken yet, submitted or not."""
        self.queued: list[int] = []
        """Tokens of the writes that the next `submit` starts."""
        self._flags: Final = 0 if waits else _RWF_NOWAIT
        self._commands = (ctypes.c_char * (entries * _IOCB.size))()
        self._packed = memoryview(self._commands).cast("B")
        start = ctypes.addressof(self._commands)
        self._pointers = (ctypes.c_uint64 * entries)(*range(start, start + entries * _IOCB.size, _IOCB.size))
        self._finished = (ctypes.c_char * (entries * _EVENT.size))()
        self._now = (ctypes.c_long * 2)(0, 0)
        self._event = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        try:
            self._context: Final = self._take_context(entries)
        except OSError as error:
            os.close(self._event)
            raise Unsupported(
                "asynchronous writes",
                os.strerror(error.errno or errno.EIO),
                "raise 'sysctl fs.aio-max-nr'; without them, threads write",
            ) from error

    def _take_context(self, entries: int) -> int:
        try:
            return _spare[entries].pop()
        except (KeyError, IndexError):  # none is left
            context = ctypes.c_ulong(0)
            syscall(self._numbers.io_setup, entries, ctypes.addressof(context))
            return context.value

    @property
    def context(self) -> int:
        """Where the kernel has put the context: `struct aio_ring` (fs/aio.c)."""
        return self._context

    def fileno(self) -> int:
        """Return the eventfd."""
        return self._event

    def write(self, descriptor: int, address: int, length: int, offset: int, token: int) -> bool:
        """Queue a write of the memory at `address`, which must stay; False when too many are in flight.

        It starts with `submit`. `token` comes back with its completion: unless `submit` may wait, -EAGAIN for
        a write that cannot be carried out otherwise, and -EOPNOTSUPP where the file system cannot tell.
        """
        at = len(self.queued)
        if self.in_flight >= self.entries:
            return False
        _IOCB.pack_into(
            self._packed,
            at * _IOCB.size,
            *(token, 0, self._flags, _CMD_PWRITE, 0, descriptor, address, length, offset),
            *(0, _FLAG_RESFD, self._event),
        )
        self.queued.append(token)
        self.in_flight += 1
        return True

    def submit(self) -> list[tuple[int, int]]:
        """Start what was queued; returns what the kernel does not take, as `completions` does."""
        queued, at = self.queued, 0
        refused: list[tuple[int, int]] = []
        while at < len(queued):
            taken = libc.syscall(
                self._numbers.io_submit,
                ctypes.c_ulong(self._context),
                ctypes.c_long(len(queued) - at),
                ctypes.byref(self._pointers, at * 8),
            )
            if taken > 0:
                at += taken
                continue
            error = ctypes.get_errno()
            if error != errno.EINTR:
                refused.append((queued[at], -error))
                at += 1
        queued.clear()
        self.in_flight -= len(refused)
        return refused

    def drop(self) -> list[int]:
        """Take back what was queued since the last `submit`; returns its tokens."""
        dropped, self.queued = self.queued, []
        self.in_flight -= len(dropped)
        return dropped

    def completions(self) -> list[tuple[int, int]]:
        """Take what has finished, as `(token, result)`: the bytes written, or a negative errno."""
        with suppress(BlockingIOError):
            os.eventfd_read(self._event)
        return self._take(0)

    def _take(self, least: int) -> list[tuple[int, int]]:
        while True:
            count = libc.syscall(
                self._numbers.io_getevents,
                ctypes.c_ulong(self._context),
                ctypes.c_long(least),
                ctypes.c_long(self.entries),
                self._finished,
                None if least else self._now,
            )
            if count >= 0:
                break
            if ctypes.get_errno() != errno.EINTR:
                raise last_error()
        self.in_flight -= count
        return [
            (token, result)
            for token, _, result, _ in _EVENT.iter_unpack(memoryview(self._finished)[: count * _EVENT.size])
        ]

    def close(self) -> None:
        """Let go of the context.

        :raise ValueError: when writes are in flight.
        """
        if self.in_flight:
            raise ValueError(f"{self.in_flight} writes are in flight")
        _spare.setdefault(self.entries, []).append(self._context)
        os.close(self._event)
