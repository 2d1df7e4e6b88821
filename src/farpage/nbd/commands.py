"""Carries the commands of one server connection out on its export's BlockIO and words their replies.

What needs no waiting was answered before it came here (transmission.py), so this is written for clarity.
"""

from __future__ import annotations

import errno
import logging
from collections.abc import Callable
from typing import Final, NamedTuple, Protocol

from farpage.blockio import Allocation, BlockLimits, Extent, Feature
from farpage.nbd import codec, options
from farpage.nbd import protocol as p
from farpage.nbd.export import Export

SPARSE_READ_MIN_BYTES: Final = 32 << 10
"""Reads from this length on are answered with hole chunks where the export knows its holes."""
INLINE_MAX_BYTES: Final = 256 << 10
"""READs up to this length may be answered without becoming commands."""
EXTENTS_MAX: Final = 4096
"""Extents in one BLOCK_STATUS reply."""
_PIECES_MAX: Final = 64
"""Chunks of one READ's reply; what comes after that many extents is sent as data."""
_CHANGING: Final = frozenset({p.NBD_CMD_WRITE, p.NBD_CMD_TRIM, p.NBD_CMD_WRITE_ZEROES})

log = logging.getLogger(__name__)


class Request(NamedTuple):
    """A request's header after its magic number."""

    flags: int
    command: int
    cookie: int
    offset: int
    length: int


class Replies(Protocol):
    """Where replies go."""

    def add(self, data: bytes) -> None:
        """Send a reply, or a chunk of one."""

    def add_payload(self, header: bytes, payload: memoryview) -> None:
        """Send a header and the payload after it, which is valid during this call only."""

    def add_now(self, header: bytes, length: int, fill: Callable[[memoryview], bool]) -> bool:
        """Send a header and `length` bytes that `fill` writes into place, if there is room and it can."""


class Commands:
    """The commands in flight of one connection."""

    def __init__(
        self,
        export: Export,
        replies: Replies,
        *,
        structured_replies: bool,
        block_status: bool,
        on_idle: Callable[[], None],
    ) -> None:
        """Prepare. `on_idle` is called whenever the last command in flight has finished."""
        self.fenced = False
        self.in_flight = 0
        self.in_flight_bytes = 0
        """Lengths of the READs and WRITEs in flight."""
        self.limits: BlockLimits = options.advertised_limits(export.io.limits)
        features = export.io.features
        self.misaligned = self.limits.minimum - 1
        """Bits that no offset and no length may have."""
        self._sparse = structured_replies and Feature.EXTENTS in features
        self.inline_max_bytes = self._longest_inline()
        """READs without flags up to this length may be answered without becoming commands."""
        self._export = export
        self._io = export.io
        self._size_bytes = export.io.size_bytes
        self._counters = export.counters
        self._replies = replies
        self._structured = structured_replies
        self._on_idle = on_idle
        self._flags_of_command = _served(
            features, read_only=export.io.read_only, structured=structured_replies, block_status=block_status
        )

    def fence(self) -> None:
        """From now on answer every command with ESHUTDOWN before it reaches the BlockIO."""
        self.fenced = True
        self.inline_max_bytes = self._longest_inline()

    def _longest_inline(self) -> int:
        if self.fenced:
            return 0
        return min(SPARSE_READ_MIN_BYTES - 1 if self._sparse else INLINE_MAX_BYTES, self.limits.maximum)

    def check(self, request: Request) -> int:
        """Return the NBD error that a request earns before it is tried, or 0 ("Error values")."""
        if self.fenced:
            return p.NBD_ESHUTDOWN
        command, length = request.command, request.length
        changes = command in _CHANGING
        allowed = self._flags_of_command.get(command)
        # Lengths that cost no memory (TRIM, WRITE_ZEROES, BLOCK_STATUS) are as long as the client likes.
        bounded = command in (p.NBD_CMD_READ, p.NBD_CMD_WRITE, p.NBD_CMD_CACHE)
        error = p.NBD_EINVAL
        if changes and self._io.read_only:
            error = p.NBD_EPERM
        elif allowed is None or request.flags & ~allowed:
            pass
        elif command == p.NBD_CMD_FLUSH:
            error = p.NBD_EINVAL if request.offset or length else 0
        elif length == 0 or (request.offset | length) & self.misaligned:
            pass
        elif request.offset + length > self._size_bytes:
            error = p.NBD_ENOSPC if changes and command != p.NBD_CMD_TRIM else p.NBD_EINVAL
        elif not bounded or length <= self.limits.maximum:
            error = 0
        return error

    def refuse(self, request: Request, error: int) -> None:
        """Answer a request that `check` or a fence stopped."""
        self._reply(request, error)

    def run(self, request: Request) -> None:
        """Start a command that `check` passed and that has no payload."""
        if request.command == p.NBD_CMD_READ:
            self._read(request)
        elif request.command == p.NBD_CMD_BLOCK_STATUS:
            self._block_status(request)
        else:
            self._run_other(request)

    def write(self, request: Request, data: memoryview, on_finished: Callable[[], None]) -> None:
        """Start a WRITE that `check` passed; `data` must stay until `on_finished` is called."""
        if self.fenced:  # meanwhile
            on_finished()
            self.refuse(request, p.NBD_ESHUTDOWN)
            return
        self._enter(request.length)

        def done(error: int) -> None:
            on_finished()
            if not error:
                self._counters.writes += 1
                self._counters.written_bytes += request.length
            self._reply(request, _plain_error(error))
            self._leave(request.length)

        fua = bool(request.flags & p.NBD_CMD_FLAG_FUA)
        self._guarded(lambda: self._io.write(request.offset, data, done, fua=fua), lambda: done(errno.EIO))

    # READ

    def _read(self, request: Request) -> None:
        self._enter(request.length)
        unfragmented = request.flags & p.NBD_CMD_FLAG_DF
        if self._sparse and request.length >= SPARSE_READ_MIN_BYTES and not unfragmented:
            self._read_sparse(request)
        else:
            self._read_whole(request)

    def _read_whole(self, request: Request) -> None:
        _, _, cookie, offset, length = request
        header = (
            codec.encode_data_header(cookie, offset, length, done=True)
            if self._structured
            else codec.encode_simple_reply(cookie)
        )

        def done(error: int, payload: memoryview | None) -> None:
            if error or payload is None:
                self._reply(request, _read_error(error))
            else:
                self._count_read(length)
                self._replies.add_payload(header, payload)
            self._leave(length)

        self._guarded(lambda: self._io.read(offset, length, done), lambda: done(errno.EIO, None))

    def _read_sparse(self, request: Request) -> None:
        _, _, cookie, offset, length = request
        returned = False

        def mapped(error: int, extents: list[Extent] | None) -> None:
            if returned:
                self._sparse = False  # the map is not at hand here: asking costs more than it saves
                self.inline_max_bytes = self._longest_inline()
            pieces = [] if error or extents is None else codec.merge_extents(extents, length, _PIECES_MAX)
            if any(piece.allocation & Allocation.ZERO for piece in pieces):
                covered = sum(piece.length for piece in pieces)
                if covered < length:
                    pieces.append(Extent(length - covered, Allocation.DATA))
                _PiecewiseRead(self, request, pieces).start()
                return
            header = codec.encode_data_header(cookie, offset, length, done=True)
            if self._replies.add_now(header, length, lambda into: self._io.read_now(offset, into)):
                self._count_read(length)
                self._leave(length)
            else:
                self._read_whole(request)

        self._guarded(lambda: self._io.extents(offset, length, mapped), lambda: mapped(errno.EIO, None))
        returned = True

    def _count_read(self, length: int) -> None:
        self._counters.reads += 1
        self._counters.read_bytes += length

    # The others

    def _block_status(self, request: Request) -> None:
        flags, _, cookie, offset, length = request
        maximum = 1 if flags & p.NBD_CMD_FLAG_REQ_ONE else EXTENTS_MAX
        self._enter(0)

        def done(error: int, extents: list[Extent] | None) -> None:
            merged = codec.merge_extents(extents or [], length, maximum)
            if error or not merged:
                self._reply(request, _read_error(error))
            else:
                self._counters.others += 1
                self._replies.add(codec.encode_block_status(cookie, codec.CONTEXT_ID, merged))
            self._leave(0)

        self._guarded(lambda: self._io.extents(offset, length, done), lambda: done(errno.EIO, None))

    def _run_other(self, request: Request) -> None:
        flags, command, _, offset, length = request
        fua = bool(flags & p.NBD_CMD_FLAG_FUA)
        fast = bool(flags & p.NBD_CMD_FLAG_FAST_ZERO)
        self._enter(0)

        def done(error: int) -> None:
            if not error:
                self._counters.others += 1
            self._reply(request, codec.wire_error(error) if fast else _plain_error(error))
            self._leave(0)

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

    # Common

    def _guarded(self, begin: Callable[[], None], failed: Callable[[], None]) -> None:
        """Run `begin`; what raises before it started is a bug in a layer, not the end of a connection."""
        try:
            begin()
        except Exception:
            log.exception("export %r: a command failed in an unforeseen way", self._export.name)
            failed()

    def _enter(self, length: int) -> None:
        self.in_flight += 1
        self.in_flight_bytes += length
        self._counters.in_flight += 1

    def _leave(self, length: int) -> None:
        self.in_flight -= 1
        self.in_flight_bytes -= length
        self._counters.in_flight -= 1
        if not self.in_flight:
            self._on_idle()

    def _reply(self, request: Request, error: int) -> None:
        """Answer without a payload; errors of READ and BLOCK_STATUS are chunks where those were agreed."""
        if error:
            self._counters.errors += 1
            if self._structured and request.command in (p.NBD_CMD_READ, p.NBD_CMD_BLOCK_STATUS):
                self._replies.add(codec.encode_error_chunk(request.cookie, error))
                return
        self._replies.add(codec.encode_simple_reply(request.cookie, error))


class _PiecewiseRead:
    """A READ answered chunk by chunk, in whichever order the pieces are read."""

    def __init__(self, commands: Commands, request: Request, pieces: list[Extent]) -> None:
        self._commands = commands
        self._request = request
        self._pieces = pieces
        self._left = len(pieces)
        self._error = 0

    def start(self) -> None:
        at = self._request.offset
        for piece in self._pieces:
            if piece.allocation & Allocation.ZERO:
                self._finish_hole(at, piece.length)
            else:
                self._read_data(at, piece.length)
            at += piece.length

    def _finish_hole(self, at: int, length: int) -> None:
        done = self._one_finished(0)
        if not self._error:
            hole = codec.encode_hole(self._request.cookie, at, length, done=done)
            self._commands._replies.add(hole)
        self._end_if(done)

    def _read_data(self, at: int, length: int) -> None:
        def finished(error: int, payload: memoryview | None) -> None:
            done = self._one_finished(error or (0 if payload is not None else errno.EIO))
            if not self._error and payload is not None:
                header = codec.encode_data_header(self._request.cookie, at, length, done=done)
                self._commands._replies.add_payload(header, payload)
            self._end_if(done)

        io = self._commands._io
        self._commands._guarded(lambda: io.read(at, length, finished), lambda: finished(errno.EIO, None))

    def _one_finished(self, error: int) -> bool:
        """Count a piece; return whether it was the last one."""
        self._left -= 1
        self._error = self._error or error
        return self._left == 0

    def _end_if(self, done: bool) -> None:
        if not done:
            return
        if self._error:  # chunks that went out before do not matter: an error voids the whole reply
            self._commands._reply(self._request, _read_error(self._error))
        else:
            self._commands._count_read(self._request.length)
        self._commands._leave(self._request.length)


def _served(features: Feature, *, read_only: bool, structured: bool, block_status: bool) -> dict[int, int]:
    """Return the flags that each command may have; commands that are not served are absent."""
    flags = options.transmission_flags(features, read_only=read_only, structured=structured)
    served = {p.NBD_CMD_READ: p.NBD_CMD_FLAG_DF if structured else 0, p.NBD_CMD_WRITE: 0}
    if flags & p.NBD_FLAG_SEND_FLUSH:
        served[p.NBD_CMD_FLUSH] = 0
    if flags & p.NBD_FLAG_SEND_TRIM:
        served[p.NBD_CMD_TRIM] = 0
    if flags & p.NBD_FLAG_SEND_CACHE:
        served[p.NBD_CMD_CACHE] = 0
    if flags & p.NBD_FLAG_SEND_WRITE_ZEROES:
        fast = p.NBD_CMD_FLAG_FAST_ZERO if flags & p.NBD_FLAG_SEND_FAST_ZERO else 0
        served[p.NBD_CMD_WRITE_ZEROES] = p.NBD_CMD_FLAG_NO_HOLE | fast
    if block_status:
        served[p.NBD_CMD_BLOCK_STATUS] = p.NBD_CMD_FLAG_REQ_ONE
    if flags & p.NBD_FLAG_SEND_FUA:  # then every command may carry it
        served = {command: allowed | p.NBD_CMD_FLAG_FUA for command, allowed in served.items()}
    return served


def _plain_error(number: int) -> int:
    """Return the NBD error for an errno; ENOTSUP is for fast WRITE_ZEROES only."""
    error = codec.wire_error(number)
    return p.NBD_EINVAL if error == p.NBD_ENOTSUP else error


def _read_error(number: int) -> int:
    return _plain_error(number) or p.NBD_EIO
