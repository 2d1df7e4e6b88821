"""io_uring: reads that the kernel carries out while the caller goes on, many started with one system call.

Structures and constants are those of `include/uapi/linux/io_uring.h`; what they mean is described in
io_uring(7), io_uring_setup(2) and io_uring_enter(2). The rings are shared memory: the kernel reads the
submission queue's tail only within io_uring_enter(2), and x86-64 keeps stores in order, so plain stores do.

What is registered with a ring (io_uring_register(2)) is looked up once, not for each read: files, and memory,
whose pages stay pinned. A ring goes on without where the kernel does not allow it.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct
from typing import Final, NamedTuple

from farpage.errors import Unsupported
from farpage.kernel.libc import last_error, syscall, syscall_numbers

_OP_READ_FIXED, _OP_ASYNC_CANCEL, _OP_READ = 4, 14, 22
_FIXED_FILE = 1 << 0
_REGISTER_BUFFERS, _REGISTER_FILES, _REGISTER_FILES_UPDATE = 0, 2, 6
_CANCEL_ALL, _CANCEL_ANY = 1 << 0, 1 << 2
_OFF_SQ_RING, _OFF_SQES = 0, 0x10000000
_SETUP_CQSIZE, _SETUP_CLAMP = 1 << 3, 1 << 4
_SETUP_COOP_TASKRUN = 1 << 8
"""Linux 5.19: the thread is not interrupted for each completion, which its next system call finds."""
_FEAT_SINGLE_MMAP, _FEAT_NODROP = 1 << 0, 1 << 1
_ENTER_GETEVENTS = 1 << 0

_PARAMETERS: Final = struct.Struct("=7I3I10I10I")
"""`struct io_uring_params`: seven words, three reserved ones, `io_sqring_offsets`, `io_cqring_offsets`."""
_SQE: Final = struct.Struct("=BBHiQQIIQHHiQQ")
"""`struct io_uring_sqe`: opcode, flags, ioprio, fd, off, addr, len, rw_flags, user_data, ..."""
_BEGIN: Final = struct.Struct("=BBHiQQIIQH")
"""The part of it that reads need, with buf_index at its end; the rest stays zero."""
_FILES_UPDATE: Final = struct.Struct("=IIQ")
"""`struct io_uring_files_update`: offset, a reserved word, the address of descriptors."""
_CQE: Final = struct.Struct("=QiI")
"""`struct io_uring_cqe`: user_data, res, flags."""

_enter = ctypes.CDLL(None, use_errno=True).syscall
"""syscall(2) with its types known beforehand, which makes a call cheaper."""
_enter.argtypes = [ctypes.c_long] * 7
_enter.restype = ctypes.c_long

FILES: Final = 64
"""Files that may be registered with a ring at a time."""

_CANCEL_TOKEN: Final = (1 << 64) - 1
_REQUIRED: Final = _FEAT_SINGLE_MMAP | _FEAT_NODROP
"""Linux 5.5: rings in one mapping, and completions that are kept when the queue is full."""


class RingLayout(NamedTuple):
    """Where the parts of a ring are, for code that fills and empties it by itself; offsets in bytes."""

    queues: mmap.mmap
    commands: mmap.mmap
    sq_tail: int
    sq_mask: int
    cq_head: int
    cq_tail: int
    cq_mask: int
    cqes: int


class Ring:
    """A submission and a completion queue; for the thread that makes it."""

    def __init__(self, entries: int = 256) -> None:
        """Make the queues; up to `entries` commands may be in flight.

        :raise Unsupported: when the kernel has no io_uring, or does not allow it (`kernel.io_uring_disabled`,
            seccomp).
        """
        self._enter_number: Final = syscall_numbers().io_uring_enter
        try:
            self._descriptor, parameters = _set_up(entries)
        except OSError as error:
            raise _unsupported(error) from error
        try:
            self._map(parameters)
        except OSError as error:
            os.close(self._descriptor)
            raise _unsupported(error) from error
        except BaseException:
            os.close(self._descriptor)
            raise

    def _map(self, parameters: bytearray) -> None:
        fields = _PARAMETERS.unpack(parameters)
        sq_entries, cq_entries, features = fields[0], fields[1], fields[5]
        if features & _REQUIRED != _REQUIRED:
            raise OSError(errno.ENOSYS, "io_uring of this kernel is too old")
        sq, cq = fields[10:20], fields[20:30]
        ring_bytes = max(sq[6] + sq_entries * 4, cq[5] + cq_entries * _CQE.size)
        flags, access = mmap.MAP_SHARED | mmap.MAP_POPULATE, mmap.PROT_READ | mmap.PROT_WRITE
        self._ring = mmap.mmap(self._descriptor, ring_bytes, flags, access, offset=_OFF_SQ_RING)
        self._sqes = mmap.mmap(self._descriptor, sq_entries * _SQE.size, flags, access, offset=_OFF_SQES)
        self._words = memoryview(self._ring)[: ring_bytes // 4 * 4].cast("I")
        self._sq_tail = sq[1] // 4
        self._cq_head, self._cq_tail = cq[0] // 4, cq[1] // 4
        self._sq_mask, self._cq_mask = sq_entries - 1, cq_entries - 1
        self._cqes_offset = cq[5]
        self.entries = sq_entries
        """Most commands in flight."""
        # Entry i of the submission queue is always element i of the array of commands.
        self._words[sq[6] // 4 : sq[6] // 4 + sq_entries] = memoryview(
            struct.pack(f"={sq_entries}I", *range(sq_entries))
        ).cast("I")
        self._tail = self._words[self._sq_tail]
        self.unsubmitted = 0
        """Commands that the next `submit` starts."""
        self.in_flight = 0
        """Commands whose completion has not been taken yet, submitted or not."""
        self._free_files: list[int] | None = None

    def fileno(self) -> int:
        """Return the ring's descriptor, which is readable while there are completions to take."""
        return self._descriptor

    def layout(self) -> RingLayout:
        """Return where its parts are. Whoever goes by it uses no method but `fileno` and `close` any more."""
        return RingLayout(
            self._ring,
            self._sqes,
            self._sq_tail * 4,
            self._sq_mask,
            self._cq_head * 4,
            self._cq_tail * 4,
            self._cq_mask,
            self._cqes_offset,
        )

    def register_memory(self, *areas: tuple[int, int]) -> bool:
        """Pin memory, each part an address and a length in bytes, which has to stay until the ring is closed.

        May be called once. False where the kernel does not allow so much (RLIMIT_MEMLOCK).
        """
        vectors = bytearray(b"".join(struct.pack("=QQ", *area) for area in areas))
        return self._register(_REGISTER_BUFFERS, vectors, len(areas))

    def register_file(self, descriptor: int) -> int | None:
        """Keep an open file at hand, also when the descriptor is closed, until `unregister_file`.

        Returns its place among the ring's files; None where there is none left, or the kernel has none.
        """
        if self._free_files is None:
            none = bytearray(struct.pack(f"={FILES}i", *[-1] * FILES))
            able = self._register(_REGISTER_FILES, none, FILES)
            self._free_files = list(range(FILES)) if able else []
        if not self._free_files or not self._put_file(self._free_files[-1], descriptor):
            return None
        return self._free_files.pop()

    def unregister_file(self, place: int) -> None:
        """Let go of a file; what was submitted goes on, and nothing that names the place may be queued."""
        assert self._free_files is not None
        if self._put_file(place, -1):
            self._free_files.append(place)

    def _put_file(self, place: int, descriptor: int) -> bool:
        word = bytearray(struct.pack("=i", descriptor))
        update = bytearray(_FILES_UPDATE.pack(place, 0, _address(word)))
        return self._register(_REGISTER_FILES_UPDATE, update, 1)

    def _register(self, what: int, argument: bytearray, count: int) -> bool:
        try:
            syscall(syscall_numbers().io_uring_register, self._descriptor, what, _address(argument), count)
        except OSError:
            return False
        return True

    def read(
        self,
        descriptor: int,
        address: int,
        length: int,
        offset: int,
        token: int,
        *,
        registered_file: bool = False,
        area: int | None = None,
    ) -> bool:
        """Queue a read into the memory at `address`, which must stay; False when too many are in flight.

        `descriptor` is the place of a `registered_file`, and the memory in `area` where that is registered.
        It starts with `submit`. `token` comes back with its completion.
        """
        if self.in_flight >= self.entries:
            return False
        tail = self._tail
        at = (tail & self._sq_mask) * 64
        operation = _OP_READ if area is None else _OP_READ_FIXED
        flags = _FIXED_FILE if registered_file else 0
        _BEGIN.pack_into(
            self._sqes, at, operation, flags, 0, descriptor, offset, address, length, 0, token, area or 0
        )
        self._tail = self._words[self._sq_tail] = (tail + 1) & 0xFFFFFFFF
        self.unsubmitted += 1
        self.in_flight += 1
        return True

    def _queue(self, command: bytes) -> None:
        tail = self._tail
        at = (tail & self._sq_mask) * _SQE.size
        self._sqes[at : at + _SQE.size] = command
        self._tail = tail = (tail + 1) & 0xFFFFFFFF
        self._words[self._sq_tail] = tail
        self.unsubmitted += 1

    def submit(self) -> None:
        """Start what was queued.

        :raise OSError: EAGAIN or ENOMEM, when the kernel has no memory for it; it stays queued.
        """
        while self.unsubmitted:
            try:
                self.unsubmitted -= self._enter(self.unsubmitted, 0, 0)
            except InterruptedError:
                continue

    def drop(self) -> list[int]:
        """Take back what was queued and not submitted; returns its tokens."""
        dropped: list[int] = []
        for _ in range(self.unsubmitted):
            self._tail = self._words[self._sq_tail] = (self._tail - 1) & 0xFFFFFFFF
            dropped.append(_BEGIN.unpack_from(self._sqes, (self._tail & self._sq_mask) * _SQE.size)[8])
        self.unsubmitted = 0
        self.in_flight -= len(dropped)
        return dropped

    def _enter(self, submit: int, wait_for: int, flags: int) -> int:
        result: int = _enter(self._enter_number, self._descriptor, submit, wait_for, flags, 0, 0)
        if result < 0:
            raise last_error()
        return result

    def completions(self) -> list[tuple[int, int]]:
        """Take what has finished, as `(token, result)`: the bytes read, or a negative errno."""
        finished: list[tuple[int, int]] = []
        words, mask, base = self._words, self._cq_mask, self._cqes_offset
        head = words[self._cq_head]
        while head != words[self._cq_tail]:
            token, result, _ = _CQE.unpack_from(self._ring, base + (head & mask) * _CQE.size)
            head = (head + 1) & 0xFFFFFFFF
            if token != _CANCEL_TOKEN:
                finished.append((token, result))
        words[self._cq_head] = head
        self.in_flight -= len(finished)
        return finished

    def cancel_all(self) -> None:
        """Ask the kernel to give up what is in flight; what cannot be given up still completes."""
        self.submit()
        if self.in_flight:
            flags = _CANCEL_ALL | _CANCEL_ANY
            self._queue(_SQE.pack(_OP_ASYNC_CANCEL, 0, 0, -1, 0, 0, 0, flags, _CANCEL_TOKEN, 0, 0, 0, 0, 0))
            self.submit()

    def wait(self) -> None:
        """Block until a completion is there; for the end of a process, where no event loop waits any more."""
        while self.in_flight and self._words[self._cq_head] == self._words[self._cq_tail]:
            try:
                self._enter(0, 1, _ENTER_GETEVENTS)
            except InterruptedError:
                continue

    def close(self) -> None:
        """Free the queues; memory of reads in flight must stay until they have completed.

        :raise ValueError: when commands are in flight.
        """
        if self.in_flight:
            raise ValueError(f"{self.in_flight} commands are in flight")
        self._words.release()
        self._ring.close()
        self._sqes.close()
        os.close(self._descriptor)
        self._descriptor = -1


def _set_up(entries: int) -> tuple[int, bytearray]:
    """Make the queues in the best way that the kernel knows; returns their descriptor and parameters."""
    number = syscall_numbers().io_uring_setup
    flags = _SETUP_CQSIZE | _SETUP_CLAMP | _SETUP_COOP_TASKRUN
    while True:
        parameters = bytearray(_PARAMETERS.size)
        _PARAMETERS.pack_into(parameters, 0, 0, entries * 2, flags, *([0] * (7 - 3 + 3 + 10 + 10)))
        try:
            return syscall(number, entries, _address(parameters)), parameters
        except OSError as error:
            if error.errno != errno.EINVAL or not flags & _SETUP_COOP_TASKRUN:
                raise
            flags &= ~_SETUP_COOP_TASKRUN


def _address(buffer: bytearray) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


def _unsupported(error: OSError) -> Unsupported:
    return Unsupported(
        "io_uring",
        os.strerror(error.errno or errno.EIO),
        "allow it with 'sysctl kernel.io_uring_disabled=0'; without it, threads read",
    )
