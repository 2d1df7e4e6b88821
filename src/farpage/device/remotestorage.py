"""An NBD export as the `Storage` of a device: blocking calls from threads, carried out in the event loop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import threading
from collections.abc import Coroutine, Iterator
from functools import partial
from typing import Any, Final, TypeVar

from farpage.blockio import Allocation, Extent, Feature, read_bytes, wait_done
from farpage.device.reconnect import Reconnecting

ANSWER_SECONDS: Final = 10.0
"""So long one command for the header may take."""
ZERO_SECONDS: Final = 60.0
"""So long zeroing `_ZERO_STEP_BYTES` may take."""
_ZERO_STEP_BYTES: Final = 256 << 20
_ZEROS: Final = memoryview(bytes(4 << 20))

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
