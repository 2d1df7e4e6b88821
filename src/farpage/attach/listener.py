"""The hypervisor's side of the attach socket: takes regions in, and notices their end."""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from farpage.api.sockets import listen_unix, remove_own_socket
from farpage.attach.handoff import check_handoff
from farpage.attach.memory import ClientMemory
from farpage.attach.messages import (
    HEADER,
    AttachReply,
    AttachRequest,
    CloseReply,
    CloseRequest,
    Message,
    decode,
    decode_length,
    encode,
    error_document,
)
from farpage.errors import FarpageError, InvalidInput
from farpage.log import get_logger

AttachHandler = Callable[[AttachRequest, ClientMemory], Awaitable[str]]
"""Takes a region in and returns the client's name. It owns the memory's descriptors once it has returned;
when it raises, the listener closes them."""

ClosedHandler = Callable[[str, ClientMemory], Awaitable[None]]
"""Called once for each region taken in: it is no longer used, or its process has ended. Unregisters and
closes the descriptors; the region is told when it returns."""

NamedHandler = Callable[[str, int], Awaitable[None]]
"""Called with a client's name and the peer's process number: that process closes its region of that
name, whose lifeline ended with an older hypervisor."""

REQUEST_TIMEOUT_SECONDS = 5.0
"""How long a connection may take to send its request."""

MAX_PENDING = 64
"""Connections without a complete request; more of them wait in the socket's backlog."""

ACCEPT_RETRY_SECONDS = 0.1

_PASSED_DESCRIPTORS = 2
_PEER_CREDENTIALS = struct.Struct("3i")

_log = get_logger()


@dataclass(eq=False)
class InternalError(FarpageError):
    """A bug; the log has the details."""

    code = "internal_error"
    template = "the hypervisor could not handle the request"
    remedy = "see its log"


class _Disconnected(Exception):
    """The peer closed the connection."""


class AttachListener:
    """Serves the attach socket on the running event loop.

    Hostile peers cost a connection each for at most `REQUEST_TIMEOUT_SECONDS`.
    """

    def __init__(
        self,
        path: str,
        attach: AttachHandler,
        closed: ClosedHandler,
        close_named: NamedHandler | None = None,
    ) -> None:
        self._path = path
        self._attach = attach
        self._closed = closed
        self._close_named = close_named
        self._pending = asyncio.Semaphore(MAX_PENDING)
        self._tasks: set[asyncio.Task[None]] = set()
        self._socket: socket.socket | None = None
        self._inode = 0

    async def start(self) -> None:
        """Listen; only this user and root may connect.

        :raise AddressInUse: or InvalidInput, when the path cannot be used.
        """
        self._socket = listen_unix(self._path)
        self._inode = os.lstat(self._path).st_ino
        self._spawn(self._accept(self._socket))

    async def close(self) -> None:
        """Stop listening and let go of all lifelines; the regions' memory stays with their owner."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        if self._socket is not None:
            remove_own_socket(self._socket, self._path, self._inode)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._pending.acquire()
            try:
                connection, _ = await loop.sock_accept(listener)
            except OSError as error:
                # Out of descriptors or memory; the peer stays in the backlog.
                self._pending.release()
                _log.warning("cannot accept a region", error=str(error))
                await asyncio.sleep(ACCEPT_RETRY_SECONDS)
                continue
            self._spawn(self._serve(connection))

    async def _serve(self, connection: socket.socket) -> None:
        with connection:
            connection.setblocking(False)
            try:
                taken = await self._take_in(connection)
            finally:
                self._pending.release()
            if taken is None:
                return
            name, memory, pidfd = taken
            try:
                asked = await self._wait_for_end(connection, pidfd)
            finally:
                os.close(pidfd)
            reply = await _closing(self._closed(name, memory), name)
            if asked:
                await _send(connection, reply)

    async def _take_in(self, connection: socket.socket) -> tuple[str, ClientMemory, int] | None:
        """Receive and handle one request; None when it was refused, or needs no lifeline.

        The descriptor returned is a pidfd of the region's process, and the caller's. It is not the one of the
        memory, since an event loop has one reader per descriptor and the memory's owner may watch it too.
        """
        descriptors: list[int] = []
        own_pidfd = -1
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_SECONDS):
                body = await _receive_frame(connection, descriptors)
            if (closing := _named_close(body)) is not None:
                await self._serve_named(connection, closing)
                return None
            request = decode(AttachRequest, body)
            pid, pidfd = _peer(connection)
            descriptors.append(pidfd)
            own_pidfd = os.dup(pidfd)
            memory = check_handoff(request, pid, pidfd, descriptors[:-1])
            name = await self._attach_whole(request, memory, descriptors)
            taken_pidfd, own_pidfd = own_pidfd, -1
        except FarpageError as error:
            await _send(connection, AttachReply(ok=False, error=error_document(error)))
            return None
        except (OSError, TimeoutError, _Disconnected):
            return None
        except Exception:
            _log.exception("attaching_failed")
            await _send(connection, AttachReply(ok=False, error=error_document(InternalError())))
            return None
        finally:
            for descriptor in descriptors:
                os.close(descriptor)
            if own_pidfd >= 0:
                os.close(own_pidfd)
        await _send(connection, AttachReply(ok=True, name=name))
        return name, memory, taken_pidfd

    async def _attach_whole(
        self, request: AttachRequest, memory: ClientMemory, descriptors: list[int]
    ) -> str:
        """Attach a region, to the end also while this closes; its descriptors are not the caller's then."""
        attaching = asyncio.ensure_future(self._attach(request, memory))
        try:
            return await asyncio.shield(attaching)
        finally:
            await attaching
            descriptors.clear()

    async def _serve_named(self, connection: socket.socket, name: str) -> None:
        """Let a region go whose lifeline ended with an older hypervisor, if it is paged still."""
        reply = CloseReply(ok=True)
        if self._close_named is not None:
            pid, pidfd = _peer(connection)
            os.close(pidfd)
            reply = await _closing(self._close_named(name, pid), name)
        await _send(connection, reply)

    async def _wait_for_end(self, connection: socket.socket, pidfd: int) -> bool:
        """Wait for the end of the lifeline or of the process; True when the region asked for it.

        A forked child can keep the connection open after its parent's death, hence the pidfd.
        """
        loop = asyncio.get_running_loop()
        asked = loop.create_task(_wait_for_close_request(connection))
        gone = loop.create_task(_readable(pidfd))
        try:
            await asyncio.wait({asked, gone}, return_when=asyncio.FIRST_COMPLETED)
            return asked.done() and asked.result()
        finally:
            asked.cancel()
            gone.cancel()
            await asyncio.gather(asked, gone, return_exceptions=True)


async def _closing(work: Awaitable[None], name: str) -> CloseReply:
    try:
        await work
    except FarpageError as error:
        return CloseReply(ok=False, error=error_document(error))
    except Exception:
        _log.exception("closing a region failed", client=name)
        return CloseReply(ok=False, error=error_document(InternalError()))
    return CloseReply(ok=True)


def _named_close(body: bytes) -> str | None:
    """Return the name in a `CloseRequest` that has one, None for any other body."""
    try:
        return decode(CloseRequest, body).name
    except InvalidInput:
        return None


def _peer(connection: socket.socket) -> tuple[int, int]:
    """Return the peer's process number and a pidfd of it.

    :raise InvalidInput: when it is in a PID namespace that this process cannot see.
    :raise OSError: when it has ended.
    """
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER_CREDENTIALS.size)
    pid: int = _PEER_CREDENTIALS.unpack(credentials)[0]
    if pid <= 0:
        raise InvalidInput(
            "process", "the peer is in another PID namespace", "run the hypervisor in the host's namespace"
        )
    return pid, os.pidfd_open(pid)


async def _readable(descriptor: int) -> None:
    loop = asyncio.get_running_loop()
    future: asyncio.Future[None] = loop.create_future()

    def became_readable() -> None:
        if not future.done():
            future.set_result(None)

    loop.add_reader(descriptor, became_readable)
    try:
        await future
    finally:
        loop.remove_reader(descriptor)


async def _receive_frame(connection: socket.socket, descriptors: list[int]) -> bytes:
    """Receive one frame and not a byte more; descriptors that come with it are appended at once."""
    header = await _receive_exactly(connection, HEADER.size, descriptors)
    return await _receive_exactly(connection, decode_length(header), descriptors)


async def _receive_exactly(connection: socket.socket, length: int, descriptors: list[int]) -> bytes:
    received = bytearray()
    while len(received) < length:
        try:
            data, passed, flags, _ = socket.recv_fds(
                connection, length - len(received), _PASSED_DESCRIPTORS, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            await _readable(connection.fileno())
            continue
        descriptors.extend(passed)
        if len(descriptors) > _PASSED_DESCRIPTORS or flags & socket.MSG_CTRUNC:
            raise InvalidInput("descriptors", "more than two came with the request", "send two")
        if not data:
            raise _Disconnected
        received += data
    return bytes(received)


async def _wait_for_close_request(connection: socket.socket) -> bool:
    """Return True for a close request, False for the end of the connection or of its sense."""
    loop = asyncio.get_running_loop()

    async def receive(length: int) -> bytes:
        received = b""
        while len(received) < length:
            # Without room for ancillary data the kernel closes descriptors that a peer sends.
            part = await loop.sock_recv(connection, length - len(received))
            if not part:
                raise _Disconnected
            received += part
        return received

    try:
        while True:
            body = await receive(decode_length(await receive(HEADER.size)))
            try:
                decode(CloseRequest, body)
            except InvalidInput as error:
                await _send(connection, CloseReply(ok=False, error=error_document(error)))
            else:
                return True
    except (InvalidInput, OSError, _Disconnected):
        return False


async def _send(connection: socket.socket, message: Message) -> None:
    """Send, giving up on a peer that does not read or has gone."""
    with suppress(OSError, TimeoutError):
        async with asyncio.timeout(REQUEST_TIMEOUT_SECONDS):
            await asyncio.get_running_loop().sock_sendall(connection, encode(message))
