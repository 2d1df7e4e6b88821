"""userfaultfd: page faults of a range of memory, handled by a program.

Constants and structures are those of `include/uapi/linux/userfaultfd.h`; what they mean is described in
the kernel's `Documentation/admin-guide/mm/userfaultfd.rst` and in ioctl_userfaultfd(2).

`fcntl.ioctl` on a bytearray is used for all calls: with packing it costs about 0.8 us over an empty
system call, half of what ctypes does.
"""

from __future__ import annotations

import enum
import errno
import fcntl
import os
import select
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final

from farpage.errors import Unsupported
from farpage.kernel.libc import syscall, syscall_numbers

UFFD_API: Final = 0xAA
"""The only version of the interface that exists."""

CREATE_FLAGS: Final = os.O_CLOEXEC | os.O_NONBLOCK
"""How farpage makes descriptors: non-blocking, which poll needs (fs/userfaultfd.c, userfaultfd_poll)."""

_FEATURES_INITIALIZED: Final = 1 << 31
"""Set by the kernel in a context's features once UFFDIO_API succeeded (fs/userfaultfd.c)."""


class Feature(enum.IntFlag):
    """UFFD_FEATURE_*: what UFFDIO_API can be asked for.

    EVENT_FORK is missing on purpose: it makes every fork of the client wait for its pager.
    """

    PAGEFAULT_FLAG_WP = 1 << 0
    EVENT_REMAP = 1 << 2
    EVENT_REMOVE = 1 << 3
    MISSING_HUGETLBFS = 1 << 4
    MISSING_SHMEM = 1 << 5
    EVENT_UNMAP = 1 << 6
    SIGBUS = 1 << 7
    THREAD_ID = 1 << 8
    MINOR_HUGETLBFS = 1 << 9
    MINOR_SHMEM = 1 << 10
    EXACT_ADDRESS = 1 << 11
    WP_HUGETLBFS_SHMEM = 1 << 12
    WP_UNPOPULATED = 1 << 13
    POISON = 1 << 14
    WP_ASYNC = 1 << 15
    MOVE = 1 << 16


REQUIRED_FEATURES: Final = (
    Feature.PAGEFAULT_FLAG_WP | Feature.MISSING_SHMEM | Feature.MINOR_SHMEM | Feature.WP_HUGETLBFS_SHMEM
)
"""Without these shared memory cannot be paged: missing pages, write protection, pages without a mapping."""

OPTIONAL_FEATURES: Final = Feature.POISON
"""Linux 6.6; without it a lost page can only wait."""


class Mode(enum.IntFlag):
    """UFFDIO_REGISTER_MODE_*: which faults a range reports."""

    MISSING = 1 << 0
    WP = 1 << 1
    MINOR = 1 << 2


class Event(enum.IntEnum):
    """UFFD_EVENT_*: values of the `event` field."""

    PAGEFAULT = 0x12
    FORK = 0x13
    REMAP = 0x14
    REMOVE = 0x15
    UNMAP = 0x16


FLAG_WRITE: Final = 1 << 0
"""The access was a write."""
FLAG_WP: Final = 1 << 1
"""The access was a write to a present, write-protected page."""
FLAG_MINOR: Final = 1 << 2
"""The page is in the page cache but not in the client's page table."""

EVENT_BYTES: Final = 32
EVENTS_MAX: Final = 64
"""Events that are read at a time."""


_EVENT: Final = struct.Struct("=B7xQQ8x")
"""The part of `struct uffd_msg` that is used: `event`, and the first two words of its argument."""
_unpack_event = _EVENT.unpack_from


def _ioc(number: int, size: int, direction: int) -> int:
    return direction << 30 | size << 16 | UFFD_API << 8 | number


_READ, _READ_WRITE = 2, 3
_UFFDIO_REGISTER = _ioc(0x00, 32, _READ_WRITE)
_UFFDIO_UNREGISTER = _ioc(0x01, 16, _READ)
_UFFDIO_WAKE = _ioc(0x02, 16, _READ)
_UFFDIO_COPY = _ioc(0x03, 40, _READ_WRITE)
_UFFDIO_ZEROPAGE = _ioc(0x04, 32, _READ_WRITE)
_UFFDIO_WRITEPROTECT = _ioc(0x06, 24, _READ_WRITE)
_UFFDIO_CONTINUE = _ioc(0x07, 32, _READ_WRITE)
_UFFDIO_POISON = _ioc(0x08, 32, _READ_WRITE)
_UFFDIO_API = _ioc(0x3F, 24, _READ_WRITE)
_USERFAULTFD_IOC_NEW = _ioc(0x00, 0, 0)

_COPY_DONTWAKE, _COPY_WP = 1 << 0, 1 << 1
_DONTWAKE = 1 << 0
_WRITEPROTECT_WP, _WRITEPROTECT_DONTWAKE = 1 << 0, 1 << 1
_CONTINUE_WP = 1 << 1

_RANGE = struct.Struct("=QQ")
_TRIPLE = struct.Struct("=QQQ")
_RANGE_MODE_RESULT = struct.Struct("=QQQq")
_COPY = struct.Struct("=QQQQq")
_pack_range = _RANGE.pack_into
_pack_triple = _TRIPLE.pack_into
_pack_range_mode_result = _RANGE_MODE_RESULT.pack_into
_pack_copy = _COPY.pack_into
_signed_at = struct.Struct("=q").unpack_from
_ioctl = fcntl.ioctl


@dataclass(frozen=True)
class UserfaultfdState:
    """What /proc/PID/fdinfo tells about a descriptor."""

    pending_faults: int
    """Faults that no read has returned yet."""
    total_faults: int
    """Accesses that wait, read or not."""
    initialized: bool
    """Whether UFFDIO_API has succeeded."""
    features: Feature
    """What it was granted."""


class Userfaultfd:
    """One userfaultfd descriptor, which this object owns.

    For one thread at a time: the argument buffers are reused. `copy`, `zeropage`, `write_protect`,
    `continue_`, `wake` and `poison` take byte addresses of the client and lengths in bytes, both multiples
    of the page size, and never raise for what the kernel answers: they return a negative errno.
    The usual ones are EEXIST (a page is there already; nobody was woken), EAGAIN (the client's
    mappings are changing), ENOENT (the range is not registered, or no longer mapped), ESRCH (the client
    is gone), EFAULT.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._range = bytearray(16)
        self._triple = bytearray(24)
        self._range_mode_result = bytearray(32)
        self._copy = bytearray(40)
        self._events = memoryview(bytearray(EVENT_BYTES * EVENTS_MAX))
        self._event_vector = [self._events]

    @classmethod
    def create(cls, *, nonblocking: bool = True) -> Userfaultfd:
        """Make a descriptor for this process's own memory, kernel-mode faults included.

        :raise Unsupported: naming the setting that allows it.
        """
        flags = os.O_CLOEXEC | (os.O_NONBLOCK if nonblocking else 0)
        return cls(_create_descriptor(flags))

    @property
    def state(self) -> UserfaultfdState:
        """What the kernel knows of this descriptor; works for one that another process set up."""
        return read_state(Path("/proc/self/fdinfo") / str(self._descriptor))

    def fileno(self) -> int:
        """Return the descriptor's number."""
        return self._descriptor

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._descriptor < 0

    def close(self) -> None:
        """Close the descriptor; further calls do nothing.

        When it is the last reference, waiting and future accesses read zeros where pages are missing.
        """
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> Userfaultfd:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def handshake(
        self, required: Feature = REQUIRED_FEATURES, optional: Feature = OPTIONAL_FEATURES
    ) -> Feature:
        """Agree on features (UFFDIO_API), which a descriptor allows once, and return what was granted.

        On a descriptor that had its handshake, return what that granted.

        :raise Unsupported: when the kernel lacks one of `required`.
        """
        state = self.state
        if state.initialized:
            missing = required & ~state.features
            if missing:
                raise _lacks(missing, "it was set up without them", "start the client anew")
            return state.features
        # Old kernels refuse a request with an unknown feature, which changes nothing; new ones ignore
        # the unknown. So ask for less and less, and look at what was granted.
        wanted = required | optional
        for dropped in (Feature(0), *sorted(optional, reverse=True)):
            wanted &= ~dropped
            if self._ask(wanted):
                break
        # In integers, since the complement of a flag knows named bits alone.
        missing = Feature(int(required) & ~int(self.state.features))
        if missing:
            raise _lacks(missing, "this kernel does not offer them", "use Linux 6.1 or newer")
        return self.state.features

    def _ask(self, features: Feature) -> bool:
        _pack_triple(self._triple, 0, UFFD_API, features, 0)
        try:
            _ioctl(self._descriptor, _UFFDIO_API, self._triple)
        except OSError as error:
            if error.errno == errno.EINVAL:
                return False
            raise
        return True

    def register(self, start: int, length: int, mode: Mode) -> int:
        """Report the faults of a mapped range; returns the bit set of ioctls that it allows.

        :raise OSError: EBUSY when another userfaultfd has it, EINVAL when it is not mapped or not of a
            kind that supports `mode`, EPERM for a mapping of a file that cannot be written, ENOMEM when the
            client is gone.
        """
        argument = bytearray(_RANGE_MODE_RESULT.pack(start, length, mode, 0))
        _ioctl(self._descriptor, _UFFDIO_REGISTER, argument)
        return int.from_bytes(argument[24:32], "little")

    def unregister(self, start: int, length: int) -> None:
        """Stop reporting a range and wake who waits in it: missing pages read zeros from now on.

        :raise OSError: EINVAL when the range is not mapped, ENOMEM when the client is gone.
        """
        _ioctl(self._descriptor, _UFFDIO_UNREGISTER, _RANGE.pack(start, length))

    def copy(
        self, dst: int, src_address: int, length: int, *, write_protect: bool = False, wake: bool = True
    ) -> int:
        """Fill missing pages from memory of this process, then map them, optionally write-protected.

        Returns the bytes done, which may be fewer than `length` when a page in the middle is
        present or the client's mappings change (the waiters of those done are awake), else a negative errno.
        """
        mode = 0 if wake else _COPY_DONTWAKE
        if write_protect:
            mode |= _COPY_WP
        argument = self._copy
        _pack_copy(argument, 0, dst, src_address, length, mode, 0)
        try:
            _ioctl(self._descriptor, _UFFDIO_COPY, argument)
        except OSError as error:
            return self._partly(argument, 32, error)
        return length

    def zeropage(self, start: int, length: int, *, wake: bool = True) -> int:
        """Fill missing pages with zeros; results as with `copy`. A shared page is allocated, not shared."""
        return self._ranged(_UFFDIO_ZEROPAGE, start, length, 0 if wake else _DONTWAKE)

    def continue_(self, start: int, length: int, *, write_protect: bool = False, wake: bool = True) -> int:
        """Map pages that are in the page cache; results as with `copy`, EFAULT where one is not."""
        mode = 0 if wake else _DONTWAKE
        if write_protect:
            mode |= _CONTINUE_WP
        return self._ranged(_UFFDIO_CONTINUE, start, length, mode)

    def poison(self, start: int, length: int, *, wake: bool = True) -> int:
        """Make accesses to missing pages fail: SIGBUS, in a guest a machine check.

        Results as with `copy`.
        """
        return self._ranged(_UFFDIO_POISON, start, length, 0 if wake else _DONTWAKE)

    def _ranged(self, request: int, start: int, length: int, mode: int) -> int:
        argument = self._range_mode_result
        _pack_range_mode_result(argument, 0, start, length, mode, 0)
        try:
            _ioctl(self._descriptor, request, argument)
        except OSError as error:
            return self._partly(argument, 24, error)
        return length

    @staticmethod
    def _partly(argument: bytearray, offset: int, error: OSError) -> int:
        """Return the bytes done when an ioctl stopped in the middle (with EAGAIN), else -errno."""
        done: int = _signed_at(argument, offset)[0]
        if done > 0:
            return done
        return -error.errno if error.errno else -errno.EIO

    def write_protect(self, start: int, length: int, protect: bool, *, wake: bool = True) -> int:
        """Protect pages, or unprotect them and wake their writers; returns 0 or a negative errno.

        Missing pages in the range are left as they are. `wake` counts for unprotecting alone.
        """
        mode = _WRITEPROTECT_WP if protect else 0 if wake else _WRITEPROTECT_DONTWAKE
        _pack_triple(self._triple, 0, start, length, mode)
        try:
            _ioctl(self._descriptor, _UFFDIO_WRITEPROTECT, self._triple)
        except OSError as error:
            return -(error.errno or errno.EIO)
        return 0

    def wake(self, start: int, length: int) -> int:
        """Let the accesses that wait in a range try again; returns 0 or a negative errno."""
        _pack_range(self._range, 0, start, length)
        try:
            _ioctl(self._descriptor, _UFFDIO_WAKE, self._range)
        except OSError as error:
            return -(error.errno or errno.EIO)
        return 0

    def read_events(self) -> list[tuple[int, int, int]]:
        """Read up to `EVENTS_MAX` events with one system call, without waiting.

        Each is `(event, flags, address)` for a page fault, with the address in the client's memory, in bytes;
        for REMOVE and UNMAP it is `(event, start, end)`. No other events come unless they were asked for.

        :raise OSError: when the descriptor is not one that was set up.
        """
        try:
            count = os.readv(self._descriptor, self._event_vector)
        except BlockingIOError:
            return []
        if count == EVENT_BYTES:
            return [_unpack_event(self._events)]
        return list(_EVENT.iter_unpack(self._events[:count]))


def _lacks(features: Feature, cause: str, hint: str) -> Unsupported:
    named = [feature for feature in Feature if feature in features]
    unnamed = int(features) & ~sum(named)
    names = [str(feature.name) for feature in named] + ([hex(unnamed)] if unnamed else [])
    return Unsupported(f"userfaultfd with {', '.join(names)}", cause, hint)


def _create_descriptor(flags: int) -> int:
    try:
        return syscall(syscall_numbers().userfaultfd, flags)
    except OSError as error:
        refusal = error
    try:
        device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
        try:
            return fcntl.ioctl(device, _USERFAULTFD_IOC_NEW, flags)
        finally:
            os.close(device)
    except OSError:
        pass
    if refusal.errno == errno.ENOSYS:
        hint = "use a kernel built with CONFIG_USERFAULTFD, and allow userfaultfd(2) in the seccomp profile"
    elif refusal.errno == errno.EPERM:
        hint = (
            "run with CAP_SYS_PTRACE, give this user access to /dev/userfaultfd, "
            "or set 'sysctl vm.unprivileged_userfaultfd=1'"
        )
    else:
        hint = "check the limits on open files and memory"
    raise Unsupported("userfaultfd", os.strerror(refusal.errno or errno.EIO), hint)


def read_state(fdinfo: Path) -> UserfaultfdState:
    """Parse the fdinfo of a userfaultfd (fs/userfaultfd.c, userfaultfd_show_fdinfo).

    :raise OSError: when there is none.
    :raise ValueError: when the descriptor is something else.
    """
    fields = dict(line.split(":", 1) for line in fdinfo.read_text().splitlines())
    if "API" not in fields:
        raise ValueError(f"{fdinfo} is not that of a userfaultfd")
    features = int(fields["API"].split(":")[1], 16)
    return UserfaultfdState(
        pending_faults=int(fields["pending"]),
        total_faults=int(fields["total"]),
        initialized=bool(features & _FEATURES_INITIALIZED),
        features=Feature(features & ~_FEATURES_INITIALIZED),
    )


def wait_readable(userfaultfd: Userfaultfd, timeout_seconds: float) -> bool:
    """Wait for events from a plain thread; event loops watch `fileno()` instead."""
    poll = select.poll()
    poll.register(userfaultfd.fileno(), select.POLLIN)
    return bool(poll.poll(timeout_seconds * 1000))
