"""The client's side of the transmission phase without a socket: the stream of replies to what is in flight.

Whoever owns the socket receives into `buffers()` and calls `received`; finished commands' callbacks run from
there. Every reply is checked against the command that it answers before a byte of it is believed: anything
that the specification forbids raises `ProtocolViolation`, and no callback gets data from it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from functools import partial
from typing import Final

from farpage.blockio import CONNECTION_LOST
from farpage.nbd import codec
from farpage.nbd import protocol as p
from farpage.nbd.codec import ProtocolViolation
from farpage.nbd.inflight import Command

try:
    from farpage.nbd._runs import take_replies
except ImportError:  # there was no compiler
    from farpage.nbd.runs import take_replies

RECEIVE_BYTES: Final = 512 << 10
_SINK_MIN_BYTES: Final = 32 << 10
"""Data chunks from this length on are received straight into the command's own buffer."""
_STATUS_MAX_BYTES: Final = 4 + 8 * 131072
"""QEMU's NBD_MAX_BLOCK_STATUS_EXTENTS, the longest list that a known server sends."""
_ERROR_CHUNK_MAX_BYTES: Final = 64 + 2 * p.STRING_MAX_BYTES
_SIMPLE_BYTES: Final = codec.SIMPLE_REPLY.size
_CHUNK_BYTES: Final = codec.CHUNK.size
_ZEROES: Final = memoryview(bytes(256 << 10))


class ReplyStream:
    """Commands in flight on one connection, finished by what arrives on it."""

    def __init__(
        self, loop: asyncio.AbstractEventLoop, *, structured_replies: bool, context_id: int | None
    ) -> None:
        self.in_flight: dict[int, Command] = {}
        """By cookie, oldest first."""
        self._loop = loop
        self._structured = structured_replies
        self._context_id = context_id
        self._buffer = bytearray(RECEIVE_BYTES)
        self._view = memoryview(self._buffer)
        self._start = 0
        self._end = 0
        self._sink: memoryview | None = None
        """Rest of the payload that is being received straight into its place."""
        self._sink_filled: Callable[[], None] | None = None
        self._stopped = False

    def fail_all(self) -> None:
        """Finish every command with CONNECTION_LOST and ignore what arrives from now on."""
        self._stopped = True
        self._sink = self._sink_filled = None
        commands, self.in_flight = self.in_flight, {}
        for command in commands.values():
            if command.parts:
                self._finish_part(command, CONNECTION_LOST)
            else:
                self._finish(command, CONNECTION_LOST)

    def buffers(self) -> Sequence[memoryview]:
        """Return where the next bytes belong, in this order; never empty."""
        if self._sink is not None:
            return (self._sink, self._view)
        return (self._view[self._end :],)

    def received(self, length: int) -> None:
        """Take `length` bytes that are in `buffers()` now and finish the commands that they complete.

        :raise ProtocolViolation: if they are not what the specification allows.
        """
        if self._sink is not None:
            taken = min(length, len(self._sink))
            self._sink = self._sink[taken:] if taken < len(self._sink) else None
            if self._sink is not None:
                return
            length -= taken
            filled, self._sink_filled = self._sink_filled, None
            if filled is not None:
                filled()
        self._end += length
        self._parse()
        left = self._end - self._start
        if left and self._start:
            self._buffer[:left] = self._buffer[self._start : self._end]
        self._start, self._end = 0, left

    def _parse(self) -> None:
        buffer, view, in_flight = self._buffer, self._view, self.in_flight
        unpack_data = codec.DATA_CHUNK.unpack_from
        unpack_simple = codec.SIMPLE_REPLY.unpack_from
        position, end = self._start, self._end
        try:
            while end - position >= _SIMPLE_BYTES and not self._stopped:
                magic, error, cookie = unpack_simple(buffer, position)
                if magic == p.NBD_SIMPLE_REPLY_MAGIC:
                    command = in_flight.get(cookie)
                    if command is None:
                        raise ProtocolViolation("a reply to no command")
                    if command.command != p.NBD_CMD_READ:
                        position = self._simple(cookie, command, error, position)
                        continue
                    position += _SIMPLE_BYTES
                    taken = self._simple_read(cookie, command, error, position)
                    if taken < 0:  # wait for the rest; a sink has taken over what was here
                        position = 0 if self._sink is not None else position - _SIMPLE_BYTES
                        return
                    position += taken
                    continue
                if magic != p.NBD_STRUCTURED_REPLY_MAGIC or not self._structured:
                    raise ProtocolViolation("a reply does not begin with a magic number that was agreed")
                if end - position < _CHUNK_BYTES:
                    return
                if end - position >= codec.DATA_CHUNK.size:
                    # The one chunk that a page's read is answered with nearly always.
                    _, flags, kind, cookie, length, offset = unpack_data(buffer, position)
                    if kind == 1 and flags & 1 and end - position >= _CHUNK_BYTES + length:
                        command = in_flight.get(cookie)
                        if (
                            command is not None
                            and command.command == 0
                            and command.length == length - 8
                            and command.offset == offset
                            and not command.covered
                            and not command.error
                        ):
                            del in_flight[cookie]
                            start = position + 28
                            position += _CHUNK_BYTES + length
                            self._finish(command, 0, view[start:position])
                            continue
                taken = self._chunk(position)
                if taken < 0:
                    position = 0 if self._sink is not None else position
                    return
                position += taken
        finally:
            self._start = position

    def _simple(self, cookie: int, command: Command, error: int, position: int) -> int:
        """Take the reply at `position`, which is not to a READ; return where the next to be looked at is.

        What comes behind it and answers parts without errors is taken with one that does.
        """
        if command.parts and not error:
            position, ended = take_replies(self._buffer, position, self._end, self.in_flight, command)
            if ended is not None:
                self._finish(ended, ended.error)
            return position
        if command.command == p.NBD_CMD_BLOCK_STATUS:
            raise ProtocolViolation("a simple reply to a BLOCK_STATUS")
        if not command.parts and (command.error or command.covered):
            raise ProtocolViolation("a simple reply after chunks")
        del self.in_flight[cookie]
        if command.parts:
            self._finish_part(command, codec.local_error(error))
        else:
            self._finish(command, codec.local_error(error) if error else 0)
        return position + _SIMPLE_BYTES

    def _simple_read(self, cookie: int, command: Command, error: int, position: int) -> int:
        """Finish a READ whose header ends at `position`; return its payload's length, -1 if incomplete."""
        if self._structured:
            raise ProtocolViolation("a simple reply to a READ although structured replies were agreed")
        if error:
            del self.in_flight[cookie]
            self._finish(command, codec.local_error(error))
            return 0
        available = self._end - position
        if available >= command.length:
            del self.in_flight[cookie]
            self._finish(command, 0, self._view[position : position + command.length])
            return command.length
        if command.length < _SINK_MIN_BYTES:
            return -1

        def filled() -> None:
            self.in_flight.pop(cookie)
            self._finish(command, 0, command.data)

        self._receive_into(command.assembly(), position, available, filled)
        return -1

    def _receive_into(
        self, place: memoryview, position: int, available: int, filled: Callable[[], None]
    ) -> None:
        place[:available] = self._view[position : position + available]
        self._sink = place[available:]
        self._sink_filled = filled
        self._end = 0  # nothing of the receive buffer is needed any more

    def _chunk(self, position: int) -> int:  # noqa: PLR0911 (each is one way in which bytes are missing)
        """Take the chunk at `position`; return its length, -1 if it is incomplete."""
        _, flags, kind, cookie, length = codec.unpack_chunk(self._buffer, position)
        command = self.in_flight.get(cookie)
        if command is None:
            raise ProtocolViolation("a chunk that answers no command")
        if command.parts:
            command = self._taken_apart(cookie, command)
        last = bool(flags & p.NBD_REPLY_FLAG_DONE)
        at = position + _CHUNK_BYTES
        available = self._end - at
        if kind == p.NBD_REPLY_TYPE_OFFSET_DATA:
            if length < 9:
                raise ProtocolViolation("a data chunk without data")
            if available < 8:
                return -1
            (offset,) = codec.U64.unpack_from(self._buffer, at)
            start = self._place(command, int(offset), length - 8)
            whole = available >= length
            if not whole and length < _SINK_MIN_BYTES:
                return -1
            command.cover(start, start + length - 8)
            place = command.assembly()[start : start + length - 8]

            def filled() -> None:
                if last:
                    self._end_reply(cookie, command)

            if not whole:
                self._receive_into(place, at + 8, available - 8, filled)
                return -1
            place[:] = self._view[at + 8 : at + length]
            filled()
            return _CHUNK_BYTES + length
        bound = {
            p.NBD_REPLY_TYPE_NONE: 0,
            p.NBD_REPLY_TYPE_OFFSET_HOLE: 12,
            p.NBD_REPLY_TYPE_BLOCK_STATUS: _STATUS_MAX_BYTES,
        }.get(kind, _ERROR_CHUNK_MAX_BYTES)
        if length > bound:
            raise ProtocolViolation(f"a chunk of type {kind} with {length} bytes")
        if available >= length:
            payload = self._view[at : at + length]
            self._small_chunk(cookie, command, kind, last, payload)
            return _CHUNK_BYTES + length
        if length < RECEIVE_BYTES - _CHUNK_BYTES:
            return -1
        buffer = memoryview(bytearray(length))
        self._receive_into(
            buffer, at, available, lambda: self._small_chunk(cookie, command, kind, last, buffer)
        )
        return -1

    def _place(self, command: Command, offset: int, length: int) -> int:
        """Return where in a READ's range a chunk belongs."""
        start = offset - command.offset
        if command.command != p.NBD_CMD_READ or start < 0 or start + length > command.length:
            raise ProtocolViolation("a chunk with contents that were not asked for")
        return start

    def _small_chunk(self, cookie: int, command: Command, kind: int, last: bool, payload: memoryview) -> None:
        if kind & p.NBD_REPLY_TYPE_FLAG_ERROR:
            error, _ = codec.parse_error_chunk(payload)
            command.error = command.error or codec.local_error(error)
        elif kind == p.NBD_REPLY_TYPE_NONE:
            if not last:
                raise ProtocolViolation("an NBD_REPLY_TYPE_NONE chunk that does not end its reply")
        elif kind == p.NBD_REPLY_TYPE_OFFSET_HOLE:
            self._hole(command, payload)
        elif kind == p.NBD_REPLY_TYPE_BLOCK_STATUS:
            if command.command != p.NBD_CMD_BLOCK_STATUS or command.extents is not None:
                raise ProtocolViolation("a block status that was not asked for")
            context_id, extents = codec.parse_block_status(payload)
            if context_id != self._context_id:
                raise ProtocolViolation(f"a block status of the unknown context {context_id}")
            command.extents = codec.merge_extents(extents, command.length, len(extents))
        else:
            raise ProtocolViolation(f"a chunk of the unknown type {kind}")
        if last:
            self._end_reply(cookie, command)

    def _hole(self, command: Command, payload: memoryview) -> None:
        if len(payload) != 12:
            raise ProtocolViolation("a hole chunk has a wrong length")
        offset, length = codec.HOLE.unpack(payload)
        if length == 0:
            raise ProtocolViolation("an empty hole chunk")
        start = self._place(command, offset, length)
        command.cover(start, start + length)
        if length == command.length and length <= len(_ZEROES):
            command.data = _ZEROES[:length]
        elif command.into is not None:
            command.assembly()[start : start + length] = bytes(length)
        else:
            command.assembly()  # new memory is zeros, and no chunk may fill a range twice

    def _end_reply(self, cookie: int, command: Command) -> None:
        error = command.error
        if not error and command.command == p.NBD_CMD_READ:
            if command.covered != [(0, command.length)]:
                raise ProtocolViolation("a READ's reply ends before all of its contents came")
        elif not error and command.command == p.NBD_CMD_BLOCK_STATUS and command.extents is None:
            raise ProtocolViolation("a BLOCK_STATUS's reply ends without a status")
        del self.in_flight[cookie]
        self._finish(command, error, None if error else command.data)

    def _taken_apart(self, cookie: int, whole: Command) -> Command:
        """Give a WRITE that is answered in chunks a command of its own, which is a part of `whole`."""
        part = Command(whole.command, whole.offset, whole.length, whole.started)
        part.on_done = partial(self._finish_part, whole)
        self.in_flight[cookie] = part
        return part

    def _finish_part(self, command: Command, error: int) -> None:
        command.error = command.error or error
        command.parts -= 1
        if not command.parts:
            self._finish(command, command.error)

    def _finish(self, command: Command, error: int, payload: memoryview | None = None) -> None:
        try:
            command.finish(error, payload)
        except Exception as failure:
            # The stream stays whole whatever a receiver does.
            self._loop.call_exception_handler(
                {"message": "an NBD command's callback raised", "exception": failure}
            )
