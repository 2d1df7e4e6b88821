"""A connection to a control API for what is asked again and again, at a tenth of a general client's cost.

GET alone, one request at a time, and answers as farpage's daemons give them: with their length. Whoever
speaks HTTP otherwise is told apart from a daemon and gets an error.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from dataclasses import dataclass
from typing import Final, Self

from farpage.address import Address, UnixAddress

BODY_BYTES_MAX: Final = 16 << 20
"""No document that is asked for like this comes near it."""

NEXT_ADDRESS_SECONDS: Final = 0.25
"""After so long a host's next address is tried beside the one before (RFC 8305, Connection Attempt Delay)."""

_STATUS = re.compile(rb"HTTP/1\.1 ([1-9][0-9]{2})[ \r]")
_LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]{1,9}) *\r\n", re.IGNORECASE)
_CLOSES = re.compile(rb"\r\nconnection: *close *\r\n", re.IGNORECASE)


class ConnectionBroken(Exception):
    """No answer came, or none that can be read, as the message says; the connection is of no use any more."""


class ConnectionSilent(ConnectionBroken):
    """A connection is there, and no answer came over it in time."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"it accepts connections but has not answered for {seconds:g} s")


class NotConnected(ConnectionBroken):
    """No connection came about in time."""

    def __init__(self, seconds: float) -> None:
        super().__init__(f"no connection came about in {seconds:g} s")


@dataclass(frozen=True)
class Response:
    """An answer."""

    status: int
    body: bytes


class Connection:
    """One connection, for one event loop; close it after an error, and after a request that was cancelled."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, host: str) -> None:
        self._reader = reader
        self._writer = writer
        self._host = host.encode()
        self._usable = True

    @classmethod
    async def open(cls, address: Address, context: ssl.SSLContext | None, *, timeout_seconds: float) -> Self:
        """Connect; `context` is for TCP.

        :raise ConnectionBroken: it did not come about.
        :raise ssl.SSLError: nor did TLS.
        """
        try:
            async with asyncio.timeout(timeout_seconds):
                if isinstance(address, UnixAddress):
                    return cls(*await asyncio.open_unix_connection(address.path), "farpage")
                host = f"[{address.host}]" if ":" in address.host else address.host
                streams = await asyncio.open_connection(
                    address.host, address.port, ssl=context, happy_eyeballs_delay=NEXT_ADDRESS_SECONDS
                )
                return cls(*streams, f"{host}:{address.port}")
        except ssl.SSLError:
            raise
        except TimeoutError:
            raise NotConnected(timeout_seconds) from None
        except socket.gaierror as problem:
            raise ConnectionBroken(str(problem)) from problem
        except OSError as problem:
            several = not isinstance(address, UnixAddress)  # of a host's addresses each fails in its way
            cause = "All connection attempts failed" if several else str(problem)
            raise ConnectionBroken(cause) from problem

    @property
    def usable(self) -> bool:
        """Whether a request may be sent: the other side has not hung up, nor announced that it will."""
        return self._usable and not self._reader.at_eof() and not self._writer.is_closing()

    async def get(self, path: str, *, timeout_seconds: float) -> Response:
        """Ask for a document.

        :raise ConnectionBroken: no answer came.
        :raise ssl.SSLError: the other side does not accept our certificate, which it says only now.
        """
        request = b"GET %s HTTP/1.1\r\nhost: %s\r\n\r\n" % (path.encode(), self._host)
        try:
            async with asyncio.timeout(timeout_seconds):
                self._writer.write(request)
                return await self._answer()
        except ssl.SSLError:
            raise
        except TimeoutError:
            raise ConnectionSilent(timeout_seconds) from None
        except asyncio.IncompleteReadError as problem:
            if problem.partial or problem.expected:
                raise ConnectionBroken("the connection ended within an answer") from problem
            raise ConnectionBroken("Server disconnected without sending a response.") from problem
        except asyncio.LimitOverrunError as problem:
            raise ConnectionBroken("the answer is not HTTP") from problem
        except OSError as problem:
            raise ConnectionBroken(str(problem)) from problem

    async def _answer(self) -> Response:
        head = await self._reader.readuntil(b"\r\n\r\n")
        status, length = _STATUS.match(head), _LENGTH.search(head)
        if status is None or length is None or int(length[1]) > BODY_BYTES_MAX:
            raise ConnectionBroken("the answer is not one of a farpage daemon")
        self._usable = _CLOSES.search(head) is None
        return Response(int(status[1]), await self._reader.readexactly(int(length[1])))

    def close(self) -> None:
        """Hang up."""
        self._usable = False
        self._writer.transport.abort()  # nothing is left to be sent
