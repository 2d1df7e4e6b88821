"""Reads of a file that was opened with O_DIRECT: received, begun and answered in one go.

As `fastpath.py` for what the page cache has, and for reads alone: the device does many at a time, so they are
begun in an io_uring, and answered as they end. With the first request of another kind the connection goes
back to the event loop, as soon as the reads in flight have ended.

`_directpath.pyx` is the same as machine code and is used where it was built.
"""

from __future__ import annotations

from collections import deque
from typing import Final

from farpage.blockio import SharedFile
from farpage.kernel.io_uring import Ring
from farpage.kernel.memory import PAGE_SIZE, AlignedBuffer
from farpage.nbd import codec
from farpage.nbd import protocol as p
from farpage.nbd.export import Counters
from farpage.nbd.fastpath import GATHERED_BYTES, FastPath, Outcome, Settings

READS_MAX: Final = 64
"""Reads in flight."""
READ_MAX_BYTES: Final = 32 << 10
"""Longer ones are for the event loop, where their holes are looked for."""
BEGUN_TOGETHER: Final = 4
"""So many reads are started with one system call; a device that waits for more does nothing meanwhile."""


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
    ) -> None:
        """Take over a ring, of READS_MAX entries."""
        settings = settings._replace(misaligned=settings.misaligned | PAGE_SIZE - 1)
        super().__init__(socket, buffers, storage, counters, settings)
        self._ring, self._memory = ring, AlignedBuffer(READS_MAX * READ_MAX_BYTES)
        self.device_descriptor = ring.fileno()
        self._free = list(range(READS_MAX))
        self._requests: dict[int, tuple[int, int, int]] = {}
        """Cookie, offset and length of the reads in flight, by where in the memory they go."""
        self._ended: deque[tuple[int, int]] = deque()
        """Reads that have ended and are not answered, with what came of them."""
        self._failed: list[tuple[int, int, int]] = []
        self._ending = False
        self._input_size_bytes -= READS_MAX * codec.REQUEST.size  # room for those that are given back
        self.write_max_bytes = 0

    @property
    def in_flight(self) -> int:  # type: ignore[override]
        """Reads that the device has not ended."""
        return len(self._requests)

    def close(self) -> None:
        """Free the ring; while reads are in flight the kernel has the memory."""
        if self._requests:
            return
        self._ring.close()
        self._memory.close()

    def turn(self) -> int:
        """Begin what has come, answer what has ended; see `FastPath.turn`."""
        drained = False
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
                self._ending |= not self._begin()
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
            if self._ending or not self._free:
                return Outcome.WAIT_DEVICE
            if drained:
                return Outcome.WAIT_READ

    def _begin(self) -> bool:
        """Queue the reads that have come; False when the next request is not for here."""
        while self._free and not self._ending and self.input_end - self.input_start >= codec.REQUEST.size:
            request = self._request(self.input_start)
            if request is None or request[4] > READ_MAX_BYTES:
                return False
            _, whole_bytes, cookie, offset, length = request
            slot = self._free.pop()
            self._requests[slot] = cookie, offset, length
            address = self._memory.address + slot * READ_MAX_BYTES
            self._ring.read(
                self._storage.descriptor, address, length, self._storage.origin_bytes + offset, slot
            )
            self.input_start += whole_bytes
            if self._ring.unsubmitted == BEGUN_TOGETHER:
                self._submit()
        return True

    def _submit(self) -> None:
        try:
            self._ring.submit()
        except OSError:  # no memory: the loop tries
            for slot in self._ring.drop():
                self._release(slot, answered=False)

    def _reap(self) -> bool:
        """Answer reads that have ended; tells whether there were any."""
        self._ended.extend(self._ring.completions())
        progress = False
        while self._ended:
            slot, result = self._ended[0]
            cookie, offset, length = self._requests[slot]
            room = len(self._area) - self.output_end >= codec.DATA_CHUNK.size + length
            if not room and not self._ending:
                break
            self._ended.popleft()
            if answered := room and result == length:
                at = slot * READ_MAX_BYTES
                self._payload(length)[:] = self._memory.view[at : at + length]
                self._reply(cookie, offset, length)
                self.served += 1
            self._release(slot, answered=answered)
            progress = True
        return progress

    def _release(self, slot: int, *, answered: bool) -> None:
        request = self._requests.pop(slot)
        self._free.append(slot)
        if not answered:
            self._failed.append(request)
            self._ending = True

    def _give_back(self) -> None:
        """Put the requests that were not answered before what was not begun."""
        requests = b"".join(
            codec.encode_request(p.NBD_CMD_READ, 0, cookie, offset, length)
            for cookie, offset, length in self._failed
        )
        left = bytes(self._input[self.input_start : self.input_end])
        self.input_start, self.input_end = 0, len(requests) + len(left)
        self._input[: self.input_end] = requests + left
        self._failed.clear()
        self._ending = False
