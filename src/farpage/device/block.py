"""`block:PATH`: one whole block device with one volume.

Several VIOS of one host may share it: they change its header under a lock (OFD locks of fcntl(2) on the
device's node), and an open volume holds another. Reads and writes go past the page cache, so VIOS of two
hosts that reach the same disk see each other's header too, but not each other's locks.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Final, TypeVar

from farpage.blockio import BlockIO, BlockLimits, ExtentsDone, Feature
from farpage.device.base import BLOCK_BYTES, Admit, admit_all, never
from farpage.device.directory import default_name
from farpage.device.engine import Engine
from farpage.device.errors import DeviceUnusable
from farpage.device.file import FEATURES, FileVolume
from farpage.device.layout import DATA_OFFSET_BYTES, HEADER_BYTES, DeviceLabel
from farpage.device.occupied import refuse_signed, refuse_used
from farpage.device.spans import SpanGate
from farpage.device.spec import BlockSpec
from farpage.device.volumefile import (
    FALLOC_PUNCH_HOLE,
    FALLOC_ZERO_RANGE,
    NOT_SUPPORTED,
    Access,
    VolumeFile,
    fallocate,
    read_fully,
    write_fully,
)
from farpage.device.whole import WholeDevice, prepare_label, unusable
from farpage.kernel import blockdevice
from farpage.kernel.memory import AlignedBuffer

LOCK_SECONDS: Final = 5.0
LOCK_RETRY_SECONDS: Final = 0.002
_HEADER_LOCK, _VOLUME_LOCK = 0, 1
"""Bytes of the device that stand for its locks."""

_ZERO_STEP_BYTES: Final = 1 << 30
_HINT: Final = "check the path, its permissions and the kernel's log"

Result = TypeVar("Result")


class BlockStorage:
    """`Storage` on a block device, with direct I/O."""

    def __init__(self, path: str) -> None:
        """Open the device.

        :raise OSError: it cannot be opened, or is no block device.
        """
        self.path = path
        self._buffers = threading.local()
        self.read_only = False
        try:
            self._descriptor = self.open(os.O_RDWR)
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM):
                raise
            self._descriptor = self.open(os.O_RDONLY)
            self.read_only = True
        try:
            if not blockdevice.is_block_device(self._descriptor):
                raise OSError(errno.ENOTBLK, "it is no block device", path)
            self.size_bytes = blockdevice.size_bytes(self._descriptor)
            self.block_bytes = blockdevice.logical_block_bytes(self._descriptor)
            self.read_only = self.read_only or blockdevice.is_read_only(self._descriptor)
            if self.block_bytes > BLOCK_BYTES:
                raise OSError(
                    errno.EINVAL, f"its blocks of {self.block_bytes} bytes are longer than a page", path
                )
        except OSError:
            self.close()
            raise

    def open(self, mode: int) -> int:
        """Open the device once more for direct I/O."""
        return os.open(self.path, mode | os.O_DIRECT | os.O_CLOEXEC)

    def read(self, offset: int, length: int) -> bytes:
        """Read past the page cache."""
        with self._buffer(length)[:length] as view:
            read_fully(self._descriptor, view, offset)
            return bytes(view)

    def write(self, offset: int, data: bytes) -> None:
        """Write and have the device flush its cache."""
        with self._buffer(len(data))[: len(data)] as view:
            view[:] = data
            write_fully(self._descriptor, view, offset)
        os.fdatasync(self._descriptor)

    def zero(self, offset: int, length: int) -> None:
        """Unmap the range if it reads as zeros then, else have the kernel zero it."""
        at, end = offset, offset + length
        while at < end:
            step = min(_ZERO_STEP_BYTES, end - at)
            zero_range(self._descriptor, at, step, punch=True)
            at += step
        os.fdatasync(self._descriptor)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the header's lock; other threads and processes wait."""
        if self.read_only:
            yield
            return
        descriptor = self.open(os.O_RDWR)
        try:
            deadline = time.monotonic() + LOCK_SECONDS
            while not blockdevice.try_lock(descriptor, _HEADER_LOCK, exclusive=True):
                if time.monotonic() > deadline:
                    raise OSError(
                        errno.ETIMEDOUT, "its lock is held by another process, which may hang", self.path
                    )
                time.sleep(LOCK_RETRY_SECONDS)
            yield
        finally:
            os.close(descriptor)

    def is_open(self) -> bool:
        """Tell whether a volume is open on it, through whichever VIOS of this host."""
        descriptor = self.open(os.O_RDWR)
        try:
            return not blockdevice.try_lock(descriptor, _VOLUME_LOCK, exclusive=True)
        finally:
            os.close(descriptor)

    def close(self) -> None:
        """Close the device."""
        os.close(self._descriptor)

    def _buffer(self, length: int) -> memoryview:
        """Return aligned memory of this thread."""
        held: AlignedBuffer | None = getattr(self._buffers, "held", None)
        if held is None or held.size_bytes < length:
            held = self._buffers.held = AlignedBuffer(max(length, HEADER_BYTES))
        return held.view


def zero_range(descriptor: int, offset: int, length: int, *, punch: bool, fast: bool = False) -> None:
    """Make a range of a block device read as zeros (fallocate(2), blkdev_fallocate in the kernel).

    A hole is unmapped by the device itself; without one the kernel writes zeros where the device has no
    command for it.

    :raise OSError: EOPNOTSUPP with `fast`, if the device does not do it by itself.
    """
    if punch:
        try:
            fallocate(descriptor, FALLOC_PUNCH_HOLE, offset, length)
            return
        except OSError as error:
            if error.errno not in NOT_SUPPORTED:
                raise
    if fast:
        raise OSError(errno.EOPNOTSUPP, "the device cannot zero quickly")
    fallocate(descriptor, FALLOC_ZERO_RANGE, offset, length)


class BlockFile(VolumeFile):
    """`VolumeFile` on a block device: other ways to zero and to discard; claims are read from the device."""

    quick_refusal = False

    def _is_whole(self) -> bool:
        return True

    def zero(self, offset: int, length: int, punch: bool, fast: bool, fua: bool) -> int:
        """Have the device zero the range."""
        if self._superseded() or self.over():
            return errno.ESHUTDOWN
        zero_range(self.descriptor, self.origin_bytes + offset, length, punch=punch, fast=fast)
        return self._sync() if fua else 0

    def trim(self, offset: int, length: int, fua: bool) -> int:
        """Have the device unmap or discard the range."""
        if self._superseded() or self.over():
            return errno.ESHUTDOWN
        try:
            # Rather than BLKDISCARD, after which the range may read as anything.
            fallocate(self.descriptor, FALLOC_PUNCH_HOLE, self.origin_bytes + offset, length)
        except OSError as error:
            if error.errno not in NOT_SUPPORTED:
                raise
            with contextlib.suppress(OSError):
                blockdevice.discard(self.descriptor, self.origin_bytes + offset, length)
        return self._sync() if fua else 0


class BlockVolume(FileVolume):
    """`FileVolume` on a block device, which has no extents."""

    def __init__(self, file: BlockFile, *, engine: Engine, gate: SpanGate) -> None:
        """Take the file over."""
        super().__init__(file, engine=engine, gate=gate)
        self.features &= ~Feature.EXTENTS
        self.limits = block_limits(blockdevice.logical_block_bytes(file.descriptor))

    def extents(self, offset: int, length: int, done: ExtentsDone) -> None:
        """Refuse: a block device does not tell."""
        self._check_range(offset, length)
        done(errno.ENOTSUP, None)


def block_limits(block_bytes: int) -> BlockLimits:
    """Return a volume's limits on a device with logical blocks of that size."""
    return BlockLimits(minimum=block_bytes, preferred=BLOCK_BYTES, maximum=32 << 20)


class BlockDevice(WholeDevice):
    """A labelled block device; `open_block_device` opens one."""

    kind = "block"
    access = str(Access.DIRECT)
    features = FEATURES & ~Feature.EXTENTS
    hint = _HINT

    def __init__(self, storage: BlockStorage, label: DeviceLabel, *, text: str) -> None:
        """Take over the storage, in the event loop that will use the volume."""
        super().__init__(storage, label, text=text)
        self.limits = block_limits(storage.block_bytes)
        self._block = storage
        self._engine = Engine(label.name, direct=True)

    def in_use(self) -> str:
        """Ask the lock of open volumes."""
        return ", maybe through another VIOS" if self._block.is_open() else ""

    async def run(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Run it in one of the device's threads."""
        return await self._engine.run(work, *arguments)

    async def open_volume(self, name: str, epoch: int | None, over: Callable[[], bool] = never) -> BlockIO:
        """Open the device once more, with a lock that keeps the volume from being deleted."""
        descriptor, size_bytes, volume_id, superseded = await self._engine.run(self._open, name, epoch)
        file = BlockFile(
            descriptor,
            size_bytes,
            access=Access.DIRECT,
            superseded=superseded,
            origin_bytes=DATA_OFFSET_BYTES,
            over=over,
        )
        return BlockVolume(file, engine=self._engine, gate=self._engine.gate(volume_id))

    async def close(self) -> None:
        """End the threads and close the device."""
        await self._engine.close()
        self._block.close()

    def _open(self, name: str, epoch: int | None) -> tuple[int, int, str, Callable[[], bool] | None]:
        with self._problems_named():
            descriptor = self._block.open(os.O_RDONLY if epoch is None else os.O_RDWR)
            try:
                if not blockdevice.try_lock(descriptor, _VOLUME_LOCK, exclusive=False):
                    raise OSError(errno.EBUSY, "its volume is just being deleted")
                entry, hold = self.hold(name, epoch)
            except BaseException:
                os.close(descriptor)
                raise
        if hold is None:
            return descriptor, entry.size_bytes, entry.id, None
        held = hold

        def superseded() -> bool:
            return held.is_superseded(self.headers.parse(self._block.read(0, HEADER_BYTES)))

        return descriptor, entry.size_bytes, entry.id, superseded


def open_block_device(
    spec: BlockSpec,
    *,
    text: str | None = None,
    name: str | None = None,
    size_bytes: int | None = None,
    force: bool = False,
    admit: Admit = admit_all,
) -> tuple[BlockStorage, DeviceLabel]:
    """Open a block device and label it if it has no label yet; `force` overrides the refusals. Blocks.

    :raise DeviceUnusable: it is not there, in use, holds something else, or is not as asked for.
    """
    text = text or str(spec)
    try:
        storage = BlockStorage(spec.path)
        try:
            if not force:
                # Under the lock, as two VIOS that look at the same moment would take each other for a user.
                with storage.locked():
                    refuse_used(text, spec.path)
            label = prepare_label(
                storage,
                text=text,
                default_name=default_name(spec.path),
                name=name,
                size_bytes=size_bytes,
                refuse_foreign=(lambda: None) if force else (lambda: refuse_signed(text, spec.path)),
                admit=admit,
            )
        except BaseException:
            storage.close()
            raise
    except DeviceUnusable:
        raise
    except (OSError, ValueError) as error:
        raise unusable(text, error, _HINT) from error
    return storage, label
