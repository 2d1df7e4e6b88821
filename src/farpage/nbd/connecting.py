"""The client's side of the handshake: from an address to a socket in the transmission phase."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

from farpage.address import Address, UnixAddress
from farpage.blockio import BlockLimits, Lent
from farpage.kernel.process import pid_of
from farpage.nbd import codec, options
from farpage.nbd import protocol as p
from farpage.nbd.codec import ProtocolViolation
from farpage.nbd.errors import (
    HandshakeTimedOut,
    ServerRefused,
    ServerUnreachable,
    ServerViolatedProtocol,
)
from farpage.nbd.outgoing import UNIX_SEND_BYTES

_REPLY_MAX_BYTES: Final = 2 * p.STRING_MAX_BYTES + 64
_REPLIES_MAX: Final = 1 << 16
"""Replies to one option: a list of exports has one for each."""
_RECEIVE_BYTES: Final = 4096
_DESCRIPTORS: Final = 2
"""With one answer: the serving process, and the storage."""
_UCRED: Final = struct.Struct("=iII")


@dataclass(frozen=True)
class Negotiated:
    """What both ends agreed on."""

    size_bytes: int
    flags: int
    """NBD_FLAG_* transmission flags."""
    limits: BlockLimits
    structured_replies: bool
    context_id: int | None
    """The server's id for base:allocation; None if block status cannot be asked for."""
    lent: Lent | None = None
    """The export's storage, where the server has lent it."""
    process: ServingProcess | None = None
    """Who carries out the commands, where that may be another process than the one that listens."""


@dataclass(frozen=True)
class ServingProcess:
    """The process that a server has told of; `pid` is None where it cannot be watched from here."""

    pid: int | None


class _OptionRefused(Exception):
    def __init__(self, reply_type: int, message: str) -> None:
        super().__init__(message)
        self.reply_type = reply_type
        self.message = message

    @property
    def reply(self) -> str:
        return p.REP_ERROR_NAMES.get(self.reply_type, f"error reply {self.reply_type & 0x7FFFFFFF}")


async def connect(
    address: Address,
    export: str,
    *,
    handshake_timeout_seconds: float,
    structured_replies: bool = True,
    block_status: bool = True,
    borrow: bool = False,
) -> tuple[socket.socket, Negotiated]:
    """Return a non-blocking socket in the transmission phase and what was agreed on it.

    With `borrow` a server at a UNIX socket is asked for a descriptor of the export's storage.

    :raise ServerUnreachable: nobody listens, or the connection broke.
    :raise HandshakeTimedOut: no end within `handshake_timeout_seconds`.
    :raise ServerRefused: the server does not give out the export.
    :raise ServerViolatedProtocol: this is no NBD server, or not a correct one.
    """

    async with _handshake(address, export, handshake_timeout_seconds) as handshake:
        handshake.local = isinstance(address, UnixAddress)
        handshake.borrows = borrow and handshake.local
        negotiated = await handshake.enter(export, structured=structured_replies, block_status=block_status)
        return handshake.detach(), negotiated


async def list_exports(address: Address, *, handshake_timeout_seconds: float = 10.0) -> list[tuple[str, str]]:
    """Return name and description of every export that the server tells of.

    :raise ConnectFailed: as `connect`; `ServerRefused` where the server does not tell.
    """
    async with _handshake(address, "", handshake_timeout_seconds) as handshake:
        return await handshake.list_exports()


def peer_pid(sock: socket.socket) -> int | None:
    """Return the process that listens at a UNIX socket's other end (SO_PEERCRED, unix(7)); None on TCP."""
    if sock.family != socket.AF_UNIX:
        return None
    pid, _, _ = _UCRED.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size))
    return pid or None


def end_with_dead_peer(sock: socket.socket, seconds: float) -> None:
    """Have the kernel end a TCP connection whose peer acknowledges nothing for so long (tcp(7))."""
    if sock.family == socket.AF_UNIX:
        return
    interval = max(1, round(seconds / 4))
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, interval)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, interval)
    # Counts for probes of an idle connection too, in place of their number.
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(seconds * 1000))


@asynccontextmanager
async def _handshake(address: Address, export: str, timeout_seconds: float) -> AsyncIterator[_Handshake]:
    """Connect and greet; turn a failure into a `ConnectFailed`; close the socket unless it is detached."""
    handshake = None
    where = str(address)
    try:
        async with asyncio.timeout(timeout_seconds):
            handshake = _Handshake(await _connected_socket(address))
            await handshake.greet()
            yield handshake
    except TimeoutError as error:
        raise HandshakeTimedOut(export, where, f"waited {timeout_seconds:g} s") from error
    except EOFError as error:
        raise ServerUnreachable(export, where, "it closed the connection during the handshake") from error
    except OSError as error:
        raise ServerUnreachable(export, where, _reason(error)) from error
    except _OptionRefused as error:
        message = error.message or "it gives no reason"
        raise ServerRefused(export, where, message, error.reply) from error
    except ProtocolViolation as error:
        raise ServerViolatedProtocol(export, where, str(error)) from error
    finally:
        if handshake is not None:
            handshake.close()


def _reason(error: OSError) -> str:
    """Return the kernel's words: asyncio puts its own into the exception of a failed connect."""
    if isinstance(error, socket.gaierror) or not error.errno:
        return error.strerror or str(error)
    return os.strerror(error.errno)


async def _connected_socket(address: Address) -> socket.socket:
    loop = asyncio.get_running_loop()
    if isinstance(address, UnixAddress):
        sock = await _try_to_connect(socket.AF_UNIX, address.path)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, UNIX_SEND_BYTES)
        return sock
    found = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    failure = OSError(errno.EADDRNOTAVAIL, "the name has no address")
    for family, _, _, _, place in found:
        try:
            sock = await _try_to_connect(family, place)
        except OSError as error:
            failure = error
            continue
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        return sock
    raise failure


async def _try_to_connect(family: int, place: object) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(sock, place)  # type: ignore[arg-type]
    except BaseException:
        sock.close()
        raise
    return sock


@dataclass
class _Entered:
    """What a server has said in its answer to NBD_OPT_GO."""

    size: options.ExportSize | None = None
    limits: BlockLimits | None = None
    origin: options.DescriptorOrigin | None = None
    process: options.ProcessTold | None = None


class _Handshake:
    """The dialogue on one socket. Reads nothing longer than a bound and believes nothing unchecked."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket: socket.socket | None = sock
        self._loop = asyncio.get_running_loop()
        self._buffer = bytearray()
        self._fixed = False
        self._no_zeroes = False
        self.local = False
        """The server is on this host: descriptors may come, and which process serves is asked for."""
        self.borrows = False
        """The storage is asked for."""
        self._descriptors: list[int] = []

    def detach(self) -> socket.socket:
        """Return the socket, which `close` then leaves open."""
        assert self._socket is not None
        sock, self._socket = self._socket, None
        return sock

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
        while self._descriptors:
            os.close(self._descriptors.pop())

    async def greet(self) -> None:
        magic, version, flags = options.GREETING.unpack(await self._receive(options.GREETING.size))
        if magic != p.NBDMAGIC:
            raise ProtocolViolation("it does not begin with NBDMAGIC")
        if version == p.CLISERV_MAGIC:
            raise ProtocolViolation("it speaks the old handshake, which is not supported")
        if version != p.IHAVEOPT:
            raise ProtocolViolation("it does not go on with IHAVEOPT")
        self._fixed = bool(flags & p.NBD_FLAG_FIXED_NEWSTYLE)
        self._no_zeroes = bool(flags & p.NBD_FLAG_NO_ZEROES)
        client_flags = (p.NBD_FLAG_C_FIXED_NEWSTYLE if self._fixed else 0) | (
            p.NBD_FLAG_C_NO_ZEROES if self._no_zeroes else 0
        )
        await self._send(options.CLIENT_FLAGS.pack(client_flags))

    async def list_exports(self) -> list[tuple[str, str]]:
        if not self._fixed:
            raise ProtocolViolation("it is too old to list its exports")
        exports: list[tuple[str, str]] = []

        def take(reply_type: int, data: bytes) -> None:
            if reply_type != p.NBD_REP_SERVER:
                raise ProtocolViolation(f"reply {reply_type} to NBD_OPT_LIST")
            exports.append(options.parse_server(data))

        await self._option(p.NBD_OPT_LIST, b"", take)
        await self._send(options.encode_option(p.NBD_OPT_ABORT))
        return exports

    async def enter(self, export: str, *, structured: bool, block_status: bool) -> Negotiated:
        """Agree on as much as both ends can do and enter the transmission phase."""
        context_id = None
        if self._fixed and structured:
            structured = await self._supported(p.NBD_OPT_STRUCTURED_REPLY, b"", _no_reply)
            if structured and block_status:
                context_id = await self._context(export)
        else:
            structured = False
        entered = await self._go(export) if self._fixed else _Entered()
        # Without a size the server knows neither GO nor anything else that could explain itself.
        size, limits = entered.size or await self._export_name(export), entered.limits
        if self._buffer:
            raise ProtocolViolation("bytes after the handshake that answer nothing")
        limits = limits or BlockLimits()
        maximum = min(limits.maximum, p.PAYLOAD_MAX_BYTES)
        return Negotiated(
            size_bytes=size.size_bytes,
            flags=size.flags,
            limits=BlockLimits(limits.minimum, limits.preferred, maximum - maximum % limits.minimum),
            structured_replies=structured,
            context_id=context_id,
            process=self._serving(entered.process),
            lent=self._borrowed(entered.origin),
        )

    def _serving(self, process: options.ProcessTold | None) -> ServingProcess | None:
        """Return who serves; its pidfd comes before every other descriptor."""
        if process is None:
            return None
        if not process.told or not self._descriptors:
            return ServingProcess(None)
        pidfd = self._descriptors.pop(0)
        try:
            return ServingProcess(pid_of(pidfd))
        finally:
            os.close(pidfd)

    def _borrowed(self, origin: options.DescriptorOrigin | None) -> Lent | None:
        if origin is None or not self._descriptors:
            return None
        return Lent(self._descriptors.pop(), origin.origin_bytes)

    async def _context(self, export: str) -> int | None:
        found: list[int] = []

        def take(reply_type: int, data: bytes) -> None:
            if reply_type != p.NBD_REP_META_CONTEXT:
                raise ProtocolViolation(f"reply {reply_type} to NBD_OPT_SET_META_CONTEXT")
            context_id, name = options.parse_meta_context(data)
            if name == p.BASE_ALLOCATION:
                found.append(context_id)

        query = options.encode_context_query(options.ContextQuery(export, (p.BASE_ALLOCATION,)))
        # Any refusal here is left to GO, which says better what is wrong with the export.
        agreed = await self._supported(p.NBD_OPT_SET_META_CONTEXT, query, take, any_error=True)
        return found[0] if agreed and found else None

    async def _go(self, export: str) -> _Entered:
        entered = _Entered()

        def take(reply_type: int, data: bytes) -> None:
            if reply_type != p.NBD_REP_INFO:
                raise ProtocolViolation(f"reply {reply_type} to NBD_OPT_GO")
            information = options.parse_info(data)
            if isinstance(information, options.ExportSize):
                entered.size = information
            elif isinstance(information, BlockLimits):
                entered.limits = information
            elif isinstance(information, options.DescriptorOrigin):
                entered.origin = information
            elif isinstance(information, options.ProcessTold):
                entered.process = information

        wanted = [p.NBD_INFO_BLOCK_SIZE]
        if self.local:
            wanted.append(p.NBD_INFO_PROCESS)
        if self.borrows:
            wanted.append(p.NBD_INFO_DESCRIPTOR)
        request = options.InfoRequest(export, tuple(wanted))
        if not await self._supported(p.NBD_OPT_GO, options.encode_info_request(request), take):
            return _Entered()
        if entered.size is None:
            raise ProtocolViolation("it acknowledged NBD_OPT_GO without NBD_INFO_EXPORT")
        return entered

    async def _export_name(self, export: str) -> options.ExportSize:
        await self._send(options.encode_option(p.NBD_OPT_EXPORT_NAME, options.encode_string(export)))
        try:
            size_bytes, flags = options.EXPORT_NAME_REPLY.unpack(
                await self._receive(options.EXPORT_NAME_REPLY.size)
            )
        except (EOFError, ConnectionResetError):
            # The only way in which NBD_OPT_EXPORT_NAME can be refused.
            raise _OptionRefused(p.NBD_REP_ERR_UNKNOWN, "it closed the connection") from None
        if not self._no_zeroes:
            await self._receive(len(options.EXPORT_NAME_PADDING))
        return options.checked_export_size(size_bytes, flags)

    async def _supported(
        self, option: int, data: bytes, take: Callable[[int, bytes], None], *, any_error: bool = False
    ) -> bool:
        """Return whether the server acknowledged the option, False if it does not know it."""
        try:
            await self._option(option, data, take)
        except _OptionRefused as refusal:
            if any_error or refusal.reply_type == p.NBD_REP_ERR_UNSUP:
                return False
            raise
        return True

    async def _option(self, option: int, data: bytes, take: Callable[[int, bytes], None]) -> None:
        """Send an option and hand every reply before the acknowledgement to `take`."""
        await self._send(options.encode_option(option, data))
        for _ in range(_REPLIES_MAX):
            magic, about, reply_type, length = options.OPTION_REPLY.unpack(
                await self._receive(options.OPTION_REPLY.size)
            )
            if magic != p.NBD_OPTION_REPLY_MAGIC or about != option:
                raise ProtocolViolation("a reply to an option does not match the option")
            if length > _REPLY_MAX_BYTES:
                raise ProtocolViolation(f"a reply to an option of {length} bytes")
            payload = await self._receive(length)
            if reply_type & p.NBD_REP_FLAG_ERROR:
                raise _OptionRefused(reply_type, codec.printable(payload))
            if reply_type == p.NBD_REP_ACK:
                return
            take(reply_type, payload)
        raise ProtocolViolation(f"more than {_REPLIES_MAX} replies to one option")

    async def _send(self, data: bytes) -> None:
        assert self._socket is not None
        await self._loop.sock_sendall(self._socket, data)

    async def _receive(self, length: int) -> bytes:
        assert self._socket is not None
        while len(self._buffer) < length:
            data = await (
                self._receive_descriptors()
                if self.local
                else self._loop.sock_recv(self._socket, _RECEIVE_BYTES)
            )
            if not data:
                raise EOFError
            self._buffer += data
        taken = bytes(self._buffer[:length])
        del self._buffer[:length]
        return taken

    async def _receive_descriptors(self) -> bytes:
        """Receive bytes, and the descriptors that come with them."""
        sock, loop = self._socket, self._loop
        assert sock is not None
        while True:
            try:
                data, descriptors, _, _ = socket.recv_fds(
                    sock, _RECEIVE_BYTES, _DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                readable = loop.create_future()
                loop.add_reader(sock, _set_once, readable)
                try:
                    await readable
                finally:
                    loop.remove_reader(sock)
            else:
                self._descriptors += descriptors
                return data


def _set_once(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _no_reply(reply_type: int, data: bytes) -> None:
    raise ProtocolViolation(f"reply {reply_type} with {len(data)} bytes to an option that has none")
