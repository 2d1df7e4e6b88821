"""A handshake that begins in one process and ends in another one."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farpage.blockio import BlockLimits, Feature
from farpage.nbd import options
from farpage.nbd import protocol as p
from farpage.nbd.codec import ProtocolViolation
from farpage.nbd.export import ExportInfo
from farpage.nbd.negotiation import Describe, Enter, Negotiation
from farpage.nbd.options import ContextQuery, InfoRequest, ProcessTold

INFO = ExportInfo(1 << 20, features=Feature.FLUSH | Feature.EXTENTS, description="a disk")


def entering(negotiation: Negotiation, data: bytes) -> Enter:
    """Feed a client's options, and answer until it asks for an export."""
    negotiation.feed(data)
    while not isinstance(step := negotiation.next_step(), Enter):
        assert step is not None
        if isinstance(step, Describe):
            negotiation.described(step, INFO)
    return step


@given(
    no_zeroes=st.booleans(),
    structured=st.booleans(),
    context=st.sampled_from(["", "v", "w"]),
    by_name=st.booleans(),
    leftover=st.binary(max_size=64),
)
def test_the_answer_is_the_same_as_in_the_process_that_began(
    *, no_zeroes: bool, structured: bool, context: str, by_name: bool, leftover: bytes
) -> None:
    flags = p.NBD_FLAG_C_FIXED_NEWSTYLE | (p.NBD_FLAG_C_NO_ZEROES if no_zeroes else 0)
    data = options.CLIENT_FLAGS.pack(flags)
    if structured:
        data += options.encode_option(p.NBD_OPT_STRUCTURED_REPLY)
        if context:
            query = options.encode_context_query(ContextQuery(context, (p.BASE_ALLOCATION,)))
            data += options.encode_option(p.NBD_OPT_SET_META_CONTEXT, query)
    if by_name:
        data += options.encode_option(p.NBD_OPT_EXPORT_NAME, b"v")
    else:
        request = options.encode_info_request(InfoRequest("v", ()))
        data += options.encode_option(p.NBD_OPT_GO, request)
    whole = Negotiation()
    step = entering(whole, data + leftover)
    resumed = Negotiation.resumed(whole.agreed)
    assert resumed.entered(step, INFO) == whole.entered(step, INFO)
    assert (resumed.structured_replies, resumed.block_status, resumed.leftover) == (
        structured,
        structured and context == "v",
        leftover,
    )


def test_the_serving_process_is_told_to_those_who_ask() -> None:
    asks = Enter(p.NBD_OPT_GO, "v", (p.NBD_INFO_PROCESS,))
    informations = {
        told: Negotiation()
        .entered(asks, INFO, told=told)
        .count(options.encode_info_process(asks.option, told=True))
        for told in (True, False, None)
    }
    assert informations == {True: 1, False: 0, None: 0}
    does_not = Enter(p.NBD_OPT_GO, "v")
    assert Negotiation().entered(does_not, INFO, told=True) == Negotiation().entered(does_not, INFO)


def test_what_is_told_of_a_process_is_checked() -> None:
    for told in (True, False):
        reply = options.encode_info_process(p.NBD_OPT_GO, told=told)
        assert options.parse_info(reply[options.OPTION_REPLY.size :]) == ProcessTold(told)
    with pytest.raises(ProtocolViolation, match="NBD_INFO_PROCESS has a wrong length"):
        options.parse_info(p.NBD_INFO_PROCESS.to_bytes(2, "big"))
    assert isinstance(options.parse_info(b"\0\3\0\0\0\1\0\0\0\1\0\0\0\1"), BlockLimits)
