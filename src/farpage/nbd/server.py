"""An NBD server on UNIX and TCP sockets: listening, handshakes, connections, fencing."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import select
import socket
from collections.abc import Callable, Coroutine, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Protocol

from farpage.address import Address, TcpAddress, UnixAddress
from farpage.blockio import Lent
from farpage.errors import ExitStatus, FarpageError
from farpage.kernel.buffers import AlignedPool
from farpage.nbd import negotiation as n
from farpage.nbd import protocol as p
from farpage.nbd.errors import ExportRefused
from farpage.nbd.export import Export, ExportInfo, ExportProvider, Peer
from farpage.nbd.listening import BACKLOG, listen, prepare
from farpage.nbd.transmission import Transmission

HANDSHAKE_TIMEOUT_SECONDS: Final = 10.0
CONNECTIONS_MAX: Final = 4096
_ACCEPT_PAUSE_SECONDS: Final = 0.1
_RECEIVE_BYTES: Final = 4096
_OUT_OF_DESCRIPTORS: Final = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

log = logging.getLogger(__name__)


@dataclass(eq=False)
class ListenFailed(FarpageError):
    """An address cannot be listened on."""

    code = "listen_failed"
    template = "cannot listen on {address}: {reason}"
    remedy = "stop whoever uses the address, or choose another one"
    exit_status = ExitStatus.CONFLICT
    address: str
    reason: str


class HandOver(Protocol):
    """Hands clients over to another process, which serves them with `Server.adopt`."""

    async def __call__(self, sock: socket.socket, step: n.Enter, agreed: n.Agreed, peer: Peer) -> bool:
        """Hand a client over that asks for an export; False for one that is to be served here.

        On return of True it has got its answer there, and the socket is the other process' own.

        :raise ExportRefused: it does not get the export; the client is still here and may ask on.
        :raise OSError: it is not known what has become of the client.
        """


class ServerConnection:
    """One client, from accept until its socket is closed and its commands are finished."""

    def __init__(self, server: Server, sock: socket.socket, peer: Peer) -> None:
        self.peer = peer
        self.export: Export | None = None
        """The export, from the moment the provider opened it."""
        self.asked = ""
        """Name of the export that the provider is asked for at this moment; empty at any other."""
        self._server = server
        self._socket = sock
        self._transmission: Transmission | None = None
        self._hung_up = False
        self._fenced = False
        self._lent: Lent | None = None
        self._pidfd = -1
        self._closed = asyncio.Event()

    @property
    def closed(self) -> bool:
        """Whether the socket is closed; commands may still be in flight."""
        return self._socket.fileno() < 0

    @property
    def left(self) -> bool:
        """Whether the client has hung up, or was; what it has asked for may still be under way."""
        if self.closed:
            return True
        poll = select.poll()
        poll.register(self._socket, select.POLLRDHUP)
        return bool(poll.poll(0))

    @property
    def in_flight(self) -> int:
        """Commands that the export's BlockIO has not finished."""
        return self._transmission.in_flight if self._transmission else 0

    @property
    def in_flight_past_counters(self) -> int:
        """Requests under way that the counters do not tell of. Safe to look at from any thread."""
        return self._transmission.in_flight_past_counters if self._transmission else 0

    def disconnect(self) -> None:
        """Close the socket now. Commands in flight go on in the BlockIO; `wait_closed` waits for them."""
        self._hung_up = True
        if self._transmission:
            self._transmission.disconnect()
        else:
            with contextlib.suppress(OSError):  # wakes the handshake up, which then closes
                self._socket.shutdown(socket.SHUT_RDWR)

    async def wait_closed(self) -> None:
        """Return when the socket is closed, nothing is in flight and the export has been given back."""
        await self._closed.wait()

    async def fence(self) -> None:
        """Answer further commands with ESHUTDOWN, wait for those in flight, then disconnect."""
        self._fenced = True
        if self._transmission:
            self._transmission.fence()
            await self._transmission.wait_idle()
        self.disconnect()

    async def _serve(self) -> None:
        """Shake hands and serve; never raises."""
        await self._serve_from(self._negotiate())

    async def adopt(self, step: n.Enter, agreed: n.Agreed) -> None:
        """Answer a client that has come to `step` in another process, and begin the transmission.

        :raise ExportRefused: it does not get the export, and nothing was sent; the socket is closed here.
        """
        refused: list[ExportRefused] = []
        await self._serve_from(self._resume(step, agreed, refused.append))
        if refused:
            raise refused[0]

    async def _resume(
        self, step: n.Enter, agreed: n.Agreed, refused: Callable[[ExportRefused], None]
    ) -> n.Negotiation | None:
        negotiation = n.Negotiation.resumed(agreed)
        self.asked = step.name
        try:
            answer = await self._enter(negotiation, step)
        except ExportRefused as refusal:
            refused(refusal)
            return None
        finally:
            self.asked = ""
        deadline = asyncio.get_running_loop().time() + self._server.handshake_timeout_seconds
        await self._send(answer.data, deadline)
        self._let_go_of_lent()
        return negotiation

    async def _serve_from(self, handshake: Coroutine[Any, Any, n.Negotiation | None]) -> None:
        """Run the handshake and begin the transmission; never raises."""
        try:
            negotiation = await handshake
            if negotiation is not None and not self._hung_up:
                self._begin_transmission(negotiation)
                return
        except (OSError, TimeoutError) as error:
            log.debug("client %s: the handshake ended: %s", self.peer.address, error or "it took too long")
        except Exception:
            log.exception("client %s: the handshake failed in an unforeseen way", self.peer.address)
        self._let_go_of_lent()
        self._socket.close()
        self._ended()

    def _begin_transmission(self, negotiation: n.Negotiation) -> None:
        assert self.export is not None
        transmission = Transmission(
            asyncio.get_running_loop(),
            self._socket,
            self.export,
            self._server.pool,
            structured_replies=negotiation.structured_replies,
            block_status=negotiation.block_status,
            on_ended=self._ended,
        )
        if self._fenced:
            transmission.fence()
        self._transmission = transmission
        transmission.start(negotiation.leftover)

    def _ended(self) -> None:
        export = self.export
        if export is not None:
            try:
                export.on_closed()
            except Exception:
                log.exception("export %r: giving it back failed", export.name)
        self._server._forget(self)
        self._closed.set()

    async def _negotiate(self) -> n.Negotiation | None:
        """Return the finished negotiation; None if the client went away or had to."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._server.handshake_timeout_seconds
        negotiation = n.Negotiation()
        await self._send(n.GREETING, deadline)
        while not self._hung_up:
            step = negotiation.next_step()
            if step is None:
                # The deadline is not set over the provider's work, so that no open is cut off half-way.
                async with asyncio.timeout_at(deadline):
                    data = await loop.sock_recv(self._socket, _RECEIVE_BYTES)
                if not data:
                    return None
                negotiation.feed(data)
                continue
            answer = await self._answer(negotiation, step)
            if answer is None:
                return None
            await self._send(answer.data, deadline)
            self._let_go_of_lent()
            if isinstance(answer, n.HangUp):
                if answer.reason:
                    log.info("client %s: hung up: %s", self.peer.address, answer.reason)
                return None
            if self.export is not None:
                return negotiation
        return None

    async def _send(self, data: bytes, deadline: float) -> None:
        """Send, with the first byte the descriptors that the answer tells of, if any."""
        if along := [d for d in (self._pidfd, self._lent.descriptor if self._lent else -1) if d >= 0]:
            # The socket is empty: the client has waited for the answers to all that it has sent.
            with contextlib.suppress(BlockingIOError):
                data = data[socket.send_fds(self._socket, [data], along) :]
        async with asyncio.timeout_at(deadline):
            await asyncio.get_running_loop().sock_sendall(self._socket, data)

    async def _lend(self, step: n.Enter, export: Export) -> Lent | None:
        """Open the storage of the export for a client that asks for it, once more and read-only."""
        if export.lend is None or not step.wants_descriptor or self._socket.family != socket.AF_UNIX:
            return None
        self._lent = await export.lend()
        if self._fenced or self._hung_up:
            self._let_go_of_lent()
        return self._lent

    def _let_go_of_lent(self) -> None:
        lent, self._lent = self._lent, None
        if lent is not None:
            lent.close()
        pidfd, self._pidfd = self._pidfd, -1
        if pidfd >= 0:
            os.close(pidfd)

    def _told(self) -> bool | None:
        """Open this process' pidfd for a client of another one; None where this one listens itself."""
        if not self._server.adopts:
            return None
        with contextlib.suppress(OSError):
            self._pidfd = os.pidfd_open(os.getpid())
        return self._pidfd >= 0

    async def _answer(self, negotiation: n.Negotiation, step: n.Step) -> n.Reply | n.HangUp | None:
        """Return what to send; None when the client was handed over."""
        provider = self._server.provider
        match step:
            case n.Reply() | n.HangUp():
                return step
            case n.ListNames():
                return n.Reply(negotiation.listed(await provider.names(self.peer)))
        self.asked = step.name
        try:
            if self._server.closing:
                raise ExportRefused(p.NBD_REP_ERR_SHUTDOWN, "the server is shutting down")
            if isinstance(step, n.Describe):
                info = await provider.describe(step.name, self.peer)
                return n.Reply(negotiation.described(step, info))
            hand_over = self._server.hand_over
            if hand_over and await hand_over(self._socket, step, negotiation.agreed, self.peer):
                return None
            return await self._enter(negotiation, step)
        except ExportRefused as refusal:
            log.info("client %s: export %r refused: %s", self.peer.address, step.name, refusal.message)
            return negotiation.refused(step, refusal)
        finally:
            self.asked = ""

    async def _enter(self, negotiation: n.Negotiation, step: n.Enter) -> n.Reply:
        # No await between this and the assignment: `Server.fence` must never miss an open export.
        export = self.export = await self._server.provider.open(step.name, self.peer)
        lent, told = await self._lend(step, export), None
        if step.wants_process and self._socket.family == socket.AF_UNIX:
            told = self._told()
        info = ExportInfo.of(export.io, export.description)
        return n.Reply(negotiation.entered(step, info, lent, told=told))


class Server:
    """Serves a provider's exports."""

    def __init__(
        self,
        provider: ExportProvider,
        *,
        handshake_timeout_seconds: float = HANDSHAKE_TIMEOUT_SECONDS,
        connections_max: int = CONNECTIONS_MAX,
        adopts: bool = False,
    ) -> None:
        """Prepare; `start` begins to listen. More clients than `connections_max` are turned away; those whose
        sockets are closed do not count, whatever their commands wait for.

        A server that `adopts` clients of another process tells them which process serves them.
        """
        self.provider = provider
        self.handshake_timeout_seconds = handshake_timeout_seconds
        self.pool = AlignedPool()
        self.closing = False
        self.adopts = adopts
        self.hand_over: HandOver | None = None
        """Asked before an export is opened here."""
        self._connections_max = connections_max
        self._listeners: dict[socket.socket, Address] = {}
        self._connections: set[ServerConnection] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Where it listens; a TCP port asked for as 0 is the one that the kernel chose."""
        return tuple(self._listeners.values())

    @property
    def connections(self) -> tuple[ServerConnection, ...]:
        """Every connection that is not wholly finished."""
        return tuple(self._connections)

    async def start(self, addresses: Iterable[Address]) -> None:
        """Listen on every address, or on none.

        A UNIX socket's file that nobody listens on any more is replaced.

        :raise ListenFailed: naming the address.
        """
        loop = asyncio.get_running_loop()
        try:
            for address in addresses:
                try:
                    listener = listen(address)
                except OSError as error:
                    reason = error.strerror or str(error)
                    raise ListenFailed(str(address), reason) from error
                self._listeners[listener] = (
                    TcpAddress(address.host, listener.getsockname()[1])
                    if isinstance(address, TcpAddress)
                    else address
                )
        except ListenFailed:
            self._stop_listening()
            raise
        for listener in self._listeners:
            loop.add_reader(listener, self._accept, listener)

    async def adopt(self, sock: socket.socket, step: n.Enter, agreed: n.Agreed) -> None:
        """Serve a client that another process has accepted; takes the socket over.

        On return it has got the export, or is gone.

        :raise ExportRefused: it does not get the export; nothing was sent, and the socket is closed here.
        """
        try:
            if self.closing or self._is_full():
                problem = "is shutting down" if self.closing else "has too many connections"
                raise ExportRefused(p.NBD_REP_ERR_SHUTDOWN, f"the server {problem}")
            peer = prepare(sock)
        except OSError:
            sock.close()
            return
        except ExportRefused:
            sock.close()
            raise
        connection = ServerConnection(self, sock, peer)
        self._connections.add(connection)
        await connection.adopt(step, agreed)

    async def close(self) -> None:
        """Stop listening, disconnect everybody, and return when no command is in flight any more."""
        self.closing = True
        self._stop_listening()
        for connection in self.connections:
            connection.disconnect()
        await asyncio.gather(*(connection.wait_closed() for connection in self.connections))

    async def fence(self, predicate: Callable[[Export], bool]) -> None:
        """Cut the exports that match off.

        From the call on none of them starts a command: further ones are answered ESHUTDOWN. On return those
        that were in flight have finished in the BlockIO and the connections are closed: no I/O of theirs can
        reach the device any more. Connections that are opened meanwhile are looked at as well; refusing those
        that are opened later is the provider's part.
        """
        while matching := [c for c in self._connections if c.export is not None and predicate(c.export)]:
            await asyncio.gather(*(connection.fence() for connection in matching))
            await asyncio.gather(*(connection.wait_closed() for connection in matching))

    def _is_full(self) -> bool:
        return (
            len(self._connections) >= self._connections_max
            and sum(not connection.closed for connection in self._connections) >= self._connections_max
        )

    def _forget(self, connection: ServerConnection) -> None:
        self._connections.discard(connection)

    def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        for _ in range(BACKLOG):
            try:
                sock, _ = listener.accept()
            except (BlockingIOError, ConnectionAbortedError, InterruptedError):
                return
            except OSError as error:
                if error.errno not in _OUT_OF_DESCRIPTORS:
                    raise
                log.warning("cannot accept connections for the moment: %s", error.strerror)
                loop.remove_reader(listener)
                loop.call_later(_ACCEPT_PAUSE_SECONDS, self._accept_again, listener)
                return
            if self._is_full():
                log.warning("turned a client away: %d connections are open", self._connections_max)
                sock.close()
                continue
            try:
                peer = prepare(sock)
            except OSError:
                sock.close()
                continue
            connection = ServerConnection(self, sock, peer)
            self._connections.add(connection)
            task = loop.create_task(connection._serve())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _accept_again(self, listener: socket.socket) -> None:
        if listener in self._listeners:
            asyncio.get_running_loop().add_reader(listener, self._accept, listener)

    def _stop_listening(self) -> None:
        loop = asyncio.get_running_loop()
        for listener, address in self._listeners.items():
            loop.remove_reader(listener)
            listener.close()
            if isinstance(address, UnixAddress):
                with contextlib.suppress(OSError):
                    Path(address.path).unlink()
        self._listeners.clear()
