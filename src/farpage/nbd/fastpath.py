"""Requests that need nothing but the page cache: received, carried out and answered in one go.

Of one connection, in a thread that may wait for the device (`lane.py`). What is not for here stays in the
receive buffer, for the event loop: other commands and flags, wrong bytes, reads that are not at hand, changes
that are refused, and whatever does not succeed at once. To carry such a request out once more, there, does no
harm.

`_fastpath.pyx` is the same as machine code and is used where it was built.
"""

from __future__ import annotations

import enum
import os
from typing import Final, NamedTuple

from farpage.blockio import SharedFile
from farpage.nbd import codec
from farpage.nbd import protocol as p
from farpage.nbd.export import Counters

TURN_COST_MAX: Final = 64
"""Requests that are carried out before the answers are sent; each 16 KiB of one count as one more."""
GATHERED_BYTES: Final = 32 << 10
"""Replies are gathered over several receives until they, and what was written, come to this: waking the other
end for each few costs it more than it gains by having them early, and with all of them late it has nothing to
do while others are carried out."""
_COST_SHIFT: Final = 14
_REQUEST_BYTES: Final = codec.REQUEST.size
_SIMPLE_BYTES: Final = codec.SIMPLE_REPLY.size
_DATA_BYTES: Final = codec.DATA_CHUNK.size
_unpack_request = codec.REQUEST_IN_WORDS.unpack_from
_PLAIN_READ: Final = p.NBD_REQUEST_MAGIC << 32 | p.NBD_CMD_READ
_PLAIN_WRITE: Final = p.NBD_REQUEST_MAGIC << 32 | p.NBD_CMD_WRITE


class Outcome(enum.IntEnum):
    """How a turn ended."""

    WAIT_READ = 0
    """Everything that has come was answered."""
    WAIT_WRITE = 1
    """The other end does not take more replies now."""
    OVER = 2
    """It was stopped, or what is next (at the earliest at `input_start`) is for the event loop."""
    WAIT_DEVICE = 3
    """Nothing can be done before reads that are in flight have ended."""


class Settings(NamedTuple):
    """What was agreed on with the client."""

    structured_replies: bool
    size_bytes: int
    misaligned: int
    """Bits that no offset and no length may have."""
    write_max_bytes: int
    """Longer WRITEs are not for here."""


class FastPath:
    """The receive buffer and the outgoing area of one connection while they are served here.

    Whoever hands them over sets the bounds of what is in them, and takes them back the same way. Made and
    `stopped` by the event loop; everything else belongs to one thread at a time.
    """

    device_descriptors: tuple[int, ...] = ()
    """Readable when something has ended that was begun."""
    in_flight = 0
    """Requests that were begun and that the device has not ended."""

    def __init__(
        self,
        socket: int,
        buffers: tuple[bytearray, bytearray],
        storage: SharedFile,
        counters: Counters,
        settings: Settings,
    ) -> None:
        """Prepare for a non-blocking socket; `buffers` are the receive buffer and the outgoing area."""
        input_, area = buffers
        self._socket, self._storage, self._counters = socket, storage, counters
        self._input, self._area = memoryview(input_), memoryview(area)
        self._input_size_bytes = len(input_)
        if len(input_) < _REQUEST_BYTES or len(area) < _DATA_BYTES:
            raise ValueError("the buffers are too small")
        self._closed = False
        self._structured, self._size_bytes, self._misaligned, write_max_bytes = settings
        self.input_start = self.input_end = 0
        self.output_start = self.output_end = 0
        self.read_max_bytes = 0
        """Longer READs are not for here."""
        self.write_max_bytes = (
            min(write_max_bytes, len(input_) - _REQUEST_BYTES) if storage.refusal is not None else 0
        )
        """Longer WRITEs are not for here."""
        self.stopped = False
        """Once it is set, nothing is begun any more; the turn ends."""
        self.served = 0
        """Requests that were answered."""
        self.reads_served = 0
        self._cost = 0
        self._reads = self._read_bytes = self._writes = self._written_bytes = 0

    def turn(self) -> int:
        """Serve what has come until there is no more, and return an `Outcome`; never waits for the client.

        :raise ValueError: it is closed, or its bounds are not within the buffers.
        """
        self._check()
        served_before, self._cost = self.served, 0
        if (
            self.output_end
            and (outcome := self._push()) is not None
            and (outcome == Outcome.OVER or not self.stopped)
        ):
            return outcome
        while not self.stopped:
            if not self._is_whole():
                received = self._receive()
                if received is not None:
                    outcome = self._push()
                    return received if outcome is None else outcome
            if not self._carry_out():
                break
            alone = self.served - served_before < 2 and self.input_start == self.input_end
            if alone or self._cost >= TURN_COST_MAX:
                outcome = self._push()
                if outcome is not None or alone:
                    return Outcome.WAIT_READ if outcome is None else outcome
                self._cost = 0
        self._push()
        return Outcome.OVER

    def close(self) -> None:
        """Let go of what it has of its own; there are no more turns."""
        self._closed = True

    def _check(self) -> None:
        if self._closed:
            raise ValueError("a path that is closed")
        if not 0 <= self.input_start <= self.input_end <= len(
            self._input
        ) or not 0 <= self.output_start <= self.output_end <= len(self._area):
            raise ValueError("bounds that are not within the buffers")

    def _receive(self) -> Outcome | None:
        """Receive behind what is there; WAIT_READ when nothing has come, OVER when nothing will."""
        left = self.input_end - self.input_start
        self._input[:left] = self._input[self.input_start : self.input_end]
        self.input_start, self.input_end = 0, left
        try:
            received = os.readv(self._socket, [self._input[left : self._input_size_bytes]])
        except BlockingIOError:
            return Outcome.WAIT_READ
        except OSError:
            return Outcome.OVER
        self.input_end += received
        return None if received else Outcome.OVER

    def _request(self, at: int) -> tuple[bool, int, int, int, int] | None:
        """Return whether it is a WRITE, its bytes in all, cookie, offset, length; None if not for here."""
        word, cookie, offset, length = _unpack_request(self._input, at)
        writes = word == _PLAIN_WRITE
        longest = self.write_max_bytes if writes else self.read_max_bytes if word == _PLAIN_READ else 0
        if not 0 < length <= longest or offset + length > self._size_bytes:
            return None
        if (offset | length) & self._misaligned:
            return None
        return writes, _REQUEST_BYTES + length * writes, cookie, offset, length

    def _is_whole(self) -> bool:
        """Tell whether the next request has come with its payload, or is not for here."""
        available = self.input_end - self.input_start
        if available < _REQUEST_BYTES:
            return False
        request = self._request(self.input_start)
        return request is None or available >= request[1]

    def _carry_out(self) -> bool:
        """Carry out the requests that have come whole; False when the next is not for here."""
        at, cost, writes = self.input_start, self._cost, False
        while self.input_end - at >= _REQUEST_BYTES and cost < TURN_COST_MAX:
            request = self._request(at)
            if request is None or self.input_end - at < request[1]:
                break
            writes |= request[0]
            cost += 1 + (request[4] >> _COST_SHIFT)
            at += request[1]
        if writes and self._is_refused():
            return False
        while self.input_start < at:
            request = self._request(self.input_start)
            # The buffer is its owner's, too, who might have written to it while it was asked.
            if self.stopped or request is None or self.input_start + request[1] > at:
                return False
            is_write, whole_bytes, cookie, offset, length = request
            if len(self._area) - self.output_end < _DATA_BYTES + length:
                self._cost = TURN_COST_MAX
                return self.output_end > 0  # else it never fits
            if not (self._write if is_write else self._read)(cookie, offset, length):
                return False
            self.input_start += whole_bytes
            self.served += 1
            self._cost += 1 + (length >> _COST_SHIFT)
            if self.output_end + self._written_bytes >= GATHERED_BYTES:
                self._cost = TURN_COST_MAX
                return True
        return self._cost >= TURN_COST_MAX or not self._is_whole()

    def _payload(self, length: int) -> memoryview:
        """Return where the payload of the next reply is to be."""
        start = self.output_end + (_DATA_BYTES if self._structured else _SIMPLE_BYTES)
        return self._area[start : start + length]

    def _reply(self, cookie: int, offset: int, length: int) -> None:
        """Put the header before a payload that is in its place."""
        header = (
            codec.encode_data_header(cookie, offset, length, done=True)
            if self._structured
            else codec.encode_simple_reply(cookie)
        )
        self._area[self.output_end : self.output_end + len(header)] = header
        self.output_end += len(header) + length
        self._reads += 1
        self.reads_served += 1
        self._read_bytes += length

    def _read(self, cookie: int, offset: int, length: int) -> bool:
        into, place = self._payload(length), self._storage.origin_bytes + offset
        try:
            if os.preadv(self._storage.descriptor, (into,), place, os.RWF_NOWAIT) != length:
                return False
        except OSError:
            return False
        self._reply(cookie, offset, length)
        return True

    def _write(self, cookie: int, offset: int, length: int) -> bool:
        start = self.input_start + _REQUEST_BYTES
        over = self._storage.over
        try:
            if over is not None and over():
                return False
            done = 0
            while done < length:
                data = self._input[start + done : start + length]
                written = os.pwrite(
                    self._storage.descriptor, data, self._storage.origin_bytes + offset + done
                )
                if not written:
                    return False
                done += written
        except OSError:
            return False
        self._acknowledge(cookie, length)
        return True

    def _acknowledge(self, cookie: int, length: int) -> None:
        self._area[self.output_end : self.output_end + _SIMPLE_BYTES] = codec.encode_simple_reply(cookie)
        self.output_end += _SIMPLE_BYTES
        self._writes += 1
        self._written_bytes += length

    def _is_refused(self) -> bool:
        refusal = self._storage.refusal
        try:
            return refusal is None or refusal() != 0
        except Exception:  # it is asked again, and the answer reported, where that can be done
            return True

    def _push(self) -> Outcome | None:
        """Send the replies; None when all are gone."""
        # No other thread comes between the load and the store of an addition: CPython lets go of its lock at
        # calls and backward jumps only.
        self._counters.reads += self._reads
        self._counters.read_bytes += self._read_bytes
        self._counters.writes += self._writes
        self._counters.written_bytes += self._written_bytes
        self._reads = self._read_bytes = self._writes = self._written_bytes = 0
        try:
            while self.output_start < self.output_end:
                self.output_start += os.write(self._socket, self._area[self.output_start : self.output_end])
        except BlockingIOError:
            return Outcome.WAIT_WRITE
        except OSError:
            return Outcome.OVER
        self.output_start = self.output_end = 0
        return None
