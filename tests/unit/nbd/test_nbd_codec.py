"""The messages of the wire: what is encoded is parsed back, and nothing else is."""

from __future__ import annotations

import contextlib
import errno
import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farpage.blockio import Allocation, BlockLimits, Extent, Feature
from farpage.nbd import codec, options
from farpage.nbd import protocol as p
from farpage.nbd.codec import ProtocolViolation
from farpage.nbd.options import ContextQuery, ExportSize, InfoRequest

names = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=1000)
extents = st.lists(
    st.builds(Extent, st.integers(1, 1 << 20), st.sampled_from([*list(Allocation), Allocation(3)])),
    min_size=1,
    max_size=50,
)


@given(names, st.lists(st.integers(0, 65535), max_size=20))
def test_info_request_round_trip(name: str, information: list[int]) -> None:
    request = InfoRequest(name, tuple(information))
    assert options.parse_info_request(options.encode_info_request(request)) == request


@given(names, st.lists(names, max_size=5))
def test_context_query_round_trip(name: str, queries: list[str]) -> None:
    query = ContextQuery(name, tuple(queries))
    assert options.parse_context_query(options.encode_context_query(query)) == query


@given(names)
def test_server_reply_round_trip(name: str) -> None:
    reply = options.encode_server(p.NBD_OPT_LIST, name, "a disk")
    assert options.parse_server(reply[options.OPTION_REPLY.size :]) == (name, "a disk")


@given(st.integers(0, (1 << 32) - 1), names)
def test_meta_context_round_trip(context_id: int, name: str) -> None:
    reply = options.encode_meta_context(p.NBD_OPT_SET_META_CONTEXT, context_id, name)
    assert options.parse_meta_context(reply[options.OPTION_REPLY.size :]) == (context_id, name)


@given(st.integers(0, (1 << 63) - 1), st.integers(0, 65535))
def test_export_information_round_trip(size_bytes: int, flags: int) -> None:
    flags |= p.NBD_FLAG_HAS_FLAGS
    reply = options.encode_info_export(p.NBD_OPT_GO, size_bytes, flags)
    assert options.parse_info(reply[options.OPTION_REPLY.size :]) == ExportSize(size_bytes, flags)


@given(st.integers(0, 16), st.integers(0, 1 << 27), st.integers(1, 1 << 33))
def test_advertised_limits_are_what_a_client_accepts(minimum: int, preferred: int, maximum: int) -> None:
    limits = options.advertised_limits(BlockLimits(1 << minimum, preferred, maximum))
    reply = options.encode_info_block_size(p.NBD_OPT_GO, limits)
    assert options.parse_info(reply[options.OPTION_REPLY.size :]) == limits
    assert limits.maximum <= max(maximum, limits.minimum)


@pytest.mark.parametrize("minimum", [0, 3, 1 << 17])
def test_a_minimum_block_size_that_the_wire_cannot_say_is_refused(minimum: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        options.advertised_limits(BlockLimits(minimum=minimum))


@given(extents)
def test_block_status_round_trip(found: list[Extent]) -> None:
    chunk = codec.encode_block_status(7, 3, found)
    assert codec.parse_block_status(memoryview(chunk)[codec.CHUNK.size :]) == (3, found)


@given(extents, st.integers(1, 1 << 22), st.integers(1, 10))
def test_merged_extents_say_the_same_of_a_prefix(found: list[Extent], length: int, maximum: int) -> None:
    merged = codec.merge_extents(found, length, maximum)
    assert 0 < len(merged) <= maximum
    assert sum(extent.length for extent in merged) <= min(length, sum(extent.length for extent in found))
    assert all(a.allocation != b.allocation for a, b in itertools.pairwise(merged))

    def state_at(position: int, among: list[Extent]) -> Allocation | None:
        for extent in among:
            if position < extent.length:
                return extent.allocation
            position -= extent.length
        return None

    at = 0
    for extent in merged:
        assert state_at(at, found) == state_at(at + extent.length - 1, found) == extent.allocation
        at += extent.length


@given(st.integers(1, (1 << 32) - 1), names)
def test_error_chunk_round_trip(error: int, message: str) -> None:
    chunk = codec.encode_error_chunk(9, error, message)
    parsed, text = codec.parse_error_chunk(memoryview(chunk)[codec.CHUNK.size :])
    assert parsed == error
    assert text == codec.printable(message.encode()[: p.STRING_MAX_BYTES])


@given(st.binary(max_size=200))
def test_messages_are_fit_for_a_terminal(data: bytes) -> None:
    assert codec.printable(data).isprintable()


@pytest.mark.parametrize(
    "parse",
    [
        options.parse_info_request,
        options.parse_context_query,
        options.parse_server,
        options.parse_meta_context,
        options.parse_info,
        options.parse_string,
        lambda data: codec.parse_block_status(memoryview(data)),
        lambda data: codec.parse_error_chunk(memoryview(data)),
    ],
)
@given(data=st.binary(max_size=64))
def test_parsers_answer_garbage_with_a_violation(parse: Callable[[bytes], object], data: bytes) -> None:
    with contextlib.suppress(ProtocolViolation):
        parse(data)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\0\0\0\x05abcd\0\0",
        b"\xff\xff\xff\xff\0\0",
        b"\0\0\0\0\0\x02\0\0",
        b"\0\0\0\0\0\0\0",
        b"\0\0\0\x02a\0\0\0",
        b"\0\0\0\x01\xff\0\0",
    ],
)
def test_inconsistent_info_requests_are_violations(data: bytes) -> None:
    with pytest.raises(ProtocolViolation):
        options.parse_info_request(data)


def test_a_string_longer_than_the_wire_allows_is_refused_in_both_directions() -> None:
    with pytest.raises(ValueError, match="longer"):
        options.encode_string("a" * 4097)
    with pytest.raises(ProtocolViolation, match="longer"):
        options.parse_string(b"a" * 4097)


def test_a_context_query_cannot_ask_for_more_queries_than_it_holds() -> None:
    with pytest.raises(ProtocolViolation, match="number of queries"):
        options.parse_context_query(b"\0\0\0\0" + b"\xff\xff\xff\xff")


@given(st.lists(st.sampled_from(list(Feature)), max_size=8), st.booleans())
def test_features_survive_the_transmission_flags(chosen: list[Feature], structured: bool) -> None:
    features = Feature.NONE
    for feature in chosen:
        features |= feature
    flags = options.transmission_flags(features, read_only=False, structured=structured)
    expected = features & ~Feature.EXTENTS
    if Feature.ZERO not in features:
        expected &= ~Feature.FAST_ZERO
    assert options.features_of(flags) == expected
    assert bool(flags & p.NBD_FLAG_SEND_DF) is structured


def test_a_read_only_export_offers_no_command_that_writes() -> None:
    flags = options.transmission_flags(Feature.TRIM | Feature.ZERO, read_only=True, structured=False)
    assert flags == p.NBD_FLAG_HAS_FLAGS | p.NBD_FLAG_READ_ONLY


@pytest.mark.parametrize(
    ("number", "error"),
    [
        (0, p.NBD_SUCCESS),
        (errno.EROFS, p.NBD_EPERM),
        (errno.EDQUOT, p.NBD_ENOSPC),
        (errno.EFBIG, p.NBD_ENOSPC),
        (errno.ENOTCONN, p.NBD_EIO),
        (errno.EREMOTEIO, p.NBD_EIO),
        (errno.ENOTSUP, p.NBD_ENOTSUP),
    ],
)
def test_errnos_become_errors_that_the_wire_knows(number: int, error: int) -> None:
    assert codec.wire_error(number) == error


@pytest.mark.parametrize(
    ("error", "number"),
    [(p.NBD_EIO, errno.EIO), (p.NBD_ESHUTDOWN, errno.ESHUTDOWN), (107, errno.EINVAL), (9999, errno.EINVAL)],
)
def test_unknown_errors_of_a_server_become_einval(error: int, number: int) -> None:
    assert codec.local_error(error) == number
