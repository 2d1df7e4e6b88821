"""The volume on an NBD export: its changes one after the other, each after a look at the header."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from functools import partial
from typing import Final

from farpage.blockio import BlockIO, BlockLimits, Done, Extent, ExtentsDone, Feature, ReadDone
from farpage.device.base import BLOCK_BYTES, never
from farpage.device.file import client_errno
from farpage.device.layout import DATA_OFFSET_BYTES, HEADER_BYTES, Header
from farpage.device.reconnect import Reconnecting
from farpage.device.spans import SpanGate
from farpage.device.whole import HeaderReader, Hold
from farpage.nbd.replaying import Command

_MAXIMUM_BYTES: Final = 32 << 20


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
    that one that is repeated after its connection was lost never undoes a later one. Each is sent right after
    a look whether the volume is still the owner's, and looked at anew before it is repeated.
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
        place = DATA_OFFSET_BYTES + offset
        self._change(offset, len(data), done, lambda io, end: io.write(place, data, end, fua=fua))

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
        place = DATA_OFFSET_BYTES + offset
        self._change(
            offset,
            length,
            done,
            lambda io, end: io.zero(place, length, end, punch=punch, fast=fast, fua=fua),
        )

    def trim(self, offset: int, length: int, done: Done, *, fua: bool = False) -> None:
        """Discard."""
        place = DATA_OFFSET_BYTES + offset
        self._change(offset, length, done, lambda io, end: io.trim(place, length, end, fua=fua))

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

    def _change(self, offset: int, length: int, done: Done, start: Callable[[BlockIO, Done], None]) -> None:
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
                    self._export.submit(command)

            def look() -> None:
                self._checks.look(seen)

            command = Command(
                lambda io, end: start(io, lambda error: end(error, None)),
                lambda error, _result: finished(error),
                late=look,
            )
            look()

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
