"""Runs a control API on a UNIX socket, in a thread with an event loop of its own.

So neither plane stalls the other: a slow request does not delay pages, and a busy
data plane does not make the daemon look dead.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import threading
from dataclasses import dataclass
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from uvicorn.protocols.http.h11_impl import H11Protocol

from farpage.api.sockets import listen_unix, remove_own_socket

SHUTDOWN_SECONDS = 5
"""So long a request in progress may take to finish when the daemon stops."""

KEEP_ALIVE_SECONDS = 600
"""An idle connection stays open longer than the client keeps it, so no request meets a closing one."""


@dataclass(frozen=True)
class Peer:
    """Who is at the other end of a UNIX socket (SO_PEERCRED, unix(7))."""

    pid: int
    uid: int


class _PeerProtocol(H11Protocol):
    """Puts the peer's credentials where ASGI has the client's address, which a UNIX socket lacks."""

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
    """Serves `app` at the UNIX socket `path` from `start` until `stop`.

    The requests' coroutines run in the thread's loop, not in the caller's: they reach
    the caller's with `asyncio.run_coroutine_threadsafe`.
    """

    def __init__(self, app: FastAPI, path: str) -> None:
        self._path = path
        self._server = uvicorn.Server(
            uvicorn.Config(
                app,
                http=_PeerProtocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=SHUTDOWN_SECONDS,
            )
        )
        self._listener: socket.socket | None = None
        self._inode = 0
        self._thread: threading.Thread | None = None

    async def start(self) -> None:
        """Listen; requests are accepted when this returns.

        :raise AddressInUse: a running process has the socket; a dead one's is replaced.
        :raise InvalidInput: the path cannot be used.
        """
        self._listener = listen_unix(self._path)
        self._inode = os.lstat(self._path).st_ino
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        assert self._listener is not None
        asyncio.run(self._server.serve(sockets=[self._listener]))

    async def stop(self) -> None:
        """Finish the requests in progress and stop; the socket file is gone after it."""
        if self._thread is None or self._listener is None:
            return
        self._server.should_exit = True
        # The caller's loop must go on: requests in progress may wait for it.
        await asyncio.to_thread(self._thread.join)
        remove_own_socket(self._listener, self._path, self._inode)
        self._thread = self._listener = None
