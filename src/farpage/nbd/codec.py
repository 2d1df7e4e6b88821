"""Messages of the wire as bytes and back; no I/O, no state.

Parsers take whole messages whose length was checked against a bound before they were read. They raise
`ProtocolViolation` for what the specification forbids and never allocate more than they were given.
"""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from farpage.blockio import Allocation, BlockLimits, Extent, Feature
from farpage.nbd import protocol as p

GREETING: Final = struct.Struct(">QQH")
"""NBDMAGIC, IHAVEOPT, handshake flags."""
CLIENT_FLAGS: Final = struct.Struct(">I")
OPTION: Final = struct.Struct(">QII")
"""IHAVEOPT, option, length of the data that follows."""
OPTION_REPLY: Final = struct.Struct(">QIII")
"""NBD_OPTION_REPLY_MAGIC, option, reply type, length of the data that follows."""
EXPORT_NAME_REPLY: Final = struct.Struct(">QH")
"""Size in bytes, transmission flags; 124 zero bytes follow unless NO_ZEROES was agreed."""
REQUEST: Final = struct.Struct(">IHHQQI")
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

EXPORT_NAME_PADDING: Final = bytes(124)
CONTEXT_ID: Final = 1
"""The id that this server gives base:allocation."""
MINIMUM_BLOCK_MAX_BYTES: Final = 1 << 16

_U16: Final = struct.Struct(">H")
_U32: Final = struct.Struct(">I")
_INFO_EXPORT: Final = struct.Struct(">HQH")
_INFO_BLOCK_SIZE: Final = struct.Struct(">HIII")
_ERROR: Final = struct.Struct(">IH")


class ProtocolViolation(Exception):
    """The other end sent what the specification forbids."""


# Options of the handshake


@dataclass(frozen=True)
class InfoRequest:
    """Data of NBD_OPT_INFO and NBD_OPT_GO."""

    name: str
    information: tuple[int, ...]
    """NBD_INFO_* types asked for."""


@dataclass(frozen=True)
class ContextQuery:
    """Data of NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT."""

    name: str
    queries: tuple[str, ...]


def encode_option(option: int, data: bytes = b"") -> bytes:
    """Return one option of the client."""
    return OPTION.pack(p.IHAVEOPT, option, len(data)) + data


def encode_string(text: str) -> bytes:
    """Return `text` in UTF-8.

    :raise ValueError: if that is longer than the wire allows.
    """
    data = text.encode()
    if len(data) > p.STRING_MAX_BYTES:
        raise ValueError(f"a string of {len(data)} bytes is longer than NBD's {p.STRING_MAX_BYTES}")
    return data


def parse_string(data: bytes) -> str:
    """Return the text of a string of the wire.

    :raise ProtocolViolation: if it is too long, not UTF-8 or has a NUL in it ("Strings").
    """
    if len(data) > p.STRING_MAX_BYTES:
        raise ProtocolViolation(f"a string of {len(data)} bytes is longer than {p.STRING_MAX_BYTES}")
    if b"\0" in data:
        raise ProtocolViolation("a string contains a NUL")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise ProtocolViolation("a string is not UTF-8") from None


def printable(data: bytes) -> str:
    """Return a message of the other end, fit for a terminal: bounded, without control characters."""
    text = bytes(data[: p.STRING_MAX_BYTES]).decode(errors="replace")
    return "".join(c if c.isprintable() else " " for c in text).strip()


def encode_info_request(request: InfoRequest) -> bytes:
    """Return the data of NBD_OPT_INFO or NBD_OPT_GO."""
    name = encode_string(request.name)
    information = struct.pack(
        f">H{len(request.information)}H", len(request.information), *request.information
    )
    return _U32.pack(len(name)) + name + information


def parse_info_request(data: bytes) -> InfoRequest:
    """Parse the data of NBD_OPT_INFO or NBD_OPT_GO.

    :raise ProtocolViolation: if the lengths in it disagree.
    """
    if len(data) < 6:
        raise ProtocolViolation("the option is too short")
    (name_length,) = _U32.unpack_from(data)
    if name_length > len(data) - 6:
        raise ProtocolViolation("the export name is longer than the option")
    name = parse_string(data[4 : 4 + name_length])
    (count,) = _U16.unpack_from(data, 4 + name_length)
    if len(data) != 6 + name_length + 2 * count:
        raise ProtocolViolation("the number of information requests disagrees with the option's length")
    return InfoRequest(name, struct.unpack_from(f">{count}H", data, 6 + name_length))


def encode_context_query(query: ContextQuery) -> bytes:
    """Return the data of NBD_OPT_LIST_META_CONTEXT or NBD_OPT_SET_META_CONTEXT."""
    name = encode_string(query.name)
    parts = [_U32.pack(len(name)), name, _U32.pack(len(query.queries))]
    for text in query.queries:
        encoded = encode_string(text)
        parts += [_U32.pack(len(encoded)), encoded]
    return b"".join(parts)


def parse_context_query(data: bytes) -> ContextQuery:
    """Parse the data of NBD_OPT_LIST_META_CONTEXT or NBD_OPT_SET_META_CONTEXT.

    :raise ProtocolViolation: if the lengths in it disagree.
    """
    position = 0

    def number() -> int:
        nonlocal position
        if len(data) - position < 4:
            raise ProtocolViolation("the option is too short")
        (value,) = _U32.unpack_from(data, position)
        position += 4
        return int(value)

    def string() -> str:
        nonlocal position
        length = number()
        if length > len(data) - position:
            raise ProtocolViolation("a string is longer than the option")
        text = parse_string(data[position : position + length])
        position += length
        return text

    name = string()
    count = number()
    if count > (len(data) - position) // 4:
        raise ProtocolViolation("the number of queries disagrees with the option's length")
    queries = tuple(string() for _ in range(count))
    if position != len(data):
        raise ProtocolViolation("the option is longer than its queries")
    return ContextQuery(name, queries)


# Replies to options


def encode_option_reply(option: int, reply_type: int, data: bytes = b"") -> bytes:
    """Return one reply of the server to an option."""
    return OPTION_REPLY.pack(p.NBD_OPTION_REPLY_MAGIC, option, reply_type, len(data)) + data


def encode_option_error(option: int, reply_type: int, message: str = "") -> bytes:
    """Return an error reply with a message for a human."""
    return encode_option_reply(option, reply_type, message.encode()[: p.STRING_MAX_BYTES])


def encode_server(option: int, name: str, description: str) -> bytes:
    """Return the NBD_REP_SERVER of one export."""
    encoded = encode_string(name)
    data = _U32.pack(len(encoded)) + encoded + encode_string(description)
    return encode_option_reply(option, p.NBD_REP_SERVER, data)


def parse_server(data: bytes) -> tuple[str, str]:
    """Return name and description from an NBD_REP_SERVER.

    :raise ProtocolViolation: if the lengths in it disagree.
    """
    if len(data) < 4:
        raise ProtocolViolation("NBD_REP_SERVER is too short")
    (length,) = _U32.unpack_from(data)
    if length > len(data) - 4:
        raise ProtocolViolation("the export name is longer than its NBD_REP_SERVER")
    return parse_string(data[4 : 4 + length]), printable(data[4 + length :])


def encode_info_export(option: int, size_bytes: int, flags: int) -> bytes:
    """Return the NBD_INFO_EXPORT of an export."""
    return encode_option_reply(
        option, p.NBD_REP_INFO, _INFO_EXPORT.pack(p.NBD_INFO_EXPORT, size_bytes, flags)
    )


def encode_info_block_size(option: int, limits: BlockLimits) -> bytes:
    """Return the NBD_INFO_BLOCK_SIZE of an export."""
    data = _INFO_BLOCK_SIZE.pack(p.NBD_INFO_BLOCK_SIZE, limits.minimum, limits.preferred, limits.maximum)
    return encode_option_reply(option, p.NBD_REP_INFO, data)


def encode_info_text(option: int, information: int, text: str) -> bytes:
    """Return an NBD_INFO_NAME or NBD_INFO_DESCRIPTION."""
    return encode_option_reply(option, p.NBD_REP_INFO, _U16.pack(information) + encode_string(text))


@dataclass(frozen=True)
class ExportSize:
    """Content of NBD_INFO_EXPORT and of the reply to NBD_OPT_EXPORT_NAME."""

    size_bytes: int
    flags: int
    """NBD_FLAG_* transmission flags."""


def parse_info(data: bytes) -> ExportSize | BlockLimits | None:
    """Return what an NBD_REP_INFO says; None for information that this client has no use for.

    :raise ProtocolViolation: for a wrong length, a size beyond 2^63 - 1 or impossible block sizes.
    """
    if len(data) < 2:
        raise ProtocolViolation("NBD_REP_INFO is too short")
    (information,) = _U16.unpack_from(data)
    if information == p.NBD_INFO_EXPORT:
        if len(data) != _INFO_EXPORT.size:
            raise ProtocolViolation("NBD_INFO_EXPORT has a wrong length")
        _, size_bytes, flags = _INFO_EXPORT.unpack(data)
        return checked_export_size(size_bytes, flags)
    if information == p.NBD_INFO_BLOCK_SIZE:
        if len(data) != _INFO_BLOCK_SIZE.size:
            raise ProtocolViolation("NBD_INFO_BLOCK_SIZE has a wrong length")
        _, minimum, preferred, maximum = _INFO_BLOCK_SIZE.unpack(data)
        if not _is_power_of_two(minimum) or minimum > MINIMUM_BLOCK_MAX_BYTES:
            raise ProtocolViolation(f"a minimum block size of {minimum} is not allowed")
        if not _is_power_of_two(preferred) or preferred < minimum:
            raise ProtocolViolation(f"a preferred block size of {preferred} is not allowed")
        if maximum < minimum or (maximum % minimum and maximum != p.LENGTH_MAX_BYTES):
            raise ProtocolViolation(f"a maximum block size of {maximum} is not allowed")
        return BlockLimits(minimum, preferred, maximum)
    return None


def checked_export_size(size_bytes: int, flags: int) -> ExportSize:
    """Return what a server said of an export.

    :raise ProtocolViolation: if the size is beyond 2^63 - 1 or the flags are no NBD flags.
    """
    if size_bytes >> 63:
        raise ProtocolViolation(f"an export size of {size_bytes} bytes is not allowed")
    if not flags & p.NBD_FLAG_HAS_FLAGS:
        raise ProtocolViolation("the transmission flags lack NBD_FLAG_HAS_FLAGS")
    return ExportSize(size_bytes, flags)


def encode_meta_context(option: int, context_id: int, name: str) -> bytes:
    """Return one NBD_REP_META_CONTEXT."""
    return encode_option_reply(option, p.NBD_REP_META_CONTEXT, _U32.pack(context_id) + encode_string(name))


def parse_meta_context(data: bytes) -> tuple[int, str]:
    """Return id and name from an NBD_REP_META_CONTEXT.

    :raise ProtocolViolation: if it is too short or the name no string.
    """
    if len(data) < 4:
        raise ProtocolViolation("NBD_REP_META_CONTEXT is too short")
    return _U32.unpack_from(data)[0], parse_string(data[4:])


# What an export can do

_FLAG_OF_FEATURE: Final = {
    Feature.FLUSH: p.NBD_FLAG_SEND_FLUSH,
    Feature.FUA: p.NBD_FLAG_SEND_FUA,
    Feature.TRIM: p.NBD_FLAG_SEND_TRIM,
    Feature.ZERO: p.NBD_FLAG_SEND_WRITE_ZEROES,
    Feature.FAST_ZERO: p.NBD_FLAG_SEND_FAST_ZERO,
    Feature.CACHE: p.NBD_FLAG_SEND_CACHE,
    Feature.MULTI_CONN: p.NBD_FLAG_CAN_MULTI_CONN,
}
_WRITING: Final = Feature.TRIM | Feature.ZERO | Feature.FAST_ZERO


def transmission_flags(features: Feature, *, read_only: bool, structured: bool) -> int:
    """Return the transmission flags of an export with these features."""
    flags = p.NBD_FLAG_HAS_FLAGS
    if read_only:
        flags |= p.NBD_FLAG_READ_ONLY
        features &= ~_WRITING
    if Feature.ZERO not in features:
        features &= ~Feature.FAST_ZERO
    for feature, flag in _FLAG_OF_FEATURE.items():
        if feature in features:
            flags |= flag
    return flags | p.NBD_FLAG_SEND_DF if structured else flags


def features_of(flags: int) -> Feature:
    """Return the features that transmission flags announce (EXTENTS is negotiated otherwise)."""
    features = Feature.NONE
    for feature, flag in _FLAG_OF_FEATURE.items():
        if flags & flag:
            features |= feature
    if Feature.ZERO not in features:
        features &= ~Feature.FAST_ZERO
    return features


def advertised_limits(limits: BlockLimits) -> BlockLimits:
    """Return block size constraints that the specification accepts, nearest to `limits` and never looser.

    :raise ValueError: if the minimum is not a power of two up to 64 KiB.
    """
    if not _is_power_of_two(limits.minimum) or limits.minimum > MINIMUM_BLOCK_MAX_BYTES:
        raise ValueError(f"minimum block size {limits.minimum} is not a power of two up to 65536")
    maximum = min(limits.maximum, p.PAYLOAD_MAX_BYTES)
    maximum = max(maximum - maximum % limits.minimum, limits.minimum)
    wish = max(min(limits.preferred, maximum), limits.minimum, 512)
    return BlockLimits(limits.minimum, 1 << (wish.bit_length() - 1), maximum)


def _is_power_of_two(number: int) -> bool:
    return number > 0 and not number & (number - 1)


# Transmission

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
