"""Reads and writes of a file that was opened with O_DIRECT: received, begun and answered in one go.

As `fastpath.py` for what the page cache has: the device does many at a time, so they are begun together and
answered as they end, reads in an io_uring, writes with kernel AIO (why: `kernel/aio.py`). The thread may
wait, so a write into a hole of the file, for which the file system has to wait, is begun the same way. With
the first request of another kind the connection goes back to the event loop, as soon as what is in flight has
ended, and so it does with whatever did not succeed.

`_directpath.pyx` is the same as machine code and is used where it was built.
"""

from __future__ import annotations

import enum
from collections import deque
from typing import Final, NamedTuple

from farpage.blockio import SharedFile
from farpage.kernel.aio import AsyncWrites
from farpage.kernel.io_uring import Ring
from farpage.kernel.memory import PAGE_SIZE, AlignedBuffer
from farpage.nbd import codec
from farpage.nbd import protocol as p
from farpage.nbd.export import Counters
from farpage.nbd.fastpath import GATHERED_BYTES, FastPath, Outcome, Settings

_SIMPLE_BYTES: Final = codec.SIMPLE_REPLY.size

IN_FLIGHT_MAX: Final = 64
"""Reads and writes in flight."""
READ_MAX_BYTES: Final = 32 << 10
"""Longer reads are for the event loop: there holes are looked for."""
WRITE_MAX_BYTES: Final = 256 << 10
"""Longer writes are for the event loop, those to the page cache too: here they are copied once more."""
WRITES_MAX: Final = 16
"""Writes in flight: reads of the device come behind them."""
WRITTEN_TOGETHER_BYTES: Final = 256 << 10
"""Writes in flight, as they came: there is room to put so much back before what has come since."""
RESERVE_BYTES: Final = IN_FLIGHT_MAX * codec.REQUEST.size + WRITTEN_TOGETHER_BYTES
"""What is kept free of a receive buffer for requests that are put back."""
BEGUN_TOGETHER: Final = 4
"""So many reads are started with one system call; a device that waits for more does nothing meanwhile."""

_moved: Final[list[AlignedBuffer]] = []
"""Memory of what nobody has waited for: the kernel has it until the process ends."""


class _Begun(enum.Enum):
    """What is next in the receive buffer after `_begin`."""

    ALL = enum.auto()
    """Nothing that has come whole."""
    MORE = enum.auto()
    """Something that there is no room for before what is in flight has ended."""
    NOT_FOR_HERE = enum.auto()


class _InFlight(NamedTuple):
    write: bool
    cookie: int
    offset: int
    length: int


class DirectPath(FastPath):
    """See `FastPath`."""

    def __init__(  # noqa: PLR0917
        self,
        socket: int,
        buffers: tuple[bytearray, bytearray],
        storage: SharedFile,
        counters: Counters,
        settings: Settings,
        ring: Ring,
        writes: AsyncWrites | None,
    ) -> None:
        """Take over a ring and a context for writes, both of IN_FLIGHT_MAX entries."""
        settings = settings._replace(misaligned=settings.misaligned | PAGE_SIZE - 1)
        super().__init__(socket, buffers, storage, counters, settings)
        # Room for those that are given back.
        self._input_size_bytes -= RESERVE_BYTES
        if (
            self._input_size_bytes < codec.REQUEST.size + READ_MAX_BYTES
            or len(self._area) < codec.DATA_CHUNK.size + READ_MAX_BYTES
        ):
            raise ValueError("the buffers are too small")
        if ring.entries < IN_FLIGHT_MAX:
            raise ValueError("the queue is too short")
        self._ring, self._aio, self._memory = ring, writes, AlignedBuffer(IN_FLIGHT_MAX * WRITE_MAX_BYTES)
        self.device_descriptors = (ring.fileno(), *([] if writes is None else [writes.fileno()]))
        self._free = list(range(IN_FLIGHT_MAX))
        self._requests: dict[int, _InFlight] = {}
        """Those in flight, by where in the memory they are."""
        self._writing = self._writing_bytes = 0
        """Writes in flight, and their bytes."""
        self._ended: deque[tuple[int, int]] = deque()
        """Requests that have ended and are not answered, with what came of them."""
        self._failed: list[tuple[_InFlight, bytes]] = []
        self._ending = False
        self.write_max_bytes = min(self.write_max_bytes, WRITE_MAX_BYTES) if writes is not None else 0

    @property
    def in_flight(self) -> int:  # type: ignore[override]
        """Requests that the device has not ended."""
        return len(self._requests)

    def close(self) -> None:
        """Free what the kernel has; while anything is in flight it has the memory."""
        if self._closed:
            return
        self._closed = True
        if self._requests:
            _moved.append(self._memory)
            return
        self._ring.close()
        if self._aio is not None:
            self._aio.close()
        self._memory.close()

    def turn(self) -> int:
        """Begin what has come, answer what has ended; see `FastPath.turn`."""
        self._check()
        drained, begun = False, _Begun.ALL
        if self.output_end and (outcome := self._push()) is not None:
            if outcome == Outcome.WAIT_WRITE and not self.stopped and not self._ending:
                return outcome
            self._ending |= outcome == Outcome.OVER
        while True:
            progress = self._reap()
            self._ending |= self.stopped
            if not self._ending:
                if not drained and not self._is_whole():
                    before = self.input_end - self.input_start
                    received = self._receive()
                    # Who sends a request at a time sends none before it has the answer.
                    alone = self.input_end - self.input_start - before <= codec.REQUEST.size
                    drained = received == Outcome.WAIT_READ or alone
                    self._ending = received == Outcome.OVER
                begun = self._begin()
                self._ending |= begun is _Begun.NOT_FOR_HERE
            self._submit()
            if not progress or self.output_end >= GATHERED_BYTES:
                outcome = self._push()
                if outcome == Outcome.WAIT_WRITE and not self._ending:
                    return outcome
                self._ending |= outcome == Outcome.OVER
            if progress:
                continue
            if self._ending and not self._requests:
                self._give_back()
                return Outcome.OVER
            if self._ending or begun is _Begun.MORE:
                return Outcome.WAIT_DEVICE
            if drained:
                return Outcome.WAIT_READ

    def _begin(self) -> _Begun:
        """Queue the requests that have come."""
        while not self._ending and self._is_whole():
            request = self._request(self.input_start)
            if request is None:
                return _Begun.NOT_FOR_HERE
            write, whole_bytes, cookie, offset, length = request
            if (write and self._aio is None) or (not write and length > READ_MAX_BYTES):
                return _Begun.NOT_FOR_HERE
            together = self._writing == WRITES_MAX or self._writing_bytes + length > WRITTEN_TOGETHER_BYTES
            if not self._free or (write and together):
                return _Begun.MORE
            slot = self._free.pop()
            self._requests[slot] = _InFlight(write, cookie, offset, length)
            place = self._storage.origin_bytes + offset
            address = self._memory.address + slot * WRITE_MAX_BYTES
            if write:
                start = self.input_start + codec.REQUEST.size
                self._content(slot)[:] = self._input[start : start + length]
                self._writing += 1
                self._writing_bytes += length
                assert self._aio is not None
                self._aio.write(self._storage.descriptor, address, length, place, slot)
            else:
                self._ring.read(self._storage.descriptor, address, length, place, slot)
            self.input_start += whole_bytes
            if self._ring.unsubmitted == BEGUN_TOGETHER:
                self._submit()
        return _Begun.ALL

    def _content(self, slot: int) -> memoryview:
        at = slot * WRITE_MAX_BYTES
        return self._memory.view[at : at + self._requests[slot].length]

    def _submit(self) -> None:
        refused: list[int] = []
        if self._aio is not None and self._aio.queued:
            # Those that are refused, or fail, are begun once more in the loop, which says why.
            dropped = self._aio.drop() if self._is_refused() else []
            refused = dropped or [slot for slot, _ in self._aio.submit()]
        try:
            self._ring.submit()
        except OSError:  # no memory: the loop tries
            refused += self._ring.drop()
        for slot in refused:
            self._release(slot, answered=False)

    def _reap(self) -> bool:
        """Answer what has ended; tells whether there was anything."""
        self._ended.extend(self._ring.completions())
        if self._aio is not None:
            self._ended.extend(self._aio.completions())
        progress = False
        while self._ended:
            slot, result = self._ended[0]
            write, cookie, offset, length = self._requests[slot]
            needed = _SIMPLE_BYTES if write else codec.DATA_CHUNK.size + length
            room = len(self._area) - self.output_end >= needed
            if not room and not self._ending:
                break
            self._ended.popleft()
            if answered := room and result == length:
                if write:
                    self._acknowledge(cookie, length)
                else:
                    self._payload(length)[:] = self._content(slot)
                    self._reply(cookie, offset, length)
                self.served += 1
            self._release(slot, answered=answered)
            progress = True
        return progress

    def _release(self, slot: int, *, answered: bool) -> None:
        request = self._requests[slot]
        if request.write:
            self._writing -= 1
            self._writing_bytes -= request.length
        if not answered:
            self._failed.append((request, bytes(self._content(slot)) if request.write else b""))
            self._ending = True
        del self._requests[slot]
        self._free.append(slot)

    def _give_back(self) -> None:
        """Put the requests that were not answered before what was not begun."""
        requests = b"".join(
            codec.encode_request(p.NBD_CMD_WRITE if write else p.NBD_CMD_READ, 0, cookie, offset, length)
            + data
            for (write, cookie, offset, length), data in self._failed
        )
        left = bytes(self._input[self.input_start : self.input_end])
        self.input_start, self.input_end = 0, len(requests) + len(left)
        self._input[: self.input_end] = requests + left
        self._failed.clear()
        self._ending = False
