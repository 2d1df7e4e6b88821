"""The server's transmission phase on one connection: the data plane's hot path.

One receive takes as many requests as the socket holds, all of them are parsed together, and all that can be
answered at once leaves in one send. A READ first asks the BlockIO for bytes that are at hand (`read_now`),
straight into the outgoing area; only what needs waiting becomes a command in flight.

Memory is bounded: nothing more is read from the socket while the commands in flight, or the replies that the
other end does not take, are over their limits.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import socket
from collections.abc import Callable
from typing import Final

from farpage.kernel.buffers import AlignedPool
from farpage.kernel.memory import AlignedBuffer
from farpage.nbd import codec, eventloop
from farpage.nbd import protocol as p
from farpage.nbd.commands import Commands, Request
from farpage.nbd.crossing import Crossing, Held
from farpage.nbd.directpath import RESERVE_BYTES, WRITE_MAX_BYTES
from farpage.nbd.export import Export
from farpage.nbd.fastpath import Settings
from farpage.nbd.outgoing import AREA_BYTES, Outgoing

RECEIVE_BYTES: Final = WRITE_MAX_BYTES + RESERVE_BYTES + 4096
COMMANDS_IN_FLIGHT_MAX: Final = 2048
PAYLOAD_IN_FLIGHT_MAX_BYTES: Final = 64 << 20
"""Reading stops when commands in flight move this much; one more maximum-sized command may be over it."""
DISCARDED_PAYLOAD_MAX_BYTES: Final = 64 << 20
"""A refused WRITE's payload is read and dropped up to this length; a longer one ends the connection."""
LINGER_SECONDS: Final = 10.0
"""How long a connection that ends may take to finish its commands' replies."""

_RECEIVES_MAX: Final = 8
"""Receives in one turn of the loop, so that a busy client does not keep the others waiting."""
TURN_COST_MAX: Final = 64
"""Requests of one connection that are answered in one turn of the loop before others have theirs."""
_COST_SHIFT: Final = 14
"""A long READ counts as one more request for each 16 KiB."""
_GATHERED_BYTES: Final = 32 << 10
"""Replies are gathered over several receives up to here: waking the other end for each few costs it more
than it gains by having them early."""
_REQUEST_BYTES: Final = codec.REQUEST.size
_DATA_HEADER_BYTES: Final = codec.DATA_CHUNK.size
_SIMPLE_HEADER_BYTES: Final = codec.SIMPLE_REPLY.size
_unpack_request = codec.REQUEST_IN_WORDS.unpack_from
_PLAIN_READ: Final = p.NBD_REQUEST_MAGIC << 32 | p.NBD_CMD_READ
"""First word of a READ without flags."""
_pack_data = codec.DATA_CHUNK.pack_into
_pack_simple = codec.SIMPLE_REPLY.pack_into

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
        """Prepare; `start` begins.

        `on_ended` is called once, when the socket is closed and no command is in flight.
        """
        self._loop = loop
        self._socket = sock
        self._export = export
        self._read_now = export.io.read_now
        self._size_bytes = export.io.size_bytes
        self._receive_into = sock.recv_into
        self._send = sock.send
        self._pool = pool
        self._structured = structured_replies
        self._header_bytes = _DATA_HEADER_BYTES if structured_replies else _SIMPLE_HEADER_BYTES
        self._on_ended = on_ended
        self._commands = Commands(
            export,
            self,
            structured_replies=structured_replies,
            block_status=block_status,
            on_idle=self._on_idle,
        )

        self._phase = _Phase.OPEN
        self._reading = False
        self._scheduled = False
        """Whether `_push` has something to look after although there may be nothing to send."""
        self._cost_left = TURN_COST_MAX
        """What this connection may still do in this turn of the loop."""
        self._parsing = False
        self._gathering = False
        """Whether whoever called will push."""
        self._blocked = False
        self._push_scheduled = False
        self._resume_scheduled = False
        self._linger: asyncio.TimerHandle | None = None
        self._idle_waiters: list[asyncio.Future[None]] = []

        self._input = bytearray(RECEIVE_BYTES)
        self._input_view = memoryview(self._input)
        self._input_start = 0
        self._input_end = 0
        self._sink: memoryview | None = None
        """Rest of the payload that is being received into `_sink_buffer`."""
        self._sink_buffer: AlignedBuffer | None = None
        self._sink_filled: Callable[[], None] | None = None
        self._discard_bytes = 0
        self._discarded: Callable[[], None] | None = None
        self._output = Outgoing(sock)

        self._crossing = Crossing(
            export,
            sock.fileno(),
            (self._input, self._output.area),
            Settings(
                structured_replies,
                export.io.size_bytes,
                self._commands.misaligned,
                min(WRITE_MAX_BYTES, self._commands.limits.maximum),
            ),
            self._back_from_lane,
        )
        self._entering = False
        """Whether the connection goes over to its lane as soon as nothing is in flight."""

    # Life

    def start(self, leftover: bytes = b"") -> None:
        """Begin to serve; `leftover` are bytes that were received along with the handshake."""
        self._input[: len(leftover)] = leftover
        self._input_end = len(leftover)
        self._resume_reading()
        if leftover:
            self._parse()
        self._consider_lane()

    @property
    def in_flight(self) -> int:
        """Commands of this connection that the BlockIO has not finished."""
        return self._commands.in_flight

    @property
    def in_flight_past_counters(self) -> int:
        """Requests that the device has not ended and that the counters do not tell of: those of the lane."""
        return self._crossing.in_flight

    def fence(self) -> None:
        """Answer every further command with ESHUTDOWN."""
        self._commands.fence()
        self._crossing.stop()
        if self._commands.in_flight:
            self._export.on_given_up()

    async def wait_idle(self) -> None:
        """Return when no command is in flight."""
        if self._commands.in_flight or self._crossing.in_lane:
            waiter: asyncio.Future[None] = self._loop.create_future()
            self._idle_waiters.append(waiter)
            await waiter

    def disconnect(self) -> None:
        """Send what can be sent at once and close the socket; commands in flight go on in the BlockIO."""
        if self._phase is not _Phase.CLOSED:
            if not self._crossing.in_lane:
                with contextlib.suppress(OSError):
                    self._output.push()
            self._close()

    def _drain(self) -> None:
        """Read no more; close when everything is answered."""
        self._scheduled = True
        if self._phase is _Phase.OPEN:
            self._phase = _Phase.DRAINING
            self._stop_reading()
            self._linger = self._loop.call_later(LINGER_SECONDS, self._close)
            self._schedule_push()

    def _close(self) -> None:
        if self._phase is _Phase.CLOSED:
            return
        self._phase = _Phase.CLOSED
        self._scheduled = True
        if self._crossing.in_lane:
            # The descriptor must not become another's while the lane uses it.
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            self._crossing.stop()
            return
        self._let_go()

    def _let_go(self) -> None:
        """Close the socket, which nobody uses any more."""
        self._stop_reading()
        if self._linger is not None:
            self._linger.cancel()
        if self._blocked:
            self._loop.remove_writer(self._socket)
            self._blocked = False
        self._output.clear()
        self._sink = self._sink_filled = self._discarded = None
        if self._sink_buffer is not None:
            self._pool.give(self._sink_buffer)
            self._sink_buffer = None
        self._socket.close()
        self._crossing.close()
        if self._commands.in_flight:
            self._export.on_given_up()
        else:
            self._loop.call_soon(self._on_ended)

    def _on_idle(self) -> None:
        self._wake_waiters()
        if self._phase is _Phase.CLOSED:
            self._loop.call_soon(self._on_ended)

    def _wake_waiters(self) -> None:
        for waiter in self._idle_waiters:
            if not waiter.done():
                waiter.set_result(None)
        self._idle_waiters.clear()

    def _violated(self, reason: str) -> None:
        log.warning("export %r: hanging up on a client: %s", self._export.name, reason)
        self.disconnect()

    # Over to a thread of its own, and back (crossing.py)

    def _consider_lane(self) -> None:
        """Have the connection go over to a lane, if there is one for it and it suits what is asked for."""
        if self._entering or not self._crossing.worthwhile:
            return
        if self._phase is _Phase.OPEN and not self._commands.fenced and self._reading:
            self._entering = self._scheduled = True
            self._stop_reading()
            self._loop.call_soon(self._enter_lane)

    def _enter_lane(self) -> None:
        if not self._entering or self._phase is not _Phase.OPEN or self._commands.in_flight or self._output:
            return  # what is in flight comes back to `_push`
        self._entering = False
        commands = self._commands
        if (
            commands.fenced
            or self._sink is not None
            or self._discard_bytes
            or not self._crossing.enter(self._input_start, self._input_end, commands.inline_max_bytes)
        ):
            self._crossing.suited_requests = 0
            self._resume()

    def _back_from_lane(self, held: Held | None) -> None:
        """Go on in the event loop."""
        if self._phase is _Phase.CLOSED or held is None:
            self._phase = _Phase.CLOSED
            self._wake_waiters()
            self._let_go()
            return
        self._input_start, self._input_end, self._output.start, self._output.end = held
        self._resume_reading()
        self._resume()
        if not self._commands.in_flight:
            self._wake_waiters()

    # Receiving

    def _resume_reading(self) -> None:
        if not self._reading and self._phase is _Phase.OPEN:
            eventloop.add_reader(self._loop, self._socket, self._on_readable)
            self._reading = True

    def _stop_reading(self) -> None:
        if self._reading:
            eventloop.remove_reader(self._loop, self._socket)
            self._reading = False

    def _on_readable(self) -> None:
        """Serve what has come."""
        self._scheduled = False
        self._cost_left = TURN_COST_MAX
        first = 0
        if not self._input_end and self._sink is None and not self._discard_bytes:
            try:
                first = self._receive_into(self._input)
            except (BlockingIOError, InterruptedError):
                return
            except OSError:
                self._close()
                return
            if first == _REQUEST_BYTES and self._answer_one():
                self._consider_lane()
                return
            if not first:
                self._drain()
                return
        self._gathering = True
        received = 0
        try:
            for _ in range(_RECEIVES_MAX):
                if first:
                    more, self._input_end, first = first, first, 0
                    self._parse()
                else:
                    more = self._receive()
                received += more
                # A client that has several requests under way has probably sent more meanwhile: asking costs
                # less than waiting to be told. One that sends a request at a time has not.
                if not more or received < 2 * _REQUEST_BYTES or not self._reading:
                    break
        finally:
            self._gathering = False
        if self._output.end or self._scheduled:
            self._push()
        self._consider_lane()

    def _answer_one(self) -> bool:
        """Answer the one request that has come, if it is a READ of what is at hand and nothing is before it.

        A client that waits for each reply makes a turn of the loop for each page, so this is what `_parse`,
        `_parse_requests` and `_push` do in such a turn and no more.
        """
        commands, output = self._commands, self._output
        word, cookie, offset, length = _unpack_request(self._input, 0)
        start = self._header_bytes
        stop = start + length
        if (
            word != _PLAIN_READ
            or not 0 < length <= commands.inline_max_bytes
            or offset + length > self._size_bytes
            or (offset | length) & commands.misaligned
            or output.end
            or output.queued_bytes
            or not self._read_now(offset, output.view[start:stop])
        ):
            return False
        if self._structured:
            _pack_data(output.area, 0, p.NBD_STRUCTURED_REPLY_MAGIC, 1, 1, cookie, length + 8, offset)
        else:
            _pack_simple(output.area, 0, p.NBD_SIMPLE_REPLY_MAGIC, 0, cookie)
        self._crossing.suited_requests += 1
        counters = self._export.counters
        counters.reads += 1
        counters.read_bytes += length
        try:
            sent = self._send(output.view[:stop])
        except BlockingIOError:
            sent = 0
        except OSError:
            self._close()
            return True
        if sent < stop:
            output.start, output.end = sent, stop
            self._push()
        return True

    def _receive(self) -> int:
        """Receive once and carry out what came; return the bytes received."""
        try:
            if self._sink is None:
                received = self._receive_into(self._input_view[self._input_end :])
            else:
                received = self._socket.recvmsg_into((self._sink, self._input_view))[0]
        except (BlockingIOError, InterruptedError):
            return 0
        except OSError:
            self._close()
            return 0
        if not received:
            self._drain()
            return 0
        of_input = received
        if self._sink is not None:
            if received < len(self._sink):
                self._sink = self._sink[received:]
                return received
            of_input -= len(self._sink)
            self._sink = self._sink_buffer = None
        self._input_end += of_input
        self._parse()
        return received

    def _parse(self) -> None:
        """Carry out the requests in the receive buffer, as far as the limits allow, but none of a lane."""
        if self._parsing or self._phase is not _Phase.OPEN or self._entering or self._crossing.in_lane:
            return
        self._parsing = True
        try:
            if self._sink is None and self._sink_filled is not None:
                self._scheduled = True
                filled, self._sink_filled = self._sink_filled, None
                filled()
            if self._parse_requests():
                left = self._input_end - self._input_start
                if left and self._input_start:  # a part of a header
                    self._input[:left] = self._input[self._input_start : self._input_end]
                self._input_start, self._input_end = 0, left
                if not self._reading:
                    self._resume_reading()
            else:
                self._stop_reading()
        except Exception:
            log.exception("export %r: a request failed in an unforeseen way", self._export.name)
            self._close()
        finally:
            self._parsing = False
        if not self._gathering or self._output.end >= _GATHERED_BYTES:
            self._push()

    def _parse_requests(self) -> bool:
        """Return whether everything whole in the receive buffer was carried out."""
        if self._discard_bytes:
            self._scheduled = True
            if not self._discard():
                return True
        if self._saturated():
            return False
        commands, output = self._commands, self._output
        buffer, view, area = self._input, output.view, output.area
        read_now, size_bytes, structured = self._read_now, self._size_bytes, self._structured
        header_bytes = self._header_bytes
        misaligned, inline_max = commands.misaligned, commands.inline_max_bytes
        position = self._input_start
        reads = read_bytes = 0
        cost_left = self._cost_left
        going = True
        while going and self._input_end - position >= _REQUEST_BYTES:
            if cost_left <= 0:
                self._scheduled = True  # `_push` sees to it that this goes on after the others
                going = False
                break
            word, cookie, offset, length = _unpack_request(buffer, position)
            if (
                word == _PLAIN_READ
                and 0 < length <= inline_max
                and offset + length <= size_bytes
                and not (offset | length) & misaligned
            ):
                at = output.end
                start = at + header_bytes
                stop = start + length
                if stop > AREA_BYTES:
                    going = self._push()
                    continue
                if read_now(offset, view[start:stop]):
                    if structured:
                        _pack_data(area, at, p.NBD_STRUCTURED_REPLY_MAGIC, 1, 1, cookie, length + 8, offset)
                    else:
                        _pack_simple(area, at, p.NBD_SIMPLE_REPLY_MAGIC, 0, cookie)
                    output.end = stop
                    reads += 1
                    read_bytes += length
                    position += _REQUEST_BYTES
                    cost_left -= 1 + (length >> _COST_SHIFT)
                    continue
            self._input_start = position + _REQUEST_BYTES
            if word >> 32 != p.NBD_REQUEST_MAGIC:
                self._violated("a request does not begin with NBD_REQUEST_MAGIC")
                going = False
            else:
                cost_left -= 1
                going = self._begin(Request(word >> 16 & 0xFFFF, word & 0xFFFF, cookie, offset, length))
            position = self._input_start
        self._input_start, self._cost_left = position, cost_left
        self._crossing.suited_requests += reads
        self._export.counters.reads += reads
        self._export.counters.read_bytes += read_bytes
        return going or self._sink is not None or self._discard_bytes > 0

    def _saturated(self) -> bool:
        commands = self._commands
        return (
            self._output.queued_bytes > 0
            or commands.in_flight >= COMMANDS_IN_FLIGHT_MAX
            or commands.in_flight_bytes >= PAYLOAD_IN_FLIGHT_MAX_BYTES
        )

    def _begin(self, request: Request) -> bool:
        """Start one command; return whether the next one may be parsed."""
        self._scheduled = True
        if request.command == p.NBD_CMD_DISC:
            self._drain()
            return False
        error = self._commands.check(request)
        crossing = self._crossing
        suits = not error and not request.flags and crossing.suits(request.command, request.length)
        crossing.suited_requests = crossing.suited_requests + 1 if suits else 0
        if request.command == p.NBD_CMD_WRITE:
            if not self._begin_write(request, error):
                return False
        elif error:
            self._commands.refuse(request, error)
        else:
            self._commands.run(request)
        return self._phase is _Phase.OPEN and not self._saturated()

    def _begin_write(self, request: Request, error: int) -> bool:
        """Take the payload; return whether all of it was in the receive buffer."""
        length = request.length
        if error:
            if length > DISCARDED_PAYLOAD_MAX_BYTES:
                self._violated(f"a WRITE of {length} bytes")
                return False
            self._discard_bytes = length
            self._discarded = lambda: self._commands.refuse(request, error)
            return self._discard()
        at = self._input_start
        available = min(length, self._input_end - at)
        buffer = self._pool.take(length)
        content = buffer.view[:length]
        content[:available] = self._input_view[at : at + available]

        def filled() -> None:
            self._commands.write(request, content, lambda: self._pool.give(buffer))

        if available == length:
            self._input_start += length
            filled()
            return True
        self._sink_buffer = buffer
        self._sink = content[available:]
        self._sink_filled = filled
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

    # Sending: `Replies` for the commands

    def add(self, data: bytes) -> None:
        """Send a reply, or a chunk of one."""
        if self._phase is not _Phase.CLOSED:
            self._output.add(data)
            self._schedule_push()

    def add_payload(self, header: bytes, payload: memoryview) -> None:
        """Send a header and the payload after it."""
        if self._phase is _Phase.CLOSED:
            return
        try:
            self._output.add_payload(header, payload)
        except OSError:
            self._close()
            return
        self._schedule_push()

    def add_now(self, header: bytes, length: int, fill: Callable[[memoryview], bool]) -> bool:
        """Send a header and `length` bytes that `fill` writes into place, if there is room and it can."""
        output = self._output
        if self._phase is _Phase.CLOSED or not output.room(len(header) + length):
            return False
        start = output.end + len(header)
        if not fill(output.view[start : start + length]):
            return False
        output.area[output.end : start] = header
        output.end = start + length
        self._schedule_push()
        return True

    def _schedule_push(self) -> None:
        """Gather the replies to what is finished by now into one send."""
        if not self._parsing and not self._push_scheduled:
            self._push_scheduled = True
            eventloop.defer(self._loop, self._scheduled_push)

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
        if not sent:
            return False
        if self._phase is _Phase.DRAINING and not self._commands.in_flight:
            self._close()
        elif self._entering:
            if not self._commands.in_flight:
                self._loop.call_soon(self._enter_lane)
        elif not self._reading and not self._resume_scheduled and not self._saturated():
            self._resume_scheduled = self._scheduled = True
            self._loop.call_soon(self._resume)
        return True

    def _resume(self) -> None:
        self._resume_scheduled = False
        self._cost_left = TURN_COST_MAX
        self._parse()
