"""Small block devices for tests: in memory, and over a file."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, MutableSequence

from farpage.blockio import Allocation, BlockLimits, Done, Extent, ExtentsDone, Feature, ReadDone

ALL_FEATURES = (
    Feature.FLUSH
    | Feature.FUA
    | Feature.TRIM
    | Feature.ZERO
    | Feature.FAST_ZERO
    | Feature.CACHE
    | Feature.EXTENTS
    | Feature.MULTI_CONN
)
EXTENT_BYTES = 4096


class MemoryIO:
    """A volume in a bytearray.

    With `hold` set, commands wait in `held` until the test releases them; `errors` maps a command's name to
    the errno that it finishes with; `log` names what was carried out.
    """

    def __init__(
        self,
        size_bytes: int,
        *,
        features: Feature = ALL_FEATURES,
        limits: BlockLimits | None = None,
        read_only: bool = False,
        at_hand: bool = True,
    ) -> None:
        self.content = bytearray(size_bytes)
        self._features = features
        self._limits = limits or BlockLimits()
        self._read_only = read_only
        self.at_hand = at_hand
        self.hold = False
        self.held: list[Callable[[], None]] = []
        self.errors: dict[str, int] = {}
        self.log: MutableSequence[tuple[object, ...]] = []
        self.closed = False

    @property
    def size_bytes(self) -> int:
        return len(self.content)

    @property
    def read_only(self) -> bool:
        return self._read_only

    @property
    def limits(self) -> BlockLimits:
        return self._limits

    @property
    def features(self) -> Feature:
        return self._features

    def release(self, index: int = 0) -> None:
        """Carry out one held command."""
        self.held.pop(index)()

    def release_all(self) -> None:
        while self.held:
            self.release()

    def _run(self, step: Callable[[], None]) -> None:
        if self.hold:
            self.held.append(step)
        else:
            step()

    def read_now(self, offset: int, into: memoryview) -> bool:
        if not self.at_hand or self.hold or "read" in self.errors:
            return False
        into[:] = self.content[offset : offset + len(into)]
        return True

    def read(self, offset: int, length: int, done: ReadDone) -> None:
        def step() -> None:
            self.log.append(("read", offset, length))
            if error := self.errors.get("read", 0):
                done(error, None)
            else:
                done(0, memoryview(bytes(self.content[offset : offset + length])))

        self._run(step)

    def write(self, offset: int, data: memoryview, done: Done, *, fua: bool = False) -> None:
        def step() -> None:
            self.log.append(("write", offset, len(data), fua))
            error = self.errors.get("write", 0)
            if not error:
                self.content[offset : offset + len(data)] = data
            done(error)

        self._run(step)

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
        def step() -> None:
            self.log.append(("zero", offset, length, punch, fast, fua))
            error = self.errors.get("zero", 0)
            if not error:
                self.content[offset : offset + length] = bytes(length)
            done(error)

        self._run(step)

    def trim(self, offset: int, length: int, done: Done, *, fua: bool = False) -> None:
        def step() -> None:
            self.log.append(("trim", offset, length, fua))
            self.content[offset : offset + length] = bytes(length)
            done(self.errors.get("trim", 0))

        self._run(step)

    def cache(self, offset: int, length: int, done: Done) -> None:
        self.log.append(("cache", offset, length))
        done(self.errors.get("cache", 0))

    def flush(self, done: Done) -> None:
        def step() -> None:
            self.log.append(("flush",))
            done(self.errors.get("flush", 0))

        self._run(step)

    def extents(self, offset: int, length: int, done: ExtentsDone) -> None:
        def step() -> None:
            if error := self.errors.get("extents", 0):
                done(error, None)
                return
            found = []
            at = offset
            while at < offset + length:
                stop = min(at - at % EXTENT_BYTES + EXTENT_BYTES, offset + length)
                zero = self.content[at:stop] == bytes(stop - at)
                found.append(
                    Extent(stop - at, Allocation.HOLE | Allocation.ZERO if zero else Allocation.DATA)
                )
                at = stop
            done(0, found)

        self._run(step)

    async def close(self) -> None:
        self.closed = True


class FileIO(MemoryIO):
    """A volume over a file, read and written in place."""

    def __init__(self, path: os.PathLike[str], size_bytes: int, **options: bool) -> None:
        super().__init__(0, **options)  # type: ignore[arg-type]
        self._size = size_bytes
        self._file = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        os.truncate(self._file, size_bytes)

    @property
    def size_bytes(self) -> int:
        return self._size

    def read_now(self, offset: int, into: memoryview) -> bool:
        try:
            return os.preadv(self._file, [into], offset, os.RWF_NOWAIT) == len(into)
        except OSError:
            return False

    def read(self, offset: int, length: int, done: ReadDone) -> None:
        done(0, memoryview(os.pread(self._file, length, offset)))

    def write(self, offset: int, data: memoryview, done: Done, *, fua: bool = False) -> None:
        os.pwrite(self._file, data, offset)
        done(0)

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
        if fast:
            done(errno.ENOTSUP)
            return
        for at in range(offset, offset + length, 1 << 20):
            os.pwrite(self._file, bytes(min(1 << 20, offset + length - at)), at)
        done(0)

    def trim(self, offset: int, length: int, done: Done, *, fua: bool = False) -> None:
        done(0)

    def cache(self, offset: int, length: int, done: Done) -> None:
        done(0)

    def flush(self, done: Done) -> None:
        os.fdatasync(self._file)
        done(0)

    def extents(self, offset: int, length: int, done: ExtentsDone) -> None:
        """Report what lseek says (SEEK_DATA, SEEK_HOLE)."""
        found = []
        at, stop = offset, offset + length
        while at < stop:
            try:
                data = min(os.lseek(self._file, at, os.SEEK_DATA), stop)
            except OSError:
                data = stop
            if data > at:
                found.append(Extent(data - at, Allocation.HOLE | Allocation.ZERO))
            if data < stop:
                hole = min(os.lseek(self._file, data, os.SEEK_HOLE), stop)
                found.append(Extent(hole - data, Allocation.DATA))
                data = hole
            at = data
        done(0, found)

    async def close(self) -> None:
        os.close(self._file)
