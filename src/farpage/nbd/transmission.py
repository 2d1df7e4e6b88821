"""The server's transmission phase on one connection: the data plane's hot path.

One receive takes as many requests as the socket holds, all of them are parsed together, and all that can be answered
at once leaves in one send. A READ first asks the BlockIO for bytes that are at hand (`read_now`), straight into the
outgoing area; only what needs waiting becomes a command in flight.

Memory is bounded: nothing more is read from the socket while the commands in flight, or the replies that the other
end does not take, are over their limits.
"""

from __future__ import annotations

import asyncio
import enum
import errno
import logging
import socket
from collections.abc import Callable
from typing import Final

from farpage.blockio import Allocation, Extent, Feature
from farpage.nbd import codec
from farpage.nbd import protocol as p
from farpage.nbd.buffers import AlignedPool
from farpage.nbd.export import Export
from farpage.nbd.outgoing import AREA_BYTES, Outgoing

RECEIVE_BYTES: Final = 256 << 10
COMMANDS_IN_FLIGHT_MAX: Final = 2048
PAYLOAD_IN_FLIGHT_MAX_BYTES: Final = 64 << 20
"""Reading stops when commands in flight move this much; one more maximum-sized command may be over it."""
DISCARDED_PAYLOAD_MAX_BYTES: Final = 64 << 20
"""A refused WRITE's payload is read and dropped up to this length; a longer one ends the connection."""
SPARSE_READ_MIN_BYTES: Final = 32 << 10
"""Reads from this length on are answered with hole chunks where the export knows its holes."""
EXTENTS_MAX: Final = 4096
"""Extents in one BLOCK_STATUS reply."""
LINGER_SECONDS: Final = 10.0
"""How long a connection that ends may take to finish its commands' replies."""

_REQUEST_BYTES: Final = codec.REQUEST.size
_INLINE_MAX_BYTES: Final = AREA_BYTES // 2
_PIECES_MAX: Final = 64

log = logging.getLogger(__name__)


class _Phase(enum.Enum):
    OPEN = enum.auto()
    DRAINING = enum.auto()
    """No more requests are read; replies still go out."""
    CLOSED = enum.auto()
    """The socket is closed; commands may still be in flight."""


class Transmission:
    """Serves one export on one connected non-blocking socket, which it owns."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        export: Export,
        pool: AlignedPool,
        *,
        structured_replies: bool,
        block_status: bool,
        on_ended: Callable[[], None],
    ) -> None:
        """Prepare; `start` begins. `on_ended` is called once the socket is closed and no command is in flight."""
        self._loop = loop
        self._socket = sock
        self._export = export
        self._io = export.io
        self._counters = export.counters
        self._pool = pool
        self._structured = structured_replies
        self._on_ended = on_ended
        features = export.io.features
        self._size_bytes = export.io.size_bytes
        limits = codec.advertised_limits(export.io.limits)
        self._misaligned = limits.minimum - 1
        self._maximum_bytes = limits.maximum
        self._flags_of_command = _commands(
            features, export.io.read_only, structured=structured_replies, block_status=block_status
        )
        self._sparse = structured_replies and Feature.EXTENTS in features

        self._phase = _Phase.OPEN
        self._fenced = False
        self._reading = False
        self._parsing = False
        self._blocked = False
        self._push_scheduled = False
        self._resume_scheduled = False
        self._linger: asyncio.TimerHandle | None = None

        self._input = bytearray(RECEIVE_BYTES)
        self._input_view = memoryview(self._input)
        self._input_start = 0
        self._input_end = 0
        self._sink: memoryview | None = None
        """Rest of the payload that is being received."""
        self._sink_filled: Callable[[], None] | None = None
        self._discard_bytes = 0
        self._discarded: Callable[[], None] | None = None
        self._output = Outgoing(sock)

        self._in_flight = 0
        self._in_flight_bytes = 0
        self._idle_waiters: list[asyncio.Future[None]] = []

    # Life

    def start(self, leftover: bytes = b"") -> None:
        """Begin to serve; `leftover` are bytes that were received along with the handshake."""
        self._input[: len(leftover)] = leftover
        self._input_end = len(leftover)
        self._resume_reading()
        if leftover:
            self._parse()

    @property
    def in_flight(self) -> int:
        """Commands of this connection that the BlockIO has not finished."""
        return self._in_flight

    def fence(self) -> None:
        """Answer every further command with ESHUTDOWN."""
        self._fenced = True

    async def wait_idle(self) -> None:
        """Return when no command is in flight."""
        if self._in_flight:
            waiter: asyncio.Future[None] = self._loop.create_future()
            self._idle_waiters.append(waiter)
            await waiter

    def disconnect(self) -> None:
        """Send what can be sent at once and close the socket; commands in flight go on in the BlockIO."""
        if self._phase is _Phase.CLOSED:
            return
        try:
            self._output.push()
        except OSError:
            pass
        self._close()

    def _drain(self) -> None:
        """Read no more; close when everything is answered."""
        if self._phase is _Phase.OPEN:
            self._phase = _Phase.DRAINING
            self._stop_reading()
            self._linger = self._loop.call_later(LINGER_SECONDS, self._close)
            self._schedule_push()

    def _close(self) -> None:
        if self._phase is _Phase.CLOSED:
            return
        self._phase = _Phase.CLOSED
        self._stop_reading()
        if self._linger is not None:
            self._linger.cancel()
        if self._blocked:
            self._loop.remove_writer(self._socket)
            self._blocked = False
        self._output.clear()
        self._sink = self._sink_filled = self._discarded = None
        self._socket.close()
        if not self._in_flight:
            self._loop.call_soon(self._on_ended)

    def _violated(self, reason: str) -> None:
        log.warning("export %r: hanging up on a client: %s", self._export.name, reason)
        self.disconnect()

    # Receiving

    def _resume_reading(self) -> None:
        if not self._reading and self._phase is _Phase.OPEN:
            self._loop.add_reader(self._socket, self._on_readable)
            self._reading = True

    def _stop_reading(self) -> None:
        if self._reading:
            self._loop.remove_reader(self._socket)
            self._reading = False

    def _on_readable(self) -> None:
        try:
            if self._sink is None:
                received = self._socket.recv_into(self._input_view[self._input_end :])
            else:
                received = self._socket.recvmsg_into((self._sink, self._input_view))[0]
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            self._close()
            return
        if not received:
            self._drain()
            return
        if self._sink is not None:
            if received < len(self._sink):
                self._sink = self._sink[received:]
                return
            received -= len(self._sink)
            filled = self._sink_filled
            self._sink = self._sink_filled = None
            self._parsing = True
            if filled is not None:
                filled()
            self._parsing = False
        self._input_end += received
        self._parse()

    def _parse(self) -> None:
        """Carry out the requests in the receive buffer, as far as the limits allow."""
        if self._parsing or self._phase is not _Phase.OPEN:
            return
        self._parsing = True
        try:
            finished = self._parse_requests()
            if self._phase is _Phase.CLOSED:
                return
            if finished:
                # At most a part of a header is left.
                left = self._input_end - self._input_start
                if self._input_start:
                    self._input[:left] = self._input[self._input_start : self._input_end]
                    self._input_start, self._input_end = 0, left
                self._resume_reading()
            else:
                self._stop_reading()
        except Exception:
            log.exception("export %r: a request failed in an unforeseen way", self._export.name)
            self._close()
            return
        finally:
            self._parsing = False
        self._push()

    def _parse_requests(self) -> bool:
        """Return whether everything whole in the receive buffer was carried out."""
        if self._discard_bytes and not self._discard():
            return True
        if self._saturated():
            return False
        unpack = codec.REQUEST.unpack_from
        read_now = self._io.read_now
        output = self._output
        buffer, view, area = self._input, output.view, output.area
        size_bytes, misaligned = self._size_bytes, self._misaligned
        structured = self._structured
        header_bytes = codec.DATA_CHUNK.size if structured else codec.SIMPLE_REPLY.size
        pack_data, pack_simple = codec.DATA_CHUNK.pack_into, codec.SIMPLE_REPLY.pack_into
        inline_max = SPARSE_READ_MIN_BYTES - 1 if self._sparse else _INLINE_MAX_BYTES
        inline_max = 0 if self._fenced else min(inline_max, self._maximum_bytes)
        position = self._input_start
        reads = read_bytes = 0
        going = True
        while self._input_end - position >= _REQUEST_BYTES:
            magic, flags, command, cookie, offset, length = unpack(buffer, position)
            if (
                command == 0  # NBD_CMD_READ
                and not flags
                and 0 < length <= inline_max
                and offset + length <= size_bytes
                and not (offset | length) & misaligned
                and magic == p.NBD_REQUEST_MAGIC
            ):
                at = output.end
                start = at + header_bytes
                stop = start + length
                if stop > AREA_BYTES:
                    if self._push() and self._phase is _Phase.OPEN:
                        continue
                    going = False
                    break
                if read_now(offset, view[start:stop]):
                    if structured:
                        pack_data(area, at, p.NBD_STRUCTURED_REPLY_MAGIC, 1, 1, cookie, length + 8, offset)
                    else:
                        pack_simple(area, at, p.NBD_SIMPLE_REPLY_MAGIC, 0, cookie)
                    output.end = stop
                    reads += 1
                    read_bytes += length
                    position += _REQUEST_BYTES
                    continue
            position += _REQUEST_BYTES
            self._input_start = position
            going = self._begin(magic, flags, command, cookie, offset, length)
            position = self._input_start
            if not going:
                break
        self._input_start = position
        self._counters.reads += reads
        self._counters.read_bytes += read_bytes
        return going or self._sink is not None or self._discard_bytes > 0

    def _saturated(self) -> bool:
        return (
            self._in_flight >= COMMANDS_IN_FLIGHT_MAX
            or self._in_flight_bytes >= PAYLOAD_IN_FLIGHT_MAX_BYTES
            or self._output.queued_bytes > 0
        )

    # Commands

    def _begin(self, magic: int, flags: int, command: int, cookie: int, offset: int, length: int) -> bool:
        """Start one command; return whether the next one may be parsed."""
        if magic != p.NBD_REQUEST_MAGIC:
            self._violated("a request does not begin with NBD_REQUEST_MAGIC")
            return False
        if command == p.NBD_CMD_DISC:
            self._drain()
            return False
        error = self._check(command, flags, offset, length)
        if command == p.NBD_CMD_WRITE:
            if not self._begin_write(cookie, flags, offset, length, error):
                return False
        elif error:
            self._reply(command, cookie, error)
        elif command == p.NBD_CMD_READ:
            self._read(cookie, flags, offset, length)
        elif command == p.NBD_CMD_BLOCK_STATUS:
            self._block_status(cookie, flags, offset, length)
        else:
            self._run_other(command, flags, cookie, offset, length)
        return self._phase is _Phase.OPEN and not self._saturated()

    def _check(self, command: int, flags: int, offset: int, length: int) -> int:
        """Return the NBD error that a request earns before it is tried, or 0."""
        if self._fenced:
            return p.NBD_ESHUTDOWN
        changes = command in (p.NBD_CMD_WRITE, p.NBD_CMD_TRIM, p.NBD_CMD_WRITE_ZEROES)
        if changes and self._io.read_only:
            return p.NBD_EPERM
        allowed = self._flags_of_command.get(command)
        if allowed is None or flags & ~allowed:
            return p.NBD_EINVAL
        if command == p.NBD_CMD_FLUSH:
            return p.NBD_EINVAL if offset or length else 0
        if length == 0 or (offset | length) & self._misaligned:
            return p.NBD_EINVAL
        if offset + length > self._size_bytes:
            return p.NBD_ENOSPC if changes and command != p.NBD_CMD_TRIM else p.NBD_EINVAL
        # Lengths that cost no memory (TRIM, WRITE_ZEROES, BLOCK_STATUS) are as long as the client likes.
        bounded = command in (p.NBD_CMD_READ, p.NBD_CMD_WRITE, p.NBD_CMD_CACHE)
        return p.NBD_EINVAL if bounded and length > self._maximum_bytes else 0

    def _read(self, cookie: int, flags: int, offset: int, length: int) -> None:
        self._enter(length)
        if self._sparse and length >= SPARSE_READ_MIN_BYTES and not flags & p.NBD_CMD_FLAG_DF:
            self._read_sparse(cookie, offset, length)
        else:
            self._read_whole(cookie, offset, length)

    def _read_whole(self, cookie: int, offset: int, length: int, *, try_now: bool = False) -> None:
        header = (
            codec.encode_data_header(cookie, offset, length, done=True)
            if self._structured
            else codec.encode_simple_reply(cookie)
        )
        output = self._output
        if try_now and self._phase is not _Phase.CLOSED and output.room(len(header) + length):
            start = output.end + len(header)
            if self._io.read_now(offset, output.view[start : start + length]):
                output.area[output.end : start] = header
                output.end = start + length
                self._leave(length)
                self._counters.reads += 1
                self._counters.read_bytes += length
                self._schedule_push()
                return

        def done(error: int, payload: memoryview | None) -> None:
            self._leave(length)
            if error or payload is None:
                self._reply(p.NBD_CMD_READ, cookie, _read_error(error))
                return
            self._counters.reads += 1
            self._counters.read_bytes += length
            self._add_payload(header, payload)

        self._guarded(lambda: self._io.read(offset, length, done), lambda: done(errno.EIO, None))

    def _read_sparse(self, cookie: int, offset: int, length: int) -> None:
        returned = False

        def mapped(error: int, extents: list[Extent] | None) -> None:
            if returned:
                self._sparse = False  # the map is not at hand here: asking costs more than it saves
            pieces = [] if error or extents is None else codec.merge_extents(extents, length, _PIECES_MAX)
            if not any(piece.allocation & Allocation.ZERO for piece in pieces):
                self._read_whole(cookie, offset, length, try_now=True)
                return
            covered = sum(piece.length for piece in pieces)
            if covered < length:
                pieces.append(Extent(length - covered, Allocation.DATA))
            self._read_pieces(cookie, offset, length, pieces)

        self._guarded(lambda: self._io.extents(offset, length, mapped), lambda: mapped(errno.EIO, None))
        returned = True

    def _read_pieces(self, cookie: int, offset: int, length: int, pieces: list[Extent]) -> None:
        """Answer a READ chunk by chunk; chunks may go out in any order."""
        left = len(pieces)
        failure = 0

        def finish(error: int, chunk: Callable[[bool], None]) -> None:
            nonlocal left, failure
            left -= 1
            failure = failure or error
            if left == 0:
                self._leave(length)
            if failure:
                if left == 0:
                    self._reply(p.NBD_CMD_READ, cookie, _read_error(failure))
                return
            if left == 0:
                self._counters.reads += 1
                self._counters.read_bytes += length
            chunk(left == 0)

        def hole(at: int, size: int) -> None:
            finish(0, lambda done: self._add(codec.encode_hole(cookie, at, size, done=done)))

        def data(at: int, size: int) -> None:
            def read(error: int, payload: memoryview | None) -> None:
                def chunk(done: bool) -> None:
                    if payload is not None:
                        self._add_payload(codec.encode_data_header(cookie, at, size, done=done), payload)

                finish(error or (errno.EIO if payload is None else 0), chunk)

            self._guarded(lambda: self._io.read(at, size, read), lambda: read(errno.EIO, None))

        at = offset
        for piece in pieces:
            (hole if piece.allocation & Allocation.ZERO else data)(at, piece.length)
            at += piece.length

    def _begin_write(self, cookie: int, flags: int, offset: int, length: int, error: int) -> bool:
        """Take the payload; return whether all of it was in the receive buffer."""
        at = self._input_start
        available = min(length, self._input_end - at)
        if error:
            if length > DISCARDED_PAYLOAD_MAX_BYTES:
                self._violated(f"a WRITE of {length} bytes")
                return False
            self._discard_bytes = length
            self._discarded = lambda: self._reply(p.NBD_CMD_WRITE, cookie, error)
            return self._discard()
        buffer = self._pool.take(length)
        buffer[:available] = self._input_view[at : at + available]
        self._input_start += available
        if available == length:
            self._write(cookie, flags, offset, length, buffer)
            return True
        self._sink = buffer[available:length]
        self._sink_filled = lambda: self._write(cookie, flags, offset, length, buffer)
        self._input_start = self._input_end = 0
        return False

    def _discard(self) -> bool:
        """Drop payload from the receive buffer; return whether all of it was there."""
        dropped = min(self._discard_bytes, self._input_end - self._input_start)
        self._input_start += dropped
        self._discard_bytes -= dropped
        if self._discard_bytes:
            return False
        discarded, self._discarded = self._discarded, None
        if discarded is not None:
            discarded()
        return True

    def _write(self, cookie: int, flags: int, offset: int, length: int, buffer: memoryview) -> None:
        if self._fenced:
            self._pool.give(buffer)
            self._reply(p.NBD_CMD_WRITE, cookie, p.NBD_ESHUTDOWN)
            return
        self._enter(length)

        def done(error: int) -> None:
            self._pool.give(buffer)
            self._leave(length)
            if not error:
                self._counters.writes += 1
                self._counters.written_bytes += length
            self._reply(p.NBD_CMD_WRITE, cookie, _plain_error(error))

        fua = bool(flags & p.NBD_CMD_FLAG_FUA)
        self._guarded(lambda: self._io.write(offset, buffer[:length], done, fua=fua), lambda: done(errno.EIO))

    def _block_status(self, cookie: int, flags: int, offset: int, length: int) -> None:
        self._enter(0)
        maximum = 1 if flags & p.NBD_CMD_FLAG_REQ_ONE else EXTENTS_MAX

        def done(error: int, extents: list[Extent] | None) -> None:
            self._leave(0)
            merged = codec.merge_extents(extents or [], length, maximum)
            if error or not merged:
                self._reply(p.NBD_CMD_BLOCK_STATUS, cookie, _read_error(error))
                return
            self._counters.others += 1
            self._add(codec.encode_block_status(cookie, codec.CONTEXT_ID, merged))

        self._guarded(lambda: self._io.extents(offset, length, done), lambda: done(errno.EIO, None))

    def _run_other(self, command: int, flags: int, cookie: int, offset: int, length: int) -> None:
        self._enter(0)
        fua = bool(flags & p.NBD_CMD_FLAG_FUA)
        fast = bool(flags & p.NBD_CMD_FLAG_FAST_ZERO)

        def done(error: int) -> None:
            self._leave(0)
            if not error:
                self._counters.others += 1
            self._reply(command, cookie, codec.wire_error(error) if fast else _plain_error(error))

        def begin() -> None:
            if command == p.NBD_CMD_FLUSH:
                self._io.flush(done)
            elif command == p.NBD_CMD_TRIM:
                self._io.trim(offset, length, done, fua=fua)
            elif command == p.NBD_CMD_CACHE:
                self._io.cache(offset, length, done)
            else:
                punch = not flags & p.NBD_CMD_FLAG_NO_HOLE
                self._io.zero(offset, length, done, punch=punch, fast=fast, fua=fua)

        self._guarded(begin, lambda: done(errno.EIO))

    def _guarded(self, begin: Callable[[], None], failed: Callable[[], None]) -> None:
        """Run `begin`; a command that raises before it started is a bug in a layer, not the end of a connection."""
        try:
            begin()
        except Exception:
            log.exception("export %r: a command failed in an unforeseen way", self._export.name)
            failed()

    def _enter(self, length: int) -> None:
        self._in_flight += 1
        self._in_flight_bytes += length
        self._counters.in_flight += 1

    def _leave(self, length: int) -> None:
        self._in_flight -= 1
        self._in_flight_bytes -= length
        self._counters.in_flight -= 1
        if self._in_flight:
            return
        for waiter in self._idle_waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._idle_waiters.clear()
        if self._phase is _Phase.CLOSED:
            self._loop.call_soon(self._on_ended)

    # Sending

    def _reply(self, command: int, cookie: int, error: int) -> None:
        """Answer without a payload. READ and BLOCK_STATUS errors are chunks once structured replies are agreed."""
        if error:
            self._counters.errors += 1
            if self._structured and command in (p.NBD_CMD_READ, p.NBD_CMD_BLOCK_STATUS):
                self._add(codec.encode_error_chunk(cookie, error))
                return
        self._add(codec.encode_simple_reply(cookie, error))

    def _add(self, data: bytes) -> None:
        if self._phase is not _Phase.CLOSED:
            self._output.add(data)
            self._schedule_push()

    def _add_payload(self, header: bytes, payload: memoryview) -> None:
        if self._phase is _Phase.CLOSED:
            return
        try:
            self._output.add_payload(header, payload)
        except OSError:
            self._close()
            return
        self._schedule_push()

    def _schedule_push(self) -> None:
        """Gather the replies of one turn of the loop into one send."""
        if not self._parsing and not self._push_scheduled:
            self._push_scheduled = True
            self._loop.call_soon(self._scheduled_push)

    def _scheduled_push(self) -> None:
        self._push_scheduled = False
        self._push()

    def _push(self) -> bool:
        """Send what the socket takes; return whether nothing is left."""
        if self._phase is _Phase.CLOSED:
            return False
        try:
            sent = self._output.push()
        except OSError:
            self._close()
            return False
        if sent == self._blocked:
            self._blocked = not sent
            if sent:
                self._loop.remove_writer(self._socket)
            else:
                self._loop.add_writer(self._socket, self._push)
        if sent and self._phase is _Phase.DRAINING and not self._in_flight:
            self._close()
        elif sent and not self._reading and not self._resume_scheduled and not self._saturated():
            self._resume_scheduled = True
            self._loop.call_soon(self._resume)
        return sent

    def _resume(self) -> None:
        self._resume_scheduled = False
        self._parse()


def _commands(features: Feature, read_only: bool, *, structured: bool, block_status: bool) -> dict[int, int]:
    """Return the command flags that each command may have; commands that are not served are absent."""
    flags = codec.transmission_flags(features, read_only=read_only, structured=structured)
    commands = {p.NBD_CMD_READ: p.NBD_CMD_FLAG_DF if structured else 0, p.NBD_CMD_WRITE: 0}
    if flags & p.NBD_FLAG_SEND_FLUSH:
        commands[p.NBD_CMD_FLUSH] = 0
    if flags & p.NBD_FLAG_SEND_TRIM:
        commands[p.NBD_CMD_TRIM] = 0
    if flags & p.NBD_FLAG_SEND_CACHE:
        commands[p.NBD_CMD_CACHE] = 0
    if flags & p.NBD_FLAG_SEND_WRITE_ZEROES:
        fast = p.NBD_CMD_FLAG_FAST_ZERO if flags & p.NBD_FLAG_SEND_FAST_ZERO else 0
        commands[p.NBD_CMD_WRITE_ZEROES] = p.NBD_CMD_FLAG_NO_HOLE | fast
    if block_status:
        commands[p.NBD_CMD_BLOCK_STATUS] = p.NBD_CMD_FLAG_REQ_ONE
    if flags & p.NBD_FLAG_SEND_FUA:  # then every command may carry it
        commands = {command: allowed | p.NBD_CMD_FLAG_FUA for command, allowed in commands.items()}
    return commands


def _plain_error(number: int) -> int:
    """Return the NBD error for an errno where ENOTSUP is not allowed (only a fast WRITE_ZEROES may earn it)."""
    error = codec.wire_error(number)
    return p.NBD_EINVAL if error == p.NBD_ENOTSUP else error


def _read_error(number: int) -> int:
    return _plain_error(number) or p.NBD_EIO
