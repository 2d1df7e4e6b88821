"""Messages of the transmission phase as bytes and back; no I/O, no state.

Parsers take whole messages whose length was checked against a bound before they were read. They raise
`ProtocolViolation` for what the specification forbids and never allocate more than they were given.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable, Sequence
from typing import Final

from farpage.blockio import Allocation, Extent
from farpage.nbd import protocol as p

REQUEST: Final = struct.Struct(">IHHQQI")
REQUEST_IN_WORDS: Final = struct.Struct(">QQQI")
"""`REQUEST` with magic number, flags and command in one word, which one comparison looks at."""
"""NBD_REQUEST_MAGIC, command flags, command, cookie, offset, length."""
SIMPLE_REPLY: Final = struct.Struct(">IIQ")
"""NBD_SIMPLE_REPLY_MAGIC, error, cookie."""
CHUNK: Final = struct.Struct(">IHHQI")
"""NBD_STRUCTURED_REPLY_MAGIC, reply flags, chunk type, cookie, length of the payload that follows."""
DATA_CHUNK: Final = struct.Struct(">IHHQIQ")
"""A chunk's header with the offset that begins an OFFSET_DATA payload."""
HOLE_CHUNK: Final = struct.Struct(">IHHQIQI")
"""A whole OFFSET_HOLE chunk."""
STATUS_CHUNK: Final = struct.Struct(">IHHQII")
"""A chunk's header with the context id that begins a BLOCK_STATUS payload."""
DESCRIPTOR: Final = struct.Struct(">II")
"""One extent of a BLOCK_STATUS payload: length, status."""

HOLE: Final = struct.Struct(">QI")
"""Payload of an OFFSET_HOLE chunk: offset, length."""
U64: Final = struct.Struct(">Q")

CONTEXT_ID: Final = 1
"""The id that this server gives base:allocation."""

_U32: Final = struct.Struct(">I")
_ERROR: Final = struct.Struct(">IH")


class ProtocolViolation(Exception):
    """The other end sent what the specification forbids."""


def printable(data: bytes) -> str:
    """Return a message of the other end, fit for a terminal: bounded, without control characters."""
    text = bytes(data[: p.STRING_MAX_BYTES]).decode(errors="replace")
    return "".join(c if c.isprintable() else " " for c in text).strip()


_ERROR_OF_ERRNO: Final = {
    0: p.NBD_SUCCESS,
    errno.EPERM: p.NBD_EPERM,
    errno.EACCES: p.NBD_EPERM,
    errno.EROFS: p.NBD_EPERM,
    errno.EIO: p.NBD_EIO,
    errno.ENOMEM: p.NBD_ENOMEM,
    errno.EINVAL: p.NBD_EINVAL,
    errno.ENOSPC: p.NBD_ENOSPC,
    errno.EDQUOT: p.NBD_ENOSPC,
    errno.EFBIG: p.NBD_ENOSPC,
    errno.EOVERFLOW: p.NBD_EOVERFLOW,
    errno.ENOTSUP: p.NBD_ENOTSUP,
    errno.ESHUTDOWN: p.NBD_ESHUTDOWN,
}
_ERRNO_OF_ERROR: Final = {
    p.NBD_EPERM: errno.EPERM,
    p.NBD_EIO: errno.EIO,
    p.NBD_ENOMEM: errno.ENOMEM,
    p.NBD_EINVAL: errno.EINVAL,
    p.NBD_ENOSPC: errno.ENOSPC,
    p.NBD_EOVERFLOW: errno.EOVERFLOW,
    p.NBD_ENOTSUP: errno.ENOTSUP,
    p.NBD_ESHUTDOWN: errno.ESHUTDOWN,
}


def wire_error(number: int) -> int:
    """Return the NBD error for an errno; EIO for what NBD has no error for."""
    return _ERROR_OF_ERRNO.get(number, p.NBD_EIO)


def local_error(error: int) -> int:
    """Return the errno for an NBD error that is not 0; EINVAL for unknown ones, as the specification asks."""
    return _ERRNO_OF_ERROR.get(error, errno.EINVAL)


def encode_request(command: int, flags: int, cookie: int, offset: int, length: int) -> bytes:
    """Return a request's header; a WRITE's payload follows it."""
    return REQUEST.pack(p.NBD_REQUEST_MAGIC, flags, command, cookie, offset, length)


def encode_simple_reply(cookie: int, error: int = 0) -> bytes:
    """Return a simple reply's header; a successful READ's payload follows it."""
    return SIMPLE_REPLY.pack(p.NBD_SIMPLE_REPLY_MAGIC, error, cookie)


def encode_error_chunk(cookie: int, error: int, message: str = "") -> bytes:
    """Return an NBD_REPLY_TYPE_ERROR chunk that ends the reply."""
    text = message.encode()[: p.STRING_MAX_BYTES]
    header = CHUNK.pack(
        p.NBD_STRUCTURED_REPLY_MAGIC,
        p.NBD_REPLY_FLAG_DONE,
        p.NBD_REPLY_TYPE_ERROR,
        cookie,
        _ERROR.size + len(text),
    )
    return header + _ERROR.pack(error, len(text)) + text


def encode_data_header(cookie: int, offset: int, length: int, *, done: bool) -> bytes:
    """Return what goes before the `length` bytes of an NBD_REPLY_TYPE_OFFSET_DATA chunk."""
    return DATA_CHUNK.pack(
        p.NBD_STRUCTURED_REPLY_MAGIC,
        p.NBD_REPLY_FLAG_DONE if done else 0,
        p.NBD_REPLY_TYPE_OFFSET_DATA,
        cookie,
        8 + length,
        offset,
    )


def encode_hole(cookie: int, offset: int, length: int, *, done: bool) -> bytes:
    """Return an NBD_REPLY_TYPE_OFFSET_HOLE chunk."""
    return HOLE_CHUNK.pack(
        p.NBD_STRUCTURED_REPLY_MAGIC,
        p.NBD_REPLY_FLAG_DONE if done else 0,
        p.NBD_REPLY_TYPE_OFFSET_HOLE,
        cookie,
        12,
        offset,
        length,
    )


def encode_block_status(cookie: int, context_id: int, extents: Iterable[Extent]) -> bytes:
    """Return the NBD_REPLY_TYPE_BLOCK_STATUS chunk that ends a reply."""
    descriptors = b"".join(DESCRIPTOR.pack(extent.length, extent.allocation) for extent in extents)
    header = STATUS_CHUNK.pack(
        p.NBD_STRUCTURED_REPLY_MAGIC,
        p.NBD_REPLY_FLAG_DONE,
        p.NBD_REPLY_TYPE_BLOCK_STATUS,
        cookie,
        4 + len(descriptors),
        context_id,
    )
    return header + descriptors


def merge_extents(extents: Sequence[Extent], length: int, maximum: int) -> list[Extent]:
    """Return at most `maximum` extents over at most `length` bytes, neighbours in one state joined."""
    merged: list[Extent] = []
    left = length
    for extent in extents:
        part = min(extent.length, left)
        if part <= 0:
            break
        if merged and merged[-1].allocation == extent.allocation:
            merged[-1] = Extent(merged[-1].length + part, extent.allocation)
        elif len(merged) == maximum:
            break
        else:
            merged.append(Extent(part, extent.allocation))
        left -= part
    return merged


def unpack_chunk(buffer: bytes | bytearray, position: int) -> tuple[int, int, int, int, int]:
    """Return magic, flags, type, cookie and payload length of the chunk at `position`."""
    magic, flags, kind, cookie, length = CHUNK.unpack_from(buffer, position)
    return magic, flags, kind, cookie, length


def parse_error_chunk(payload: memoryview) -> tuple[int, str]:
    """Return error and message from the payload of a chunk whose type has bit 15 set.

    :raise ProtocolViolation: if it is too short, its error is 0 or the message does not fit.
    """
    if len(payload) < _ERROR.size:
        raise ProtocolViolation("an error chunk is too short")
    error, message_length = _ERROR.unpack_from(payload)
    if message_length > len(payload) - _ERROR.size:
        raise ProtocolViolation("an error chunk's message is longer than the chunk")
    if error == 0:
        raise ProtocolViolation("an error chunk has no error")
    return error, printable(bytes(payload[_ERROR.size : _ERROR.size + message_length]))


def parse_block_status(payload: memoryview) -> tuple[int, list[Extent]]:
    """Return context id and extents from the payload of an NBD_REPLY_TYPE_BLOCK_STATUS chunk.

    :raise ProtocolViolation: if it is no whole number of extents, has none or has an empty one.
    """
    if len(payload) < 12 or len(payload) % 8 != 4:
        raise ProtocolViolation("a block status chunk has a wrong length")
    (context_id,) = _U32.unpack_from(payload)
    extents = [
        Extent(length, Allocation(status & (p.NBD_STATE_HOLE | p.NBD_STATE_ZERO)))
        for length, status in DESCRIPTOR.iter_unpack(payload[4:])
    ]
    if not all(extent.length for extent in extents):
        raise ProtocolViolation("a block status chunk has an empty extent")
    return context_id, extents
