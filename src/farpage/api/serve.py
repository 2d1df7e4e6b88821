"""Runs a control API on UNIX sockets and TCP ports, in a thread with an event loop of its own.

So neither plane stalls the other: a slow request does not delay pages, and a busy
data plane does not make the daemon look dead.
"""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import struct
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from farpage.address import Address, TcpAddress, UnixAddress
from farpage.api.framework import FastAPI, Request
from farpage.api.sockets import listen_tcp, listen_unix, remove_own_socket
from farpage.api.tls import needed, server_context

SHUTDOWN_SECONDS = 5
"""So long a request in progress may take to finish when the daemon stops."""

KEEP_ALIVE_SECONDS = 600
"""An idle connection stays open longer than the client keeps it, so no request meets a closing one."""


@dataclass(frozen=True)
class Peer:
    """Who is at the other end of a UNIX socket (SO_PEERCRED, unix(7))."""

    pid: int
    uid: int


class _Server(uvicorn.Server):
    """uvicorn's server without its loop that wakes ten times a second to see whether it is to end."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._told_to_exit = asyncio.Event()

    async def main_loop(self) -> None:
        """Wait until `exit_soon`; answers are dated by the protocol, which that loop did beside."""
        self._loop = asyncio.get_running_loop()
        if not self.should_exit:
            await self._told_to_exit.wait()

    def exit_soon(self) -> None:
        """Have it end when the requests in progress are answered. Safe to call from any thread."""
        # In this order, and `main_loop` in the other one: whichever comes first, the other sees it.
        self.should_exit = True
        if self._loop is not None:
            with suppress(RuntimeError):  # the loop is closed, since it has ended by itself
                self._loop.call_soon_threadsafe(self._told_to_exit.set)


class _Protocol(H11Protocol):
    """Dates the answers, and puts a UNIX socket's peer where ASGI has a client's address, which it lacks."""

    def data_received(self, data: bytes) -> None:
        date = (b"date", formatdate(time.time(), usegmt=True).encode())
        self.server_state.default_headers = [date, *self.config.encoded_headers]
        super().data_received(data)

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        connection = transport.get_extra_info("socket")
        if connection is not None and connection.family == socket.AF_UNIX:
            pid, uid, _gid = struct.unpack(
                "3i", connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
            )
            self.client = (f"uid:{uid}", pid)


def peer_of(request: Request) -> Peer | None:
    """Return who sent the request; None where the connection does not tell."""
    client: Any = request.client
    if client is None or not client.host.startswith("uid:"):
        return None
    return Peer(pid=client.port, uid=int(client.host.removeprefix("uid:")))


class ControlServer:
    """Serves `app` at the addresses from `start` until `stop`: UNIX sockets, and TCP ports with mutual TLS.

    The requests' coroutines run in the thread's loop, not in the caller's: they reach
    the caller's with `asyncio.run_coroutine_threadsafe`.

    :raise InvalidInput: there is a TCP port among the addresses and no folder `tls` of certificates.
    :raise CertificatesUnusable: its certificates cannot be used.
    """

    def __init__(self, app: FastAPI, addresses: Sequence[Address], tls: Path | None = None) -> None:
        self._addresses = tuple(addresses)
        self._unix = _server(app, None)
        self._tls: _Server | None = None
        for address in addresses:
            if isinstance(address, TcpAddress) and self._tls is None:
                self._tls = _server(app, server_context(needed(tls, address, field="control")))
        self._listeners: list[_Listener] = []
        self._thread: threading.Thread | None = None

    @property
    def addresses(self) -> tuple[Address, ...]:
        """Where it listens, in the order given; of a TCP port 0 the one that it has got."""
        return tuple(listener.address for listener in self._listeners)

    async def start(self) -> None:
        """Listen; requests are accepted when this returns. It listens at all addresses or at none.

        :raise AddressInUse: a running process has one; a dead one's UNIX socket is replaced.
        :raise InvalidInput: an address cannot be used.
        """
        try:
            for address in self._addresses:
                self._listeners.append(_Listener(address))
        except BaseException:
            self._close()
            raise
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        asyncio.run(self._serve())

    async def _serve(self) -> None:
        unix = [listener.socket for listener in self._listeners if isinstance(listener.address, UnixAddress)]
        tcp = [listener.socket for listener in self._listeners if isinstance(listener.address, TcpAddress)]
        serving = [self._unix.serve(sockets=unix)] if unix else []
        if self._tls is not None:
            serving.append(self._tls.serve(sockets=tcp))
        await asyncio.gather(*serving)

    async def stop(self) -> None:
        """Finish the requests in progress and stop; the socket files are gone after it."""
        if self._thread is None:
            return
        for server in (self._unix, self._tls):
            if server is not None:
                server.exit_soon()
        # The caller's loop must go on: requests in progress may wait for it.
        await asyncio.to_thread(self._thread.join)
        self._thread = None
        self._close()

    def _close(self) -> None:
        for listener in self._listeners:
            listener.close()
        self._listeners.clear()


class _Listener:
    def __init__(self, address: Address) -> None:
        self._inode = 0
        if isinstance(address, UnixAddress):
            self.socket = listen_unix(address.path)
            self._inode = os.lstat(address.path).st_ino
            self.address: Address = address
        else:
            self.socket = listen_tcp(address)
            self.address = TcpAddress(address.host, self.socket.getsockname()[1])

    def close(self) -> None:
        if isinstance(self.address, UnixAddress):
            remove_own_socket(self.socket, self.address.path, self._inode)
        else:
            self.socket.close()


def _server(app: FastAPI, context: ssl.SSLContext | None) -> _Server:
    config = uvicorn.Config(
        app,
        http=_Protocol,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE_SECONDS,
        timeout_graceful_shutdown=SHUTDOWN_SECONDS,
    )
    # uvicorn would make a context of file names, which may also speak older TLS.
    config.load()
    config.ssl = context
    return _Server(config)
