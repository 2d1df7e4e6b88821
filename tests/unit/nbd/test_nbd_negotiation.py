"""The server's handshake, without a socket."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farpage.blockio import BlockLimits, Feature
from farpage.nbd import options
from farpage.nbd import protocol as p
from farpage.nbd.errors import ExportRefused
from farpage.nbd.export import ExportInfo
from farpage.nbd.negotiation import (
    OPTION_MAX_BYTES,
    OPTION_SKIPPED_MAX_BYTES,
    OPTIONS_MAX,
    Describe,
    Enter,
    HangUp,
    ListNames,
    Negotiation,
    Reply,
    Step,
)
from farpage.nbd.options import ContextQuery, InfoRequest

INFO = ExportInfo(1 << 20, features=Feature.FLUSH | Feature.EXTENTS, description="a disk")
FLAGS = options.CLIENT_FLAGS.pack(p.NBD_FLAG_C_FIXED_NEWSTYLE | p.NBD_FLAG_C_NO_ZEROES)


def begun() -> Negotiation:
    negotiation = Negotiation()
    negotiation.feed(FLAGS)
    return negotiation


def asked(negotiation: Negotiation, option: int, data: bytes = b"") -> Step | None:
    negotiation.feed(options.encode_option(option, data))
    return negotiation.next_step()


def reply_types(data: bytes) -> list[int]:
    types = []
    while data:
        _, _, reply, length = options.OPTION_REPLY.unpack_from(data)
        types.append(reply)
        data = data[options.OPTION_REPLY.size + length :]
    return types


def replied(step: Step | None) -> list[int]:
    assert isinstance(step, Reply)
    return reply_types(step.data)


def info_request(name: str) -> bytes:
    return options.encode_info_request(InfoRequest(name, (p.NBD_INFO_BLOCK_SIZE,)))


def context_query(name: str, *queries: str) -> bytes:
    return options.encode_context_query(ContextQuery(name, queries))


def test_unknown_client_flags_end_the_connection() -> None:
    negotiation = Negotiation()
    negotiation.feed(options.CLIENT_FLAGS.pack(1 << 7))
    assert isinstance(negotiation.next_step(), HangUp)


def test_go_enters_with_size_limits_and_description() -> None:
    negotiation = begun()
    step = asked(negotiation, p.NBD_OPT_GO, info_request("v"))
    assert step == Enter(p.NBD_OPT_GO, "v", (p.NBD_INFO_BLOCK_SIZE,))
    assert isinstance(step, Enter)
    answer = negotiation.entered(step, INFO)
    assert reply_types(answer) == [p.NBD_REP_INFO] * 3 + [p.NBD_REP_ACK]
    assert negotiation.next_step() is None


def test_info_describes_and_does_not_enter() -> None:
    negotiation = begun()
    step = asked(negotiation, p.NBD_OPT_INFO, info_request("v"))
    assert isinstance(step, Describe)
    assert reply_types(negotiation.described(step, INFO))[-1] == p.NBD_REP_ACK
    assert asked(negotiation, p.NBD_OPT_GO, info_request("v")) == Enter(
        p.NBD_OPT_GO, "v", (p.NBD_INFO_BLOCK_SIZE,)
    )


@pytest.mark.parametrize(("flags", "padding"), [(p.NBD_FLAG_C_FIXED_NEWSTYLE, 124), (3, 0)])
def test_export_name_is_answered_with_or_without_padding(flags: int, padding: int) -> None:
    negotiation = Negotiation()
    negotiation.feed(options.CLIENT_FLAGS.pack(flags))
    step = asked(negotiation, p.NBD_OPT_EXPORT_NAME, b"v")
    assert isinstance(step, Enter)
    assert len(negotiation.entered(step, INFO)) == options.EXPORT_NAME_REPLY.size + padding


def test_a_refused_go_tells_why_and_the_client_may_try_again() -> None:
    negotiation = begun()
    step = asked(negotiation, p.NBD_OPT_GO, info_request("v"))
    assert isinstance(step, Enter)
    answer = negotiation.refused(step, ExportRefused.forbidden("epoch 3 is older than 4"))
    assert replied(answer) == [p.NBD_REP_ERR_POLICY]
    assert b"epoch 3 is older than 4" in answer.data
    assert asked(negotiation, p.NBD_OPT_GO, info_request("w")) == Enter(
        p.NBD_OPT_GO, "w", (p.NBD_INFO_BLOCK_SIZE,)
    )


def test_a_refused_export_name_ends_the_connection() -> None:
    negotiation = begun()
    step = asked(negotiation, p.NBD_OPT_EXPORT_NAME, b"v")
    assert isinstance(step, Enter)
    assert isinstance(negotiation.refused(step, ExportRefused.unknown("v")), HangUp)


def test_list_names_every_export() -> None:
    negotiation = begun()
    assert asked(negotiation, p.NBD_OPT_LIST) == ListNames()
    answer = negotiation.listed([("a", ""), ("b", "second")])
    assert reply_types(answer) == [p.NBD_REP_SERVER, p.NBD_REP_SERVER, p.NBD_REP_ACK]


@pytest.mark.parametrize("option", [p.NBD_OPT_LIST, p.NBD_OPT_STRUCTURED_REPLY])
def test_options_without_data_refuse_data(option: int) -> None:
    assert replied(asked(begun(), option, b"x")) == [p.NBD_REP_ERR_INVALID]


def test_abort_is_acknowledged_and_ends() -> None:
    step = asked(begun(), p.NBD_OPT_ABORT)
    assert isinstance(step, HangUp)
    assert (reply_types(step.data), step.reason) == ([p.NBD_REP_ACK], "")


@pytest.mark.parametrize("option", [p.NBD_OPT_STARTTLS, p.NBD_OPT_EXTENDED_HEADERS, 4, 12, 0xFFFFFFFF])
def test_options_that_are_not_spoken_are_unsupported(option: int) -> None:
    assert replied(asked(begun(), option)) == [p.NBD_REP_ERR_UNSUP]


@pytest.mark.parametrize("option", [p.NBD_OPT_SET_META_CONTEXT, p.NBD_OPT_LIST_META_CONTEXT])
def test_meta_contexts_need_structured_replies(option: int) -> None:
    step = asked(begun(), option, context_query("v", p.BASE_ALLOCATION))
    assert replied(step) == [p.NBD_REP_ERR_INVALID]


@pytest.mark.parametrize(
    ("option", "queries", "selected"),
    [
        (p.NBD_OPT_SET_META_CONTEXT, ("base:allocation",), True),
        (p.NBD_OPT_SET_META_CONTEXT, ("x-other:thing", "base:allocation"), True),
        (p.NBD_OPT_SET_META_CONTEXT, ("base:",), False),
        (p.NBD_OPT_SET_META_CONTEXT, ("qemu:dirty-bitmap",), False),
        (p.NBD_OPT_SET_META_CONTEXT, (), False),
        (p.NBD_OPT_LIST_META_CONTEXT, (), True),
        (p.NBD_OPT_LIST_META_CONTEXT, ("base:",), True),
        (p.NBD_OPT_LIST_META_CONTEXT, ("base:allocation",), True),
        (p.NBD_OPT_LIST_META_CONTEXT, ("base:other",), False),
    ],
)
def test_meta_context_queries(option: int, queries: tuple[str, ...], selected: bool) -> None:
    negotiation = begun()
    asked(negotiation, p.NBD_OPT_STRUCTURED_REPLY)
    step = asked(negotiation, option, context_query("v", *queries))
    assert isinstance(step, Describe)
    types = reply_types(negotiation.described(step, INFO))
    assert types == ([p.NBD_REP_META_CONTEXT] if selected else []) + [p.NBD_REP_ACK]
    setting = option == p.NBD_OPT_SET_META_CONTEXT
    assert negotiation.context_export == ("v" if selected and setting else None)


def test_a_failed_set_meta_context_takes_the_earlier_selection_back() -> None:
    negotiation = begun()
    asked(negotiation, p.NBD_OPT_STRUCTURED_REPLY)
    step = asked(negotiation, p.NBD_OPT_SET_META_CONTEXT, context_query("v", p.BASE_ALLOCATION))
    assert isinstance(step, Describe)
    negotiation.described(step, INFO)
    assert negotiation.context_export == "v"
    assert replied(asked(negotiation, p.NBD_OPT_SET_META_CONTEXT, b"bad")) == [p.NBD_REP_ERR_INVALID]
    assert negotiation.context_export is None


def test_an_export_without_extents_offers_no_context() -> None:
    negotiation = begun()
    asked(negotiation, p.NBD_OPT_STRUCTURED_REPLY)
    step = asked(negotiation, p.NBD_OPT_SET_META_CONTEXT, context_query("v", p.BASE_ALLOCATION))
    assert isinstance(step, Describe)
    assert reply_types(negotiation.described(step, ExportInfo(4096))) == [p.NBD_REP_ACK]


def test_block_sizes_are_announced() -> None:
    negotiation = begun()
    step = asked(negotiation, p.NBD_OPT_GO, info_request("v"))
    assert isinstance(step, Enter)
    answer = negotiation.entered(step, ExportInfo(1 << 20, limits=BlockLimits(4096, 65536, 1 << 20)))
    assert options.encode_info_block_size(p.NBD_OPT_GO, BlockLimits(4096, 65536, 1 << 20)) in answer


def test_an_option_that_is_too_long_is_skipped_and_answered() -> None:
    negotiation = begun()
    length = OPTION_MAX_BYTES + 1
    negotiation.feed(options.OPTION.pack(p.IHAVEOPT, p.NBD_OPT_INFO, length))
    for _ in range(length):
        assert negotiation.next_step() is None
        negotiation.feed(b"x")
    assert replied(negotiation.next_step()) == [p.NBD_REP_ERR_TOO_BIG]
    assert asked(negotiation, p.NBD_OPT_LIST) == ListNames()


@pytest.mark.parametrize(
    "header",
    [
        options.OPTION.pack(p.IHAVEOPT, p.NBD_OPT_INFO, OPTION_SKIPPED_MAX_BYTES + 1),
        options.OPTION.pack(p.IHAVEOPT, p.NBD_OPT_EXPORT_NAME, p.STRING_MAX_BYTES + 1),
        options.OPTION.pack(p.NBDMAGIC, p.NBD_OPT_INFO, 0),
    ],
)
def test_option_headers_that_end_the_connection(header: bytes) -> None:
    negotiation = begun()
    negotiation.feed(header)
    assert isinstance(negotiation.next_step(), HangUp)


def test_endless_haggling_ends_the_connection() -> None:
    negotiation = begun()
    for _ in range(OPTIONS_MAX):
        assert asked(negotiation, p.NBD_OPT_LIST) == ListNames()
    assert isinstance(asked(negotiation, p.NBD_OPT_LIST), HangUp)


def test_requests_behind_the_last_option_are_kept_for_the_transmission() -> None:
    negotiation = begun()
    negotiation.feed(options.encode_option(p.NBD_OPT_GO, info_request("v")) + b"request")
    assert isinstance(negotiation.next_step(), Enter)
    assert negotiation.leftover == b"request"


def drive(negotiation: Negotiation) -> list[object]:
    steps: list[object] = []
    while step := negotiation.next_step():
        steps.append(step)
        match step:
            case Describe():
                steps.append(negotiation.described(step, INFO))
            case Enter():
                steps.append(negotiation.entered(step, INFO))
            case ListNames():
                steps.append(negotiation.listed([("v", "")]))
            case _:
                pass
    return steps


DIALOGUE = FLAGS + b"".join(
    [
        options.encode_option(p.NBD_OPT_STRUCTURED_REPLY),
        options.encode_option(p.NBD_OPT_LIST),
        options.encode_option(p.NBD_OPT_SET_META_CONTEXT, context_query("v", p.BASE_ALLOCATION)),
        options.encode_option(p.NBD_OPT_GO, info_request("v")),
    ]
)


@given(st.lists(st.integers(0, len(DIALOGUE)), max_size=20))
def test_a_dialogue_is_understood_however_it_is_cut(cuts: list[int]) -> None:
    whole = Negotiation()
    whole.feed(DIALOGUE)
    expected = drive(whole)
    pieces = Negotiation()
    steps = []
    edges = [0, *sorted(cuts), len(DIALOGUE)]
    for start, stop in itertools.pairwise(edges):
        pieces.feed(DIALOGUE[start:stop])
        steps += drive(pieces)
    assert steps == expected


@given(st.binary(max_size=300), st.integers(0, len(DIALOGUE)))
def test_garbage_never_raises(garbage: bytes, at: int) -> None:
    negotiation = Negotiation()
    negotiation.feed(DIALOGUE[:at] + garbage)
    drive(negotiation)
