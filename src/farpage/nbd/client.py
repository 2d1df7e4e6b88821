"""An NBD client: one connection to an export, as a `BlockIO`.

connection = await Connection.open(UnixAddress("/run/farpage/vios-a.sock"), "volume")
connection.on_lost = lambda error: ...
connection.read(0, 4096, done)
connection.push()       # or let the loop's next turn send what was started in this one
"""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable, Sequence
from typing import Final

from farpage.address import Address
from farpage.blockio import (
    CONNECTION_LOST,
    BlockLimits,
    DirectFile,
    Done,
    ExtentsDone,
    Feature,
    Joined,
    Lent,
    ReadDone,
    Run,
    write_each,
)
from farpage.nbd import codec, connecting, eventloop, options
from farpage.nbd import protocol as p
from farpage.nbd.codec import ProtocolViolation
from farpage.nbd.connecting import Negotiated, list_exports
from farpage.nbd.errors import ConnectionEnded
from farpage.nbd.inflight import Command
from farpage.nbd.replies import ReplyStream
from farpage.nbd.runs import Bounds, check_range

try:
    from farpage.nbd._runs import drop_sent, queue_runs
except ImportError:  # there was no compiler
    from farpage.nbd.runs import drop_sent, queue_runs

HANDSHAKE_TIMEOUT_SECONDS: Final = 10.0
_SEGMENTS_MAX: Final = 32
"""Buffers in one sendmsg, and in a turn of the loop: to send 16 pages takes some 35 us, and faults wait."""

__all__ = ["Connection", "list_exports"]


class Connection:
    """One connection to one export. Never blocks; used from one event loop.

    Requests larger than the server's limit are split; a command that the server does not offer finishes
    with ENOTSUP.
    """

    def __init__(
        self, sock: socket.socket, address: Address, export_name: str, negotiated: Negotiated
    ) -> None:
        """Take over a connected non-blocking socket; use `open` to get one."""
        self.address = address
        self.export_name = export_name
        self.on_lost: Callable[[Exception], None] | None = None
        """Called once, before the commands in flight are finished, when the connection ends unasked."""
        self.on_end: Callable[[], None] | None = None
        """Called once, first of all, however the connection ends."""
        self.direct: DirectFile | None = None
        """The storage as this process reads it by itself; whoever has opened the connection sets it."""
        self._loop = asyncio.get_running_loop()
        self._socket = sock
        self._negotiated = negotiated
        limits = negotiated.limits
        self._bounds = Bounds(negotiated.size_bytes, limits.minimum, limits.maximum)
        self._read_only = bool(negotiated.flags & p.NBD_FLAG_READ_ONLY)
        self._features = options.features_of(negotiated.flags)
        if negotiated.context_id is not None:
            self._features |= Feature.EXTENTS
        told = negotiated.process
        self._peer_pid = told.pid if told is not None else connecting.peer_pid(sock)
        self._stream = ReplyStream(
            self._loop,
            structured_replies=negotiated.structured_replies,
            context_id=negotiated.context_id,
        )
        self._cookie = 0
        self._unsent: list[bytes | memoryview] = []
        self._unsent_bytes = 0
        self._has_payload = False
        self._push_scheduled = False
        self._rest_scheduled = False
        self._blocked = False
        self._ended = False
        self._idle: asyncio.Event | None = None
        eventloop.add_reader(self._loop, sock, self._on_readable)

    @classmethod
    async def open(
        cls,
        address: Address,
        export_name: str,
        *,
        handshake_timeout_seconds: float = HANDSHAKE_TIMEOUT_SECONDS,
        dead_peer_seconds: float | None = None,
        structured_replies: bool = True,
        block_status: bool = True,
        borrow: bool = False,
    ) -> Connection:
        """Connect and negotiate. The two flags leave features out although the server may have them.

        With `borrow` a server at a UNIX socket is asked to lend a descriptor of the storage.

        Over TCP the connection ends when the peer's host acknowledges nothing for `dead_peer_seconds`.

        :raise ConnectFailed: as one of `ServerUnreachable`, `HandshakeTimedOut`, `ServerRefused`,
            `ServerViolatedProtocol`.
        """
        sock, negotiated = await connecting.connect(
            address,
            export_name,
            handshake_timeout_seconds=handshake_timeout_seconds,
            structured_replies=structured_replies,
            block_status=block_status,
            borrow=borrow,
        )
        if dead_peer_seconds is not None:
            connecting.end_with_dead_peer(sock, dead_peer_seconds)
        return cls(sock, address, export_name, negotiated)

    # What it is

    @property
    def size_bytes(self) -> int:
        """Size of the export."""
        return self._negotiated.size_bytes

    @property
    def read_only(self) -> bool:
        """Whether the server refuses writes."""
        return self._read_only

    @property
    def limits(self) -> BlockLimits:
        """The server's block size constraints; longer requests are split here."""
        return self._negotiated.limits

    @property
    def features(self) -> Feature:
        """What was negotiated."""
        return self._features

    @property
    def lent(self) -> Lent | None:
        """The storage, if the server has lent it; what nobody takes is closed with the connection."""
        return self._negotiated.lent

    @property
    def structured_replies(self) -> bool:
        """Whether READs are answered in chunks."""
        return self._negotiated.structured_replies

    @property
    def peer_pid(self) -> int | None:
        """Process whose end is that of all that was sent here; None on TCP, and where it is not known.

        That is the one that the server has told of, else the one that listens on the UNIX socket.
        """
        return self._peer_pid

    @property
    def ended(self) -> bool:
        """Whether the connection is gone; further commands finish with CONNECTION_LOST."""
        return self._ended

    @property
    def in_flight(self) -> int:
        """Commands sent, or about to be sent, and not answered."""
        return len(self._stream.in_flight)

    @property
    def oldest_inflight_seconds(self) -> float:
        """Age of the command that has waited longest; 0 if none is in flight."""
        for command in self._stream.in_flight.values():
            return self._loop.time() - command.started
        return 0.0

    # Commands

    def read_now(self, offset: int, into: memoryview) -> bool:
        """Return False: bytes of a server are never at hand."""
        return False

    def read(self, offset: int, length: int, done: ReadDone) -> None:
        """Read; the payload lies in the receive buffer and is valid during `done` only."""
        self._check_range(offset, length)
        if length > self.limits.maximum:
            self._read_parts(offset, length, done)
            return
        command = self._start(p.NBD_CMD_READ, 0, offset, length)
        if command is None:
            done(CONNECTION_LOST, None)
        else:
            command.on_read = done

    def read_into(self, offset: int, into: memoryview, done: Done) -> None:
        """Fill `into`, which is the connection's alone until `done`; what is long is received right there."""
        length = len(into)
        self._check_range(offset, length)
        step = self.limits.maximum
        if length > step:
            joined = Joined(done, -(-length // step))
            for at in range(0, length, step):
                self.read_into(offset + at, into[at : at + step], joined.part_done)
            return
        command = self._start(p.NBD_CMD_READ, 0, offset, length)
        if command is None:
            done(CONNECTION_LOST)
            return

        def arrived(error: int, payload: memoryview | None) -> None:
            if payload is not None and payload is not into:
                into[:] = payload
            done(error)

        command.into = into
        command.on_read = arrived

    def write(self, offset: int, data: memoryview, done: Done, *, fua: bool = False) -> None:
        """Write; `data` is sent from where it is."""
        data = data.cast("B") if data.format != "B" or data.ndim != 1 else data
        length = len(data)
        self._check_range(offset, length)
        flags = p.NBD_CMD_FLAG_FUA if fua else 0
        if not self._allowed(_fua_feature(fua), done, changes=True):
            return
        step = self.limits.maximum
        if length <= step:
            self._command(p.NBD_CMD_WRITE, offset, length, done, flags=flags, payload=data)
            return
        joined = Joined(done, -(-length // step))
        for at in range(0, length, step):
            part = data[at : at + step]
            self._command(
                p.NBD_CMD_WRITE, offset + at, len(part), joined.part_done, flags=flags, payload=part
            )

    def write_runs(self, runs: Sequence[Run], done: Done) -> None:
        """Write several runs, with a command for each; `done` is called when all are finished."""
        if self._read_only or self._ended:
            done(errno.EPERM if self._read_only else CONNECTION_LOST)
            return
        # The replies of all of them are heard by one, which is not done before the last.
        started = Command(p.NBD_CMD_WRITE, 0, 0, self._loop.time())
        started.on_done = done
        queued = queue_runs(
            runs,
            started,
            self._stream.in_flight,
            self._unsent,
            cookie=self._cookie,
            bounds=self._bounds,
        )
        if not queued:
            write_each(self, runs, done)
            return
        self._cookie += len(runs)
        self._unsent_bytes += queued
        self._has_payload = True
        self._push_soon()

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
        """Make the range read as zeros (NBD_CMD_WRITE_ZEROES)."""
        self._check_range(offset, length)
        needed = Feature.ZERO | (Feature.FAST_ZERO if fast else Feature.NONE) | _fua_feature(fua)
        if not self._allowed(needed, done, changes=True):
            return
        flags = (
            (0 if punch else p.NBD_CMD_FLAG_NO_HOLE)
            | (p.NBD_CMD_FLAG_FAST_ZERO if fast else 0)
            | (p.NBD_CMD_FLAG_FUA if fua else 0)
        )
        # Without FAST_ZERO the payload limit holds for zeroing too ("Block size constraints").
        step = self._longest_bytes if fast else self.limits.maximum
        self._split(p.NBD_CMD_WRITE_ZEROES, offset, length, done, step=step, flags=flags)

    def trim(self, offset: int, length: int, done: Done, *, fua: bool = False) -> None:
        """Say that the contents no longer matter (NBD_CMD_TRIM)."""
        self._check_range(offset, length)
        if self._allowed(Feature.TRIM | _fua_feature(fua), done, changes=True):
            flags = p.NBD_CMD_FLAG_FUA if fua else 0
            self._split(p.NBD_CMD_TRIM, offset, length, done, step=self._longest_bytes, flags=flags)

    def cache(self, offset: int, length: int, done: Done) -> None:
        """Ask for the range to be near (NBD_CMD_CACHE)."""
        self._check_range(offset, length)
        if self._allowed(Feature.CACHE, done):
            self._split(p.NBD_CMD_CACHE, offset, length, done, step=self.limits.maximum)

    def flush(self, done: Done) -> None:
        """Put every finished write on stable storage (NBD_CMD_FLUSH)."""
        if self._allowed(Feature.FLUSH, done):
            self._command(p.NBD_CMD_FLUSH, 0, 0, done)

    def extents(self, offset: int, length: int, done: ExtentsDone) -> None:
        """Report the allocation (NBD_CMD_BLOCK_STATUS)."""
        self._check_range(offset, length)
        if Feature.EXTENTS not in self._features:
            done(errno.ENOTSUP, None)
            return
        length = min(length, self._longest_bytes)
        command = self._start(p.NBD_CMD_BLOCK_STATUS, 0, offset, length)
        if command is None:
            done(CONNECTION_LOST, None)
        else:
            command.on_extents = done

    # Sending

    def push(self) -> None:
        """Send what was started, now, as far as the socket takes it; what is much in several turns."""
        if self._blocked or self._ended or self._rest_scheduled:
            return
        try:
            while self._unsent:
                unsent = self._unsent
                if not self._has_payload:
                    data = b"".join(unsent) if len(unsent) > 1 else unsent[0]
                    sent = self._socket.send(data)
                    if sent < len(data):
                        self._unsent = [memoryview(data)[sent:]]
                elif len(unsent) <= _SEGMENTS_MAX:
                    sent = self._socket.sendmsg(unsent)
                else:
                    sent = self._socket.sendmsg(unsent[:_SEGMENTS_MAX])
                self._unsent_bytes -= sent
                if not self._unsent_bytes:
                    self._unsent.clear()
                elif self._has_payload:
                    drop_sent(self._unsent, sent)
                    self._rest_scheduled = True
                    self._loop.call_soon(self._push_rest)
                    return
            self._has_payload = False
        except BlockingIOError:
            self._blocked = True
            self._loop.add_writer(self._socket, self._on_writable)
        except OSError as error:
            self.lose(error.strerror or str(error))

    def _push_rest(self) -> None:
        self._rest_scheduled = False
        self.push()

    def _on_writable(self) -> None:
        self._loop.remove_writer(self._socket)
        self._blocked = False
        self.push()

    def _scheduled_push(self) -> None:
        self._push_scheduled = False
        self.push()

    def _start(self, command: int, flags: int, offset: int, length: int) -> Command | None:
        """Put a command's header into the next send; None if the connection is gone."""
        if self._ended:
            return None
        self._cookie = cookie = self._cookie + 1
        started = Command(command, offset, length, self._loop.time())
        self._stream.in_flight[cookie] = started
        self._unsent.append(codec.encode_request(command, flags, cookie, offset, length))
        self._unsent_bytes += codec.REQUEST.size
        self._push_soon()
        return started

    def _push_soon(self) -> None:
        if not self._push_scheduled:
            self._push_scheduled = True
            eventloop.defer(self._loop, self._scheduled_push)

    def _command(
        self,
        command: int,
        offset: int,
        length: int,
        done: Done,
        *,
        flags: int = 0,
        payload: memoryview | None = None,
    ) -> None:
        started = self._start(command, flags, offset, length)
        if started is None:
            done(CONNECTION_LOST)
            return
        started.on_done = done
        if payload is not None:
            self._unsent.append(payload)
            self._unsent_bytes += len(payload)
            self._has_payload = True

    def _split(
        self, command: int, offset: int, length: int, done: Done, *, step: int, flags: int = 0
    ) -> None:
        """Send a command without payload as as many as its length needs."""
        joined = Joined(done, -(-length // step))
        for at in range(0, length, step):
            part = min(step, length - at)
            self._command(command, offset + at, part, joined.part_done, flags=flags)

    def _read_parts(self, offset: int, length: int, done: ReadDone) -> None:
        whole = memoryview(bytearray(length))
        step = self.limits.maximum
        joined = Joined(lambda error: done(error, None if error else whole), -(-length // step))

        def part(at: int, size: int) -> None:
            def part_read(error: int, payload: memoryview | None) -> None:
                if payload is not None:
                    whole[at : at + size] = payload
                joined.part_done(error)

            self.read(offset + at, size, part_read)

        for at in range(0, length, step):
            part(at, min(step, length - at))

    @property
    def _longest_bytes(self) -> int:
        return p.LENGTH_MAX_BYTES - p.LENGTH_MAX_BYTES % self.limits.minimum

    def _check_range(self, offset: int, length: int) -> None:
        check_range(offset, length, self._bounds.size_bytes, self._bounds.minimum_bytes)

    def _allowed(self, needed: Feature, done: Done, *, changes: bool = False) -> bool:
        """Return whether a command may be sent; else finish it."""
        if changes and self._read_only:
            done(errno.EPERM)
            return False
        if needed not in self._features:
            done(errno.ENOTSUP)
            return False
        return True

    # Receiving

    def _on_readable(self) -> None:
        buffers = self._stream.buffers()
        try:
            if len(buffers) == 1:
                received = self._socket.recv_into(buffers[0])
            else:
                received = self._socket.recvmsg_into(buffers)[0]
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            self.lose(error.strerror or str(error))
            return
        if not received:
            self.lose("the server closed it")
            return
        try:
            self._stream.received(received)
        except ProtocolViolation as violation:
            self.lose(f"the server does not keep to the NBD protocol: {violation}")
            return
        if self._idle is not None and not self._stream.in_flight:
            self._idle.set()

    # End

    async def close(self) -> None:
        """Wait for the commands in flight, tell the server goodbye and close."""
        if self._stream.in_flight and not self._ended:
            self._idle = asyncio.Event()
            self.push()
            await self._idle.wait()
        if not self._ended:
            self._unsent.append(codec.encode_request(p.NBD_CMD_DISC, 0, 0, 0, 0))
            self._unsent_bytes += codec.REQUEST.size
            self.push()
            self.abort()

    def abort(self) -> None:
        """Close at once; commands in flight finish with CONNECTION_LOST. `on_lost` is not called."""
        if self._ended:
            return
        self._end()
        self._stream.fail_all()

    def lose(self, reason: str) -> None:
        """End the connection as if the server had: whoever knows that nothing will come any more says so."""
        if self._ended:
            return
        self._end()
        try:
            if self.on_lost is not None:
                self.on_lost(ConnectionEnded(self.export_name, str(self.address), reason))
        finally:
            self._stream.fail_all()

    def _end(self) -> None:
        self._ended = True
        if self.on_end is not None:
            self.on_end()
        eventloop.remove_reader(self._loop, self._socket)
        if self._blocked:
            self._loop.remove_writer(self._socket)
        self._socket.close()
        if self._negotiated.lent is not None:
            self._negotiated.lent.close()
        self._unsent, self._unsent_bytes = [], 0
        if self._idle is not None:
            self._idle.set()


def _fua_feature(fua: bool) -> Feature:
    return Feature.FUA if fua else Feature.NONE
