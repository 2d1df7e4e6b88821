"""NBD URIs: `nbd://HOST[:PORT]/EXPORT` and `nbd+unix:///EXPORT?socket=PATH`. Pure.

The forms are those of the NBD URI specification (doc/uri.md beside the protocol's text) without
TLS: `nbds:` is refused.
"""

from __future__ import annotations

import urllib.parse
from dataclasses import dataclass
from typing import Final

from farpage.address import UNIX_PATH_MAX_BYTES, Address, TcpAddress, UnixAddress
from farpage.errors import InvalidInput
from farpage.nbd.protocol import STRING_MAX_BYTES

PORT: Final = 10809
"""IANA's port for NBD."""

_SAFE_IN_EXPORT: Final = "/:@!$'()*,;=+~"
_HINT: Final = "write nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH"


@dataclass(frozen=True)
class NbdUri:
    """An export and the address of its server; an export's name may be empty."""

    address: Address
    export: str

    def __str__(self) -> str:
        export = urllib.parse.quote(self.export, safe=_SAFE_IN_EXPORT)
        if isinstance(self.address, UnixAddress):
            return f"nbd+unix:///{export}?socket={urllib.parse.quote(self.address.path, safe='/:@,+~')}"
        host = f"[{self.address.host}]" if ":" in self.address.host else self.address.host
        port = "" if self.address.port == PORT else f":{self.address.port}"
        return f"nbd://{host}{port}/{export}"


def parse_uri(text: str, *, field: str = "uri") -> NbdUri:
    """Parse an NBD URI.

    :raise InvalidInput: naming `field` or a part of it.
    """
    scheme, separator, rest = text.partition("://")
    if not separator or scheme not in ("nbd", "nbd+unix", "nbds", "nbds+unix"):
        raise InvalidInput(field, f"{text!r} is not an NBD URI", _HINT)
    if scheme.startswith("nbds"):
        raise InvalidInput(field, "TLS to NBD servers is not supported", "use a server on a trusted network")
    rest, _, fragment = rest.partition("#")
    if fragment:
        raise InvalidInput(field, "a '#' ends the URI", "write '#' in a name as %23")
    place, _, query = rest.partition("?")
    authority, _, path = place.partition("/")
    export = _unquoted(path, f"{field}.export")
    if len(export.encode()) > STRING_MAX_BYTES:
        raise InvalidInput(
            f"{field}.export", f"a name of over {STRING_MAX_BYTES} bytes", "NBD allows no longer one"
        )
    options = _options(query, field)
    if scheme == "nbd":
        if options:
            raise InvalidInput(
                f"{field}.socket", "nbd: names a host and no socket", "write nbd+unix: for a UNIX socket"
            )
        return NbdUri(_tcp(authority, field), export)
    if authority:
        raise InvalidInput(
            f"{field}.host", f"{authority!r} beside a UNIX socket", "write three slashes: nbd+unix:///"
        )
    return NbdUri(_unix(options.get("socket", ""), field), export)


def _options(query: str, field: str) -> dict[str, str]:
    options: dict[str, str] = {}
    for item in filter(None, query.split("&")):
        name, _, value = item.partition("=")
        if name != "socket" or name in options:
            raise InvalidInput(f"{field}.{name}", "an NBD URI here has no such option, or has it once", _HINT)
        options[name] = _unquoted(value, f"{field}.socket")
    return options


def _unquoted(text: str, field: str) -> str:
    try:
        plain = urllib.parse.unquote(text, errors="strict")
    except UnicodeDecodeError as error:
        raise InvalidInput(field, f"{text!r} is not UTF-8", "percent-encode UTF-8") from error
    if "\0" in plain:
        raise InvalidInput(field, "it holds a zero byte", "no name and no path has one")
    return plain


def _unix(path: str, field: str) -> UnixAddress:
    if not path.startswith("/"):
        raise InvalidInput(f"{field}.socket", f"{path!r} is not an absolute path", _HINT)
    if len(path.encode()) > UNIX_PATH_MAX_BYTES:
        raise InvalidInput(
            f"{field}.socket",
            f"a UNIX socket's path has at most {UNIX_PATH_MAX_BYTES} bytes",
            "use a shorter folder",
        )
    return UnixAddress(path)


def _tcp(authority: str, field: str) -> TcpAddress:
    if "@" in authority:
        raise InvalidInput(f"{field}.host", "a user name is for TLS, which is not supported", "leave it out")
    host, port = authority, ""
    if authority.startswith("["):
        host, bracket, rest = authority[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise InvalidInput(f"{field}.host", f"{authority!r} is no host", "write [ADDRESS]:PORT for IPv6")
        port = rest[1:]
    elif ":" in authority:
        host, _, port = authority.rpartition(":")
    if not host or (":" in host and not authority.startswith("[")):
        raise InvalidInput(f"{field}.host", f"{authority!r} is no host", _HINT)
    if not port:
        return TcpAddress(host, PORT)
    if not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
        raise InvalidInput(f"{field}.port", f"{port!r} is no port", "give a number from 1 to 65535")
    return TcpAddress(host, int(port))
