"""A data worker's end of the conversation with whichever control process there is.

A worker outlives the control process that started it for as long as it has clients. It listens at a socket
in the hypervisor's run folder, named by its process number, where the next control process finds it.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

from farpage.log import get_logger
from farpage.message import Message
from farpage.pager.channel import Answer, Channel, Handler, PeerGone
from farpage.pager.launch import SOCKET_SUFFIX

log = get_logger()

KEPT_EVENTS: Final = 1000
"""Events that wait for the next control process; older ones are dropped."""

_CREDENTIALS: Final = struct.Struct("3i")


class ControlLink:
    """The connection to the control process: at most one, replaced when a new control process comes."""

    def __init__(
        self,
        endpoint: socket.socket,
        folder: Path,
        *,
        on_request: Handler,
        on_alone: Callable[[], None],
    ) -> None:
        """Take over the first connection, and listen in `folder` for later ones.

        `on_alone` is called when the control process has gone.

        :raise OSError: when the socket cannot be made.
        """
        self._on_request = on_request
        self._on_alone = on_alone
        self._loop = asyncio.get_running_loop()
        self._folder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self._name = f"{os.getpid()}{SOCKET_SUFFIX}"
        self._connected = asyncio.Event()
        self._events: deque[tuple[str, Message]] = deque(maxlen=KEPT_EVENTS)
        self._channel: Channel | None = None
        self.met = 0
        """How many control processes have come so far."""
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK)
        with suppress(FileNotFoundError):
            os.unlink(self._name, dir_fd=self._folder)
        self._listener.bind(socket_path(self._folder, self._name))
        self._listener.listen()
        self._loop.add_reader(self._listener, self._accept)
        self._connect(endpoint)

    @property
    def alone(self) -> bool:
        """Whether there is no control process."""
        return self._channel is None

    def tell(self, event: str, parameters: Message) -> None:
        """Send an event to the control process, or to the next one."""
        if self._channel is None:
            self._events.append((event, parameters))
        else:
            self._channel.tell(event, parameters)

    async def call(self, method: str, parameters: Message, answer: type[Answer]) -> Answer:
        """Ask the control process, or the next one when it ends before it has answered; may wait long.

        :raise PeerError: it answered with an error.
        """
        while True:
            await self._connected.wait()
            assert self._channel is not None
            try:
                return await self._channel.call(method, parameters, answer)
            except PeerGone:
                continue

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        if _peer_user(connection) not in (os.geteuid(), 0):
            log.warning("control_process_refused", reason="of another user")
            connection.close()
            return
        self._connect(connection)

    def _connect(self, connection: socket.socket) -> None:
        """Talk to the process at the other end from now on; a lock of the run folder keeps others out."""
        self.met += 1
        before, self._channel = self._channel, None
        if before is not None:
            before.close()
        channel: Channel

        def closed() -> None:
            if self._channel is channel:
                self._channel = None
                self._connected.clear()
                self._on_alone()

        channel = self._channel = Channel(connection, on_request=self._on_request, on_closed=closed)
        self._connected.set()
        while self._events:
            channel.tell(*self._events.popleft())

    def close(self) -> None:
        """End the connection and listen no more."""
        self._loop.remove_reader(self._listener)
        with suppress(OSError):
            os.unlink(self._name, dir_fd=self._folder)
        self._listener.close()
        channel, self._channel = self._channel, None
        if channel is not None:
            channel.close()
        os.close(self._folder)


def socket_path(folder: int, name: str) -> str:
    """Return a path of a socket in an open folder that is short, however long the folder's own is."""
    return f"/proc/self/fd/{folder}/{name}"


def _peer_user(connection: socket.socket) -> int:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    user: int = _CREDENTIALS.unpack(credentials)[1]
    return user
