"""`memory:SIZE`: volumes in the RAM of the VIOS, gone with it."""

from __future__ import annotations

import errno
import os
import threading
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

from farpage.blockio import (
    Allocation,
    BlockIO,
    BlockLimits,
    Done,
    Extent,
    ExtentsDone,
    Feature,
    ReadDone,
)
from farpage.device.base import (
    BLOCK_BYTES,
    EPOCH_MAX,
    PagingDevice,
    Usage,
    VolumeStat,
    check_new_volume,
    never,
)
from farpage.device.claim import Claim, Claims
from farpage.device.errors import CapacityExceeded, VolumeExists, VolumeInUse, VolumeMissing
from farpage.device.file import client_errno
from farpage.device.spec import MemorySpec
from farpage.kernel.memory import create_memfd, punch_hole, resident_bytes, resident_ranges

EXTENTS_MAX = 1024

Result = TypeVar("Result")


class _Stored:
    """One volume's contents: a memfd, so that what is discarded can be given back."""

    def __init__(self, name: str, size_bytes: int) -> None:
        self.name = name
        self.id = str(uuid.uuid4())
        self.size_bytes = size_bytes
        self.claims = Claims()
        self.opened = 0
        self.descriptor = create_memfd(f"farpage-{name}", size_bytes)

    def stat(self) -> VolumeStat:
        used_bytes = resident_bytes(self.descriptor)
        return VolumeStat(self.name, self.id, self.size_bytes, used_bytes, self.claims.current)

    def __del__(self) -> None:
        """Free the memory."""
        # The last of the device and the opened volumes lets it go.
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class MemoryDevice(PagingDevice):
    """Volumes in RAM. Its identity is new each time, because its contents are."""

    kind = "memory"
    access = "memory"
    features = (
        Feature.FLUSH
        | Feature.FUA
        | Feature.TRIM
        | Feature.ZERO
        | Feature.FAST_ZERO
        | Feature.CACHE
        | Feature.EXTENTS
        | Feature.MULTI_CONN
    )

    def __init__(self, spec: MemorySpec, *, name: str | None = None, text: str | None = None) -> None:
        """`text` is the specification as the user wrote it."""
        self.id = str(uuid.uuid4())
        self.name = name or "memory"
        self.spec = text or str(spec)
        self.size_bytes = spec.size_bytes
        self._stored: dict[str, _Stored] = {}
        self._lock = threading.Lock()

    def volumes(self) -> list[VolumeStat]:
        """List the volumes."""
        with self._lock:
            return [self._stored[name].stat() for name in sorted(self._stored)]

    def names(self) -> list[str]:
        """List the names of the volumes."""
        with self._lock:
            return sorted(self._stored)

    def volume(self, name: str) -> VolumeStat:
        """Look a volume up."""
        with self._lock:
            return self._find(name).stat()

    def usage(self) -> Usage:
        """Add the volumes up."""
        found = self.volumes()
        return Usage(sum(v.size_bytes for v in found), sum(v.used_bytes for v in found), len(found))

    def create_volume(self, name: str, size_bytes: int) -> VolumeStat:
        """Make a volume that occupies no memory yet."""
        check_new_volume(name, size_bytes)
        with self._lock:
            if name in self._stored:
                raise VolumeExists(name, self.name)
            free_bytes = self.size_bytes - sum(stored.size_bytes for stored in self._stored.values())
            if size_bytes > free_bytes:
                raise CapacityExceeded(self.name, self.size_bytes, free_bytes, name, size_bytes)
            self._stored[name] = _Stored(name, size_bytes)
            return self._stored[name].stat()

    def delete_volume(self, name: str, *, force: bool = False) -> None:
        """Forget a volume."""
        with self._lock:
            stored = self._find(name)
            if stored.opened and not force:
                raise VolumeInUse(name, self.name)
            stored.claims.add(Claim(EPOCH_MAX))
            del self._stored[name]

    def claim(self, name: str, claim: Claim) -> Claim:
        """Record the claim, as durably as the volume."""
        with self._lock:
            claims = self._find(name).claims
            claims.add(claim)
            return claims.current

    async def run(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Run it at once: nothing here waits."""
        return work(*arguments)

    async def open_volume(self, name: str, epoch: int | None, over: Callable[[], bool] = never) -> BlockIO:
        """Open a volume."""
        with self._lock:
            return MemoryVolume(self._find(name), self.features, epoch, over)

    async def close(self) -> None:
        """Forget the volumes."""
        with self._lock:
            self._stored.clear()

    def _find(self, name: str) -> _Stored:
        if name not in self._stored:
            raise VolumeMissing(name, f"device {self.name!r}")
        return self._stored[name]


class MemoryVolume:
    """`BlockIO` over RAM: every command is done when its call returns."""

    limits = BlockLimits(minimum=1, preferred=BLOCK_BYTES, maximum=32 << 20)

    def __init__(
        self, stored: _Stored, features: Feature, epoch: int | None, over: Callable[[], bool]
    ) -> None:
        stored.opened += 1
        self._stored: _Stored | None = stored
        self._descriptor = stored.descriptor
        self._epoch = epoch
        self._over = over
        self.size_bytes = stored.size_bytes
        self.read_only = epoch is None
        self.features = features

    def read_now(self, offset: int, into: memoryview) -> bool:
        """Fill `into`."""
        self._check_range(offset, len(into))
        # Not through a mapping: reading a hole there would allocate memory for it.
        return os.preadv(self._descriptor, [into], offset) == len(into)

    def read(self, offset: int, length: int, done: ReadDone) -> None:
        """Read."""
        self._check_range(offset, length)
        payload = memoryview(bytearray(length))
        if os.preadv(self._descriptor, [payload], offset) == length:
            done(0, payload)
        else:
            done(errno.EIO, None)

    def write(self, offset: int, data: memoryview, done: Done, *, fua: bool = False) -> None:
        """Write."""
        self._change(offset, len(data), done, lambda: os.pwrite(self._descriptor, data, offset) == len(data))

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
        """Give the memory back; RAM has no better way to keep zeros."""
        self._change(offset, length, done, lambda: self._punch(offset, length))

    def trim(self, offset: int, length: int, done: Done, *, fua: bool = False) -> None:
        """Give the memory back."""
        self._change(offset, length, done, lambda: self._punch(offset, length))

    def cache(self, offset: int, length: int, done: Done) -> None:
        """Do nothing: nothing is nearer than RAM."""
        self._check_range(offset, length)
        done(0)

    def flush(self, done: Done) -> None:
        """Do nothing: nothing is more stable here than RAM."""
        done(0)

    def extents(self, offset: int, length: int, done: ExtentsDone) -> None:
        """Report what holds memory."""
        self._check_range(offset, length)
        found: list[Extent] = []
        at = offset
        for start, size in resident_ranges(self._descriptor, offset, length):
            if len(found) >= EXTENTS_MAX:
                done(0, found)
                return
            if start > at:
                found.append(Extent(start - at, Allocation.HOLE | Allocation.ZERO))
            found.append(Extent(size, Allocation.DATA))
            at = start + size
        if at < offset + length:
            found.append(Extent(offset + length - at, Allocation.HOLE | Allocation.ZERO))
        done(0, found)

    async def close(self) -> None:
        """Let go of the contents."""
        if self._stored is not None:
            self._stored.opened -= 1
            self._stored = None

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size_bytes:
            raise ValueError(f"{length} bytes at {offset} are outside a volume of {self.size_bytes} bytes")
        if self._stored is None:
            raise ValueError("the volume is closed")

    def _punch(self, offset: int, length: int) -> bool:
        punch_hole(self._descriptor, offset, length)
        return True

    def _change(self, offset: int, length: int, done: Done, work: Callable[[], bool]) -> None:
        self._check_range(offset, length)
        if self._epoch is None:
            done(errno.EPERM)
            return
        if self._stored is None or self._stored.claims.current.epoch > self._epoch or self._over():
            done(errno.ESHUTDOWN)
            return
        try:
            error = 0 if length == 0 or work() else errno.EIO
        except OSError as problem:
            error = client_errno(problem.errno or errno.EIO)
        done(error)
