"""Messages of the handshake as bytes and back; no I/O, no state.

Parsers take whole messages whose length was checked against a bound before they were read. They raise
`ProtocolViolation` for what the specification forbids and never allocate more than they were given.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from farpage.blockio import BlockLimits, Feature
from farpage.nbd import protocol as p
from farpage.nbd.codec import ProtocolViolation, printable

GREETING: Final = struct.Struct(">QQH")
"""NBDMAGIC, IHAVEOPT, handshake flags."""
CLIENT_FLAGS: Final = struct.Struct(">I")
OPTION: Final = struct.Struct(">QII")
"""IHAVEOPT, option, length of the data that follows."""
OPTION_REPLY: Final = struct.Struct(">QIII")
"""NBD_OPTION_REPLY_MAGIC, option, reply type, length of the data that follows."""
EXPORT_NAME_REPLY: Final = struct.Struct(">QH")
"""Size in bytes, transmission flags; 124 zero bytes follow unless NO_ZEROES was agreed."""
EXPORT_NAME_PADDING: Final = bytes(124)
MINIMUM_BLOCK_MAX_BYTES: Final = 1 << 16
_U16: Final = struct.Struct(">H")
_INFO_EXPORT: Final = struct.Struct(">HQH")
_INFO_BLOCK_SIZE: Final = struct.Struct(">HIII")
_INFO_DESCRIPTOR: Final = struct.Struct(">HQ")
_INFO_PROCESS: Final = struct.Struct(">HB")
_U32: Final = struct.Struct(">I")


# Options


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


def encode_info_descriptor(option: int, origin_bytes: int) -> bytes:
    """Return the NBD_INFO_DESCRIPTOR of a descriptor that is sent along."""
    data = _INFO_DESCRIPTOR.pack(p.NBD_INFO_DESCRIPTOR, origin_bytes)
    return encode_option_reply(option, p.NBD_REP_INFO, data)


def encode_info_process(option: int, *, told: bool) -> bytes:
    """Return the NBD_INFO_PROCESS, with which a pidfd is sent along if the process is `told`."""
    return encode_option_reply(option, p.NBD_REP_INFO, _INFO_PROCESS.pack(p.NBD_INFO_PROCESS, told))


@dataclass(frozen=True)
class ProcessTold:
    """Content of NBD_INFO_PROCESS: whether the serving process' pidfd was sent along."""

    told: bool


@dataclass(frozen=True)
class DescriptorOrigin:
    """Content of NBD_INFO_DESCRIPTOR: where in the file whose descriptor was sent along the export begins."""

    origin_bytes: int


@dataclass(frozen=True)
class ExportSize:
    """Content of NBD_INFO_EXPORT and of the reply to NBD_OPT_EXPORT_NAME."""

    size_bytes: int
    flags: int
    """NBD_FLAG_* transmission flags."""


def parse_info(data: bytes) -> ExportSize | BlockLimits | DescriptorOrigin | ProcessTold | None:
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
    if information == p.NBD_INFO_DESCRIPTOR:
        if len(data) != _INFO_DESCRIPTOR.size:
            raise ProtocolViolation("NBD_INFO_DESCRIPTOR has a wrong length")
        return DescriptorOrigin(_INFO_DESCRIPTOR.unpack(data)[1])
    if information == p.NBD_INFO_PROCESS:
        if len(data) != _INFO_PROCESS.size:
            raise ProtocolViolation("NBD_INFO_PROCESS has a wrong length")
        return ProcessTold(bool(_INFO_PROCESS.unpack(data)[1]))
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
