"""Addresses of sockets, as users write them: `unix:PATH` or `tcp:HOST:PORT`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from farpage.errors import InvalidInput

UNIX_PATH_MAX_BYTES = 107
"""sun_path holds 108 bytes with the terminating NUL (unix(7))."""


@dataclass(frozen=True)
class UnixAddress:
    """A stream socket in the file system."""

    path: str

    def __str__(self) -> str:
        return f"unix:{self.path}"


@dataclass(frozen=True)
class TcpAddress:
    """A TCP port; `host` is a name or an address without brackets."""

    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"tcp:{host}:{self.port}"


Address: TypeAlias = UnixAddress | TcpAddress


def parse_address(text: str, *, field: str = "address") -> Address:
    """Parse `unix:PATH`, `tcp:HOST:PORT` or `tcp:[HOST]:PORT`.

    :raise InvalidInput: naming `field`, for anything else.
    """
    scheme, _, rest = text.partition(":")
    hint = "write unix:PATH or tcp:HOST:PORT"
    if scheme == "unix" and rest:
        if len(rest.encode()) > UNIX_PATH_MAX_BYTES:
            raise InvalidInput(
                field,
                f"{rest!r} is longer than the {UNIX_PATH_MAX_BYTES} bytes that a UNIX socket's path may have",
                "use a shorter folder",
            )
        return UnixAddress(rest)
    if scheme == "tcp":
        host, _, port = rest.rpartition(":")
        host = host.removeprefix("[").removesuffix("]")
        if host and port.isascii() and port.isdigit() and int(port) < 65536:
            return TcpAddress(host, int(port))
    raise InvalidInput(field, f"{text!r} is not an address", hint)
