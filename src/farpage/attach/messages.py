"""What a region and a hypervisor say to each other over the attach socket.

A frame is a 4-byte big-endian length and that many bytes of JSON. The region sends `AttachRequest` with two
descriptors (SCM_RIGHTS: its userfaultfd, its memfd) and gets an `AttachReply`. The connection then is the
region's lifeline: its end, or a `CloseRequest` (answered by a `CloseReply`), detaches the region. When the
hypervisor has been replaced, which ends the lifeline but not the paging, the region sends the `CloseRequest`
with its name on a new connection; the end of its process is noticed without one.
"""

from __future__ import annotations

import struct
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from farpage.definition.model import PAGE_BYTES, Name, Redundancy
from farpage.errors import FarpageError, InvalidInput

MAX_FRAME_BYTES = 64 << 10
"""Longer frames are refused, so that a peer cannot make the other allocate."""

HEADER = struct.Struct(">I")
ADDRESS_LIMIT = 1 << 57
"""End of the user half of an address space with five-level page tables."""


class Message(BaseModel):
    """Base of the messages: immutable, without unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class AttachRequest(Message):
    """A region's wish to be paged."""

    version: Literal[1] = 1
    name: Name | None = None
    """Name of the client; the hypervisor chooses one when there is none."""
    size_bytes: int = Field(gt=0, lt=ADDRESS_LIMIT, multiple_of=PAGE_BYTES)
    start_address: int = Field(gt=0, lt=ADDRESS_LIMIT, multiple_of=PAGE_BYTES)
    limit_bytes: int | None = Field(default=None, gt=0, lt=ADDRESS_LIMIT)
    """How much of it may be in RAM; the hypervisor's default when None."""
    uffd_number: int | None = Field(default=None, ge=0)
    """Number of the userfaultfd in the process's own descriptor table, where a hypervisor that was killed and
    started again finds it."""
    redundancy: Redundancy = Redundancy.PATH


class ErrorDocument(Message):
    """`FarpageError.as_document` on the wire."""

    code: str
    message: str
    remedy: str = ""


class AttachReply(Message):
    """The answer: the client's name when `ok`, the error when not."""

    ok: bool
    name: str | None = None
    error: ErrorDocument | None = None


class CloseRequest(Message):
    """The region is no longer used; its contents may be discarded."""

    request: Literal["close"]
    name: Name | None = None
    """The client's name, on a new connection: the lifeline ended with a hypervisor that has been replaced."""


class CloseReply(Message):
    """The region is not paged any more: its memory may be unmapped."""

    ok: bool
    error: ErrorDocument | None = None


AnyMessage = TypeVar("AnyMessage", bound=Message)


def encode(message: Message) -> bytes:
    """Return the frame of a message."""
    body = message.model_dump_json(exclude_none=True).encode()
    return HEADER.pack(len(body)) + body


def decode_length(header: bytes) -> int:
    """Return the length of the body that follows a header of `HEADER.size` bytes.

    :raise InvalidInput: when it is empty or longer than `MAX_FRAME_BYTES`.
    """
    length: int = HEADER.unpack(header)[0]
    if not 0 < length <= MAX_FRAME_BYTES:
        raise InvalidInput(
            "frame length",
            f"{length} is not from 1 to {MAX_FRAME_BYTES}",
            "send a length and one JSON document",
        )
    return length


def decode(kind: type[AnyMessage], body: bytes) -> AnyMessage:
    """Parse a frame's body.

    :raise InvalidInput: naming the first field that is wrong.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        field = ".".join(str(part) for part in first["loc"]) or "message"
        raise InvalidInput(field, first["msg"], f"send {kind.__name__} of version 1") from error


def error_document(error: FarpageError) -> ErrorDocument:
    """Return an error's form on the wire."""
    return ErrorDocument.model_validate(error.as_document())
