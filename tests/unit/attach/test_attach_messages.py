from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farpage.attach.messages import (
    HEADER,
    MAX_FRAME_BYTES,
    AttachReply,
    AttachRequest,
    CloseRequest,
    ErrorDocument,
    decode,
    decode_length,
    encode,
    error_document,
)
from farpage.definition.model import Redundancy
from farpage.errors import InvalidInput

REQUEST = AttachRequest(size_bytes=8192, start_address=0x7F0000000000)

pages = st.integers(min_value=1, max_value=(1 << 57) // 4096 - 1).map(lambda page: page * 4096)
requests = st.builds(
    AttachRequest,
    name=st.none() | st.from_regex(r"[a-z0-9][a-z0-9._-]{0,62}", fullmatch=True),
    size_bytes=pages,
    start_address=pages,
    limit_bytes=st.none() | st.integers(min_value=1, max_value=(1 << 57) - 1),
    redundancy=st.sampled_from(Redundancy),
)


@given(requests)
def test_a_request_survives_its_frame(request: AttachRequest) -> None:
    frame = encode(request)
    assert decode_length(frame[: HEADER.size]) == len(frame) - HEADER.size
    assert decode(AttachRequest, frame[HEADER.size :]) == request


@given(st.binary(max_size=200))
def test_any_other_body_is_invalid_input(body: bytes) -> None:
    with pytest.raises(InvalidInput):
        decode(AttachRequest, body)


@pytest.mark.parametrize("length", [0, MAX_FRAME_BYTES + 1, 0xFFFFFFFF])
def test_empty_and_long_frames_are_refused(length: int) -> None:
    with pytest.raises(InvalidInput, match="frame length"):
        decode_length(HEADER.pack(length))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("version", 2),
        ("name", "No Name"),
        ("size_bytes", 4097),
        ("size_bytes", 0),
        ("size_bytes", 1 << 57),
        ("start_address", 1),
        ("start_address", -4096),
        ("limit_bytes", 0),
        ("redundancy", "raid6"),
        ("surprise", 1),
    ],
)
def test_a_wrong_field_is_named(field: str, value: object) -> None:
    document = REQUEST.model_dump(mode="json") | {field: value}
    with pytest.raises(InvalidInput) as caught:
        decode(AttachRequest, str(document).replace("'", '"').replace("None", "null").encode())
    assert caught.value.field == field


def test_an_error_keeps_its_code_message_and_remedy() -> None:
    error = InvalidInput("limit_bytes", "too little", "ask for more")
    reply = AttachReply(ok=False, error=error_document(error))
    assert decode(AttachReply, encode(reply)[HEADER.size :]).error == ErrorDocument(
        code="invalid_input", message="limit_bytes: too little", remedy="ask for more"
    )


def test_the_close_request_is_as_documented() -> None:
    assert encode(CloseRequest(request="close"))[HEADER.size :] == b'{"request":"close"}'
