"""The one interface that every layer over a volume's bytes offers.

Devices, NBD connections, paths and volumes are all a `BlockIO`: a stack of small
layers over "read, write, zero, trim, flush". The interface is made of callbacks
and not of coroutines because it is the hot path: a layer starts a command, and
`done` is called later (or at once, before the call returns) from the event loop.

Rules of the interface:

- Commands may finish in any order. There is no order between overlapping commands in
  flight: whoever needs one waits.
- `error` is 0 or an errno. `CONNECTION_LOST` says that the outcome is unknown: the command
  may or may not have been, or may yet be, carried out.
- A read's payload is valid only while `done` runs; a receiver that keeps it copies it.
- A write's data must stay unchanged until `done` is called.
- Commands never raise for what the other side does; they raise ValueError for a range outside
  the volume, which is a bug of the caller.
"""

from __future__ import annotations

import asyncio
import enum
import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

CONNECTION_LOST = errno.ENOTCONN
"""Not one of NBD's error values, so no server can send it."""

Done: TypeAlias = Callable[[int], None]
"""`done(error)`."""

ReadDone: TypeAlias = Callable[[int, "memoryview | None"], None]
"""`done(error, payload)`; the payload is None when error is not 0."""


class Allocation(enum.IntFlag):
    """State of a range, as NBD's `base:allocation` context has it."""

    DATA = 0
    HOLE = 1
    ZERO = 2


@dataclass(frozen=True)
class Extent:
    """`length` bytes in one allocation state."""

    length: int
    allocation: Allocation


ExtentsDone: TypeAlias = Callable[[int, "list[Extent] | None"], None]
"""`done(error, extents)`; the extents cover a prefix of the range asked for, at least one byte of it."""


@dataclass(frozen=True)
class BlockLimits:
    """Block size constraints in bytes: offsets and lengths are multiples of `minimum`, at most `maximum`."""

    minimum: int = 1
    preferred: int = 4096
    maximum: int = 32 << 20


class Feature(enum.Flag):
    """What a layer can do beyond reading and writing."""

    NONE = 0
    FLUSH = enum.auto()
    FUA = enum.auto()
    TRIM = enum.auto()
    ZERO = enum.auto()
    FAST_ZERO = enum.auto()
    CACHE = enum.auto()
    EXTENTS = enum.auto()
    MULTI_CONN = enum.auto()


@dataclass
class Lent:
    """A read-only descriptor of the storage that a volume is in, opened with O_DIRECT; its holder closes it.

    The volume begins at `origin_bytes` of it.
    """

    descriptor: int
    origin_bytes: int

    def take(self) -> int:
        """Return the descriptor, which is the caller's from now on."""
        descriptor, self.descriptor = self.descriptor, -1
        return descriptor

    def close(self) -> None:
        """Close it, unless it was taken."""
        if self.descriptor >= 0:
            os.close(self.take())


@dataclass
class SharedFile:
    """A descriptor of the file that a volume is in, for any thread to use; its holder closes it."""

    descriptor: int
    origin_bytes: int
    """Where the volume begins in the file."""
    direct: bool
    """Opened with O_DIRECT: then whole blocks are written. Else everything goes through the page cache."""
    refusal: Callable[[], int] | None
    """Asked before writes that came together: 0, or the errno that refuses them. None: read-only."""
    over: Callable[[], bool] | None
    """Asked right before each write: True refuses it. None: never. `refusal` asks it as well."""
    share: Callable[[Callable[[], None]], Callable[[], None] | None]
    """Asked, in the event loop, before anything is written with O_DIRECT: returns what is to be called when
    nothing is any more, or None when nothing may be now. What it is given is called to have that end soon."""

    def close(self) -> None:
        """Close it."""
        os.close(self.descriptor)


@runtime_checkable
class FileBacked(Protocol):
    """A `BlockIO` over a file."""

    def share_file(self) -> SharedFile | None:
        """Return another descriptor of the file; None where only the volume itself may use it."""


class DirectFile(Protocol):
    """The storage of a volume as this process reads it by itself, past the server that serves it."""

    @property
    def place(self) -> tuple[int, int] | None:
        """The descriptor and where in its file the volume begins, in bytes; None when there is none."""

    def read(self, offset: int, length: int, done: ReadDone) -> bool:
        """Read whole blocks; False when too much is in flight already, or it is closed.

        `done` is called from the event loop, also after `close`, and its payload is valid while it runs.
        """

    def push(self) -> None:
        """Start what was begun in this turn now."""

    def close(self) -> None:
        """Begin nothing any more; the storage is let go of when what is in flight has ended."""


class BlockIO(Protocol):
    """Random access to one volume's bytes."""

    @property
    def size_bytes(self) -> int:
        """Size of the volume."""

    @property
    def read_only(self) -> bool:
        """Whether writes are refused (EPERM)."""

    @property
    def limits(self) -> BlockLimits:
        """Block size constraints."""

    @property
    def features(self) -> Feature:
        """What else it can do; a command without its feature finishes with ENOTSUP."""

    def read_now(self, offset: int, into: memoryview) -> bool:
        """Fill `into` if that needs no waiting, else leave it undefined and return False."""

    def read(self, offset: int, length: int, done: ReadDone) -> None:
        """Read `length` bytes at `offset`."""

    def write(self, offset: int, data: memoryview, done: Done, *, fua: bool = False) -> None:
        """Write `data` at `offset`; with `fua` it is on stable storage when done."""

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
        """Make the range read as zeros.

        `punch` allows a hole; `fast` refuses (ENOTSUP) what would be no faster than a write.
        """

    def trim(self, offset: int, length: int, done: Done, *, fua: bool = False) -> None:
        """Say that the range's contents no longer matter."""

    def cache(self, offset: int, length: int, done: Done) -> None:
        """Ask for the range to be near for a coming read."""

    def flush(self, done: Done) -> None:
        """Put every command finished before on stable storage."""

    def extents(self, offset: int, length: int, done: ExtentsDone) -> None:
        """Report the allocation of the range."""

    async def close(self) -> None:
        """Wait for the commands in flight, then let go of the resources."""


class Joined:
    """Finishes one command when all its parts are finished, with the first error."""

    def __init__(self, done: Done, parts: int) -> None:
        self._done = done
        self._left = parts
        self._error = 0

    def part_done(self, error: int) -> None:
        """Take note of a part that is finished."""
        self._error = self._error or error
        self._left -= 1
        if not self._left:
            self._done(self._error)


Run: TypeAlias = tuple[int, memoryview]
"""Where to write, in bytes, and what."""


class _Writing(Protocol):
    def write(self, offset: int, data: memoryview, done: Done, /) -> None: ...


def write_each(io: _Writing, runs: Sequence[Run], done: Done) -> None:
    """Write several runs; `done` is called when all are finished, with the first error."""
    joined = Joined(done, len(runs))
    for offset, data in runs:
        io.write(offset, data, joined.part_done)


def write_runs(io: BlockIO, runs: Sequence[Run], done: Done) -> None:
    """Do what `write_each` does, with one call where there is one for that."""
    at_once: Callable[[Sequence[Run], Done], None] | None = getattr(io, "write_runs", None)
    if at_once is not None:
        at_once(runs, done)
    else:
        write_each(io, runs, done)


async def wait_done(start: Callable[[Done], None]) -> int:
    """Run one command from a coroutine and return its error: `await wait_done(volume.flush)`."""
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    def finished(error: int) -> None:
        if not future.done():
            future.set_result(error)

    start(finished)
    return await future


async def read_bytes(source: BlockIO, offset: int, length: int) -> bytes:
    """Read from a coroutine and return a copy.

    :raise OSError: with the command's errno.
    """
    future: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def finished(error: int, payload: memoryview | None) -> None:
        if future.done():
            return
        if error or payload is None:
            future.set_exception(OSError(error, errno.errorcode.get(error, "unknown error")))
        else:
            future.set_result(bytes(payload))

    source.read(offset, length, finished)
    return await future
