"""Device specifications as users write them.

`dir:PATH[?size=10G&cache=direct&allocate=sparse]`, `block:PATH`, `memory:SIZE` and NBD URIs.
"""

from __future__ import annotations

import enum
import re
import urllib.parse
from dataclasses import dataclass
from typing import TypeAlias

from farpage.errors import InvalidInput
from farpage.nbd.uri import NbdUri, parse_uri

_SIZE = re.compile(r"(\d{1,19})(?:([KMGTP])(?:i?B)?|B)?", re.IGNORECASE | re.ASCII)
_SIZE_MAX_BYTES = (1 << 53) - 1


class CacheMode(enum.StrEnum):
    """Whether reads and writes may stay in the host's page cache."""

    DIRECT = "direct"
    BUFFERED = "buffered"


class Allocate(enum.StrEnum):
    """When the storage allocates the blocks of a volume."""

    SPARSE = "sparse"
    """When they are first written."""
    FULL = "full"
    """All of them when it is made."""


@dataclass(frozen=True)
class DirectorySpec:
    """A directory of one file per volume; without `size_bytes` as large as the file system has room."""

    path: str
    size_bytes: int | None = None
    cache: CacheMode = CacheMode.DIRECT
    allocate: Allocate = Allocate.SPARSE

    def __str__(self) -> str:
        options = {} if self.size_bytes is None else {"size": str(self.size_bytes)}
        if self.cache is not CacheMode.DIRECT:
            options["cache"] = str(self.cache)
        if self.allocate is not Allocate.SPARSE:
            options["allocate"] = str(self.allocate)
        return f"dir:{_quoted(self.path)}" + (f"?{urllib.parse.urlencode(options)}" if options else "")


@dataclass(frozen=True)
class MemorySpec:
    """RAM of the VIOS, gone with it."""

    size_bytes: int

    def __str__(self) -> str:
        return f"memory:{self.size_bytes}"


@dataclass(frozen=True)
class BlockSpec:
    """One whole block device."""

    path: str

    def __str__(self) -> str:
        return f"block:{_quoted(self.path)}"


@dataclass(frozen=True)
class RemoteSpec:
    """An export of an NBD server."""

    uri: NbdUri

    def __str__(self) -> str:
        return str(self.uri)


DeviceSpec: TypeAlias = DirectorySpec | BlockSpec | RemoteSpec | MemorySpec


def parse_size(text: str, *, field: str = "size") -> int:
    """Parse bytes with an optional binary unit: `4096`, `512M`, `10GiB`.

    :raise InvalidInput: naming `field`.
    """
    match = _SIZE.fullmatch(text.strip())
    exponent = 0 if match is None or match[2] is None else "KMGTP".index(match[2].upper()) + 1
    size_bytes = 0 if match is None else int(match[1]) << (10 * exponent)
    if not 0 < size_bytes <= _SIZE_MAX_BYTES:
        raise InvalidInput(
            field,
            f"{text!r} is not a size",
            "write bytes, or a number with K, M, G or T, such as 512M or 10G",
        )
    return size_bytes


def parse_spec(text: str) -> DeviceSpec:
    """Parse a device specification.

    In the path of a `dir:` or `block:` `%`, `?` and `#` are written as in URLs: `%25`, `%3F`, `%23`.

    :raise InvalidInput: naming the field, for anything else.
    """
    kind, _, rest = text.partition(":")
    if kind == "dir":
        return _parse_directory(rest)
    if kind == "block":
        return _parse_block(rest)
    if kind in ("nbd", "nbd+unix", "nbds", "nbds+unix"):
        return RemoteSpec(parse_uri(text, field="device"))
    if kind == "memory":
        return MemorySpec(parse_size(rest, field="device.size"))
    raise InvalidInput(
        "device",
        f"{text!r} is not a device specification",
        "write dir:PATH, dir:PATH?size=10G&cache=buffered&allocate=full, block:PATH, nbd://HOST:PORT/EXPORT, "
        "nbd+unix:///EXPORT?socket=PATH or memory:SIZE",
    )


def _quoted(path: str) -> str:
    return urllib.parse.quote(path, safe="/ :@!$'()*,;=+~")


def _absolute_path(kind: str, quoted: str) -> str:
    path = urllib.parse.unquote(quoted)
    if not path.startswith("/") or "\0" in path:
        raise InvalidInput(
            "device.path", f"{path!r} is not an absolute path", f"write {kind}: and a path that starts with /"
        )
    return path.rstrip("/") or "/"


def _parse_block(rest: str) -> BlockSpec:
    quoted, _, query = rest.partition("?")
    path = _absolute_path("block", quoted)
    for name, _ in urllib.parse.parse_qsl(query, keep_blank_values=True):
        raise InvalidInput(f"device.{name}", "a block device has no options", "write block:PATH alone")
    return BlockSpec(path)


def _parse_directory(rest: str) -> DirectorySpec:
    quoted, _, query = rest.partition("?")
    path = _absolute_path("dir", quoted)
    size_bytes: int | None = None
    cache, allocate = CacheMode.DIRECT, Allocate.SPARSE
    for name, value in urllib.parse.parse_qsl(query, keep_blank_values=True):
        if name == "size":
            size_bytes = parse_size(value, field="device.size")
        elif name == "cache" and value in list(CacheMode):
            cache = CacheMode(value)
        elif name == "cache":
            raise InvalidInput("device.cache", f"{value!r} is not a cache mode", "write direct or buffered")
        elif name == "allocate" and value in list(Allocate):
            allocate = Allocate(value)
        elif name == "allocate":
            raise InvalidInput(
                "device.allocate", f"{value!r} is no way to allocate volumes", "write sparse or full"
            )
        else:
            raise InvalidInput(
                f"device.{name}", "a directory has no such option", "the options are size, cache and allocate"
            )
    return DirectorySpec(path, size_bytes, cache, allocate)
