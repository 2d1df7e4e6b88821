"""`nbd://` and `nbd+unix://`: an export of any NBD server as a device with one volume.

NBD has no compare-and-swap and no locks, so VIOS that share an export can only write to different places of
its header and look what is there afterwards; docs/devices.md says what that means for fencing.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import threading
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from typing import Any, Final, TypeVar

from farpage.blockio import (
    Allocation,
    BlockIO,
    BlockLimits,
    Done,
    Extent,
    ExtentsDone,
    Feature,
    ReadDone,
    read_bytes,
    wait_done,
)
from farpage.device.base import BLOCK_BYTES, Usage, never
from farpage.device.directory import default_name
from farpage.device.errors import DeviceUnusable
from farpage.device.file import client_errno
from farpage.device.layout import DATA_OFFSET_BYTES, HEADER_BYTES, DeviceLabel, Header, parse_header
from farpage.device.occupied import refuse_signed
from farpage.device.reconnect import Reconnecting, open_connection
from farpage.device.spans import SpanGate
from farpage.device.spec import RemoteSpec
from farpage.device.threads import IoThreads
from farpage.device.whole import HeaderReader, Hold, WholeDevice, prepare_label, unusable
from farpage.errors import FarpageError
from farpage.kernel.memory import create_memfd
from farpage.nbd.client import Connection

ANSWER_SECONDS: Final = 10.0
"""So long one command for the header may take."""
ZERO_SECONDS: Final = 60.0
"""So long zeroing `_ZERO_STEP_BYTES` may take."""
_ZERO_STEP_BYTES: Final = 256 << 20
_ZEROS: Final = memoryview(bytes(4 << 20))
_MAXIMUM_BYTES: Final = 32 << 20
_THREADS: Final = 2
_HINT: Final = "check that the NBD server runs and exports the same storage as before"

Result = TypeVar("Result")


class RemoteStorage:
    """`Storage` on an export: blocking calls from threads, carried out in the event loop."""

    def __init__(self, export: Reconnecting) -> None:
        """To be made in the export's event loop."""
        self._export = export
        self._loop = asyncio.get_running_loop()
        self._loop_thread = threading.get_ident()
        self._lock = threading.Lock()
        self.size_bytes = export.size_bytes
        self.read_only = export.read_only

    def read(self, offset: int, length: int) -> bytes:
        """Read."""
        return self._call(_within(ANSWER_SECONDS, read_bytes(self._export, offset, length)))

    def write(self, offset: int, data: bytes) -> None:
        """Write, and flush if the server has anything to flush."""
        self._call(_within(ANSWER_SECONDS, self._write(offset, data)))

    def zero(self, offset: int, length: int) -> None:
        """Zero what the server does not say is zero already."""
        self._call(self._zero(offset, length))

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other threads out; other processes cannot be."""
        if not self._lock.acquire(timeout=ANSWER_SECONDS):
            raise OSError(errno.ETIMEDOUT, "an earlier change of its header hangs")
        try:
            yield
        finally:
            self._lock.release()

    def _call(self, work: Coroutine[Any, Any, Result]) -> Result:
        if threading.get_ident() == self._loop_thread:
            work.close()
            raise RuntimeError("this would wait for its own event loop: use the device's run()")
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    async def _write(self, offset: int, data: bytes) -> None:
        fua = Feature.FUA in self._export.features
        _check(await wait_done(lambda done: self._export.write(offset, memoryview(data), done, fua=fua)))
        if not fua:
            await self._flush()

    async def _flush(self) -> None:
        if Feature.FLUSH in self._export.features:
            _check(await wait_done(self._export.flush))

    async def _zero(self, offset: int, length: int) -> None:
        end = offset + length
        while offset < end:
            step = min(_ZERO_STEP_BYTES, end - offset)
            extent = await _within(ZERO_SECONDS, self._next_extent(offset, step))
            step = min(step, extent.length)
            if Allocation.ZERO not in extent.allocation:
                await _within(ZERO_SECONDS, self._zero_step(offset, step))
            offset += step
        await _within(ZERO_SECONDS, self._flush())

    async def _next_extent(self, offset: int, length: int) -> Extent:
        if Feature.EXTENTS not in self._export.features:
            return Extent(length, Allocation.DATA)
        future: asyncio.Future[Extent] = asyncio.get_running_loop().create_future()

        def found(error: int, extents: list[Extent] | None) -> None:
            if not future.done():
                future.set_result(extents[0] if extents else Extent(length, Allocation.DATA))

        self._export.extents(offset, length, found)
        return await future

    async def _zero_step(self, offset: int, length: int) -> None:
        if Feature.ZERO in self._export.features:
            _check(await wait_done(lambda done: self._export.zero(offset, length, done)))
            return
        for at in range(offset, offset + length, len(_ZEROS)):
            data = _ZEROS[: min(len(_ZEROS), offset + length - at)]
            _check(await wait_done(partial(self._export.write, at, data)))


class HeaderChecks:
    """Reads the header before changes: once for all that come while an earlier look is under way."""

    def __init__(self, export: Reconnecting, headers: HeaderReader) -> None:
        self._export = export
        self._headers = headers
        self._waiting: list[Callable[[int, Header | None], None]] = []
        self._reading = False

    def look(self, seen: Callable[[int, Header | None], None]) -> None:
        """Call `seen(error, header)` with the header as it is after this call."""
        self._waiting.append(seen)
        if not self._reading:
            self._begin()

    def _begin(self) -> None:
        self._reading = True
        batch, self._waiting = self._waiting, []
        self._export.read(0, HEADER_BYTES, partial(self._read, batch))

    def _read(
        self, batch: list[Callable[[int, Header | None], None]], error: int, payload: memoryview | None
    ) -> None:
        header: Header | None = None
        if payload is not None and not error:
            try:
                header = self._headers.parse(bytes(payload))
            except ValueError:
                error = errno.EIO
        self._reading = False
        if self._waiting:
            self._begin()
        for seen in batch:
            seen(error, header)


class RemoteVolume:
    """`BlockIO` of the volume on an export.

    Changes of overlapping ranges are carried out in the order in which they came, one after the other, so
    that one that is repeated after its connection was lost never undoes a later one.
    """

    def __init__(
        self,
        export: Reconnecting,
        checks: HeaderChecks,
        gate: SpanGate,
        *,
        size_bytes: int,
        hold: Hold | None,
        over: Callable[[], bool] = never,
    ) -> None:
        """`hold` is None for a read-only volume; `gate` is common to all who have the volume open."""
        self.size_bytes = size_bytes
        self.read_only = hold is None
        self.limits = remote_limits(export)
        self.features = remote_features(export)
        self._export = export
        self._checks = checks
        self._gate = gate
        self._hold = hold
        self._over = over
        self._in_flight = 0
        self._idle: asyncio.Future[None] | None = None
        self._open = True

    def read_now(self, offset: int, into: memoryview) -> bool:
        """Return False: bytes of a server are never at hand."""
        del offset, into
        return False

    def read(self, offset: int, length: int, done: ReadDone) -> None:
        """Read."""
        self._check_range(offset, length)
        if length == 0:
            done(0, memoryview(b""))
            return
        self._in_flight += 1

        def finished(error: int, payload: memoryview | None) -> None:
            self._left()
            done(client_errno(error), payload)

        self._export.read(DATA_OFFSET_BYTES + offset, length, finished)

    def write(self, offset: int, data: memoryview, done: Done, *, fua: bool = False) -> None:
        """Write, if the header says that the volume is still the owner's."""
        self._change(
            offset, len(data), done, partial(self._export.write, DATA_OFFSET_BYTES + offset, data, fua=fua)
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
        """Zero."""
        start = partial(
            self._export.zero, DATA_OFFSET_BYTES + offset, length, punch=punch, fast=fast, fua=fua
        )
        self._change(offset, length, done, start)

    def trim(self, offset: int, length: int, done: Done, *, fua: bool = False) -> None:
        """Discard."""
        self._change(
            offset, length, done, partial(self._export.trim, DATA_OFFSET_BYTES + offset, length, fua=fua)
        )

    def cache(self, offset: int, length: int, done: Done) -> None:
        """Have the server read ahead."""
        self._check_range(offset, length)
        self._plain(partial(self._export.cache, DATA_OFFSET_BYTES + offset, length), done)

    def flush(self, done: Done) -> None:
        """Have the server put everything on stable storage."""
        if self.read_only:
            done(0)
        else:
            self._plain(self._export.flush, done)

    def extents(self, offset: int, length: int, done: ExtentsDone) -> None:
        """Report what the server says of the range."""
        self._check_range(offset, length)
        self._in_flight += 1

        def finished(error: int, found: list[Extent] | None) -> None:
            self._left()
            done(client_errno(error), found)

        self._export.extents(DATA_OFFSET_BYTES + offset, length, finished)

    async def close(self) -> None:
        """Wait for the commands in flight."""
        if self._in_flight:
            self._idle = asyncio.get_running_loop().create_future()
            await self._idle
        self._open = False

    def _check_range(self, offset: int, length: int) -> None:
        if offset < 0 or length < 0 or offset + length > self.size_bytes:
            raise ValueError(f"{length} bytes at {offset} are outside a volume of {self.size_bytes} bytes")
        if not self._open:
            raise ValueError("the volume is closed")

    def _plain(self, start: Callable[[Done], None], done: Done) -> None:
        self._in_flight += 1

        def finished(error: int) -> None:
            self._left()
            done(client_errno(error))

        start(finished)

    def _change(self, offset: int, length: int, done: Done, start: Callable[[Done], None]) -> None:
        self._check_range(offset, length)
        if self._hold is None or length == 0:
            done(0 if self._hold else errno.EPERM)
            return
        self._in_flight += 1
        hold = self._hold

        def begin(token: int) -> None:
            def finished(error: int) -> None:
                self._gate.leave(token)
                self._left()
                done(client_errno(error))

            def seen(error: int, header: Header | None) -> None:
                if header is None:
                    finished(error or errno.EIO)
                elif hold.is_superseded(header) or self._over():
                    finished(errno.ESHUTDOWN)
                else:
                    start(finished)

            self._checks.look(seen)

        self._gate.enter(offset, offset + length, begin, exclusive=True)

    def _left(self) -> None:
        self._in_flight -= 1
        if self._in_flight == 0 and self._idle is not None and not self._idle.done():
            self._idle.set_result(None)


def remote_features(export: Reconnecting) -> Feature:
    """Return what a volume on the export can do; one connection or several, all our clients share them."""
    return export.features | Feature.MULTI_CONN


def remote_limits(export: Reconnecting) -> BlockLimits:
    """Return a volume's limits; what is longer than the server takes is split."""
    limits = export.limits
    return BlockLimits(
        limits.minimum, min(max(limits.preferred, BLOCK_BYTES), _MAXIMUM_BYTES), _MAXIMUM_BYTES
    )


class RemoteDevice(WholeDevice):
    """A labelled export; `open_remote_device` opens one."""

    kind = "nbd"
    hint = _HINT

    def __init__(
        self, export: Reconnecting, storage: RemoteStorage, label: DeviceLabel, *, text: str
    ) -> None:
        """Take over the export, in its event loop."""
        super().__init__(storage, label, text=text)
        self.limits = remote_limits(export)
        self.features = remote_features(export)
        self._export = export
        self._checks = HeaderChecks(export, self.headers)
        self._gate = SpanGate()
        self._opened: list[RemoteVolume] = []
        self._threads = IoThreads(f"io-{label.name}"[:15], _THREADS)
        export.name = label.name
        export.verify = self._is_same

    @property
    def access(self) -> str:  # type: ignore[override]
        """How many connections there are to the server."""
        count = self._export.connections
        return f"{count} connection{'' if count == 1 else 's'}"

    @property
    def reconnects(self) -> int:
        """Connections that were made anew."""
        return self._export.reconnects

    def usage(self) -> Usage:
        """Look at the header, if there is a connection."""
        if self._export.problem:
            raise DeviceUnusable(self.spec, self._export.problem, self.hint)
        return super().usage()

    def in_use(self) -> str:
        """Look for volumes that are open here; another VIOS that shares the export does not show."""
        return " through this VIOS" if self._opened else ""

    async def run(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Run it in one of the device's threads."""
        return await self._threads.run(work, *arguments)

    async def open_volume(self, name: str, epoch: int | None, over: Callable[[], bool] = never) -> BlockIO:
        """Open the volume over the device's connections."""
        entry, hold = await self._threads.run(self.hold, name, epoch)
        volume = _Opened(
            self._export, self._checks, self._gate, size_bytes=entry.size_bytes, hold=hold, over=over
        )
        self._opened.append(volume)
        volume.on_closed = lambda: self._opened.remove(volume)
        return volume

    async def close(self) -> None:
        """End the connections and the threads."""
        await self._export.close()
        await self._threads.close()

    async def _is_same(self, connection: Connection) -> str:
        """Look whether a new connection leads to this device: a server may export something else by now."""
        header = parse_header(await read_bytes(connection, 0, HEADER_BYTES))
        if header.label is None or header.label.uuid != self.id:
            return "the export carries another label, or none: it is another one, or has lost its contents"
        return ""


class _Opened(RemoteVolume):
    """A volume that the device counts."""

    on_closed: Callable[[], None]

    async def close(self) -> None:
        """Wait for the commands in flight."""
        await super().close()
        self.on_closed()


async def open_remote_device(
    spec: RemoteSpec,
    *,
    text: str | None = None,
    name: str | None = None,
    size_bytes: int | None = None,
    force: bool = False,
) -> RemoteDevice:
    """Connect to an export and label it if it has no label yet; `force` overrides the refusal of signatures.

    :raise DeviceUnusable: it cannot be reached, holds something else, or is not as asked for.
    """
    text = text or str(spec)
    try:
        first = await open_connection(spec.uri.address, spec.uri.export)
    except FarpageError as error:
        raise DeviceUnusable(text, error.cause, _HINT) from error
    if first.limits.minimum > BLOCK_BYTES:
        first.abort()
        raise DeviceUnusable(
            text, f"its blocks of {first.limits.minimum} bytes are longer than a page", "use another server"
        )
    export = Reconnecting(spec.uri.address, spec.uri.export, first, name=name or text)
    storage = RemoteStorage(export)
    try:
        label = await asyncio.to_thread(
            partial(
                prepare_label,
                storage,
                text=text,
                default_name=default_name(spec.uri.export or "nbd"),
                name=name,
                size_bytes=size_bytes,
                refuse_foreign=(lambda: None) if force else partial(_refuse_signed, text, storage),
            )
        )
        return RemoteDevice(export, storage, label, text=text)
    except (OSError, ValueError) as error:
        await export.close()
        raise unusable(text, error, _HINT) from error
    except BaseException:
        await export.close()
        raise


def _refuse_signed(text: str, storage: RemoteStorage) -> None:
    """Have blkid look at a copy of the export's both ends, where signatures lie."""
    descriptor = create_memfd("farpage-probe", storage.size_bytes)
    try:
        end = storage.size_bytes // BLOCK_BYTES * BLOCK_BYTES
        tail = max(DATA_OFFSET_BYTES, end - DATA_OFFSET_BYTES)
        os.pwrite(descriptor, storage.read(0, DATA_OFFSET_BYTES), 0)
        if tail < end:
            os.pwrite(descriptor, storage.read(tail, end - tail), tail)
        refuse_signed(text, f"/proc/{os.getpid()}/fd/{descriptor}")
    finally:
        os.close(descriptor)


async def _within(seconds: float, work: Coroutine[Any, Any, Result]) -> Result:
    """Await with a time limit, as an OSError."""
    try:
        async with asyncio.timeout(seconds):
            return await work
    except TimeoutError as error:
        raise OSError(errno.ETIMEDOUT, "the server does not answer") from error


def _check(error: int) -> None:
    if error:
        raise OSError(error, os.strerror(error))
