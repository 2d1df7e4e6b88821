"""The server's side of the fixed newstyle handshake, as a state machine without I/O.

The driver feeds bytes and takes steps until one of them ends the handshake:

    negotiation.feed(data)
    while step := negotiation.next_step():
        ...  # send a Reply; look up what Describe, ListNames or Enter ask for, send what the answer returns

STARTTLS is answered "not supported". A transport that can do TLS would get a step of its own for it, after
which the machine starts again with `structured_replies` and `context_export` forgotten.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, TypeAlias

from farpage.blockio import Feature, Lent
from farpage.nbd import codec, options
from farpage.nbd import protocol as p
from farpage.nbd.codec import ProtocolViolation
from farpage.nbd.errors import ExportRefused
from farpage.nbd.export import ExportInfo

OPTIONS_MAX: Final = 64
"""Options that one client may send; a real one needs less than ten."""
OPTION_MAX_BYTES: Final = 16 << 10
"""Options with more data than this are skipped and answered NBD_REP_ERR_TOO_BIG."""
OPTION_SKIPPED_MAX_BYTES: Final = 1 << 20
"""Options with more data than this end the connection."""

GREETING: Final = options.GREETING.pack(
    p.NBDMAGIC, p.IHAVEOPT, p.NBD_FLAG_FIXED_NEWSTYLE | p.NBD_FLAG_NO_ZEROES
)
"""What a server sends first."""


@dataclass(frozen=True)
class Reply:
    """Send `data` and go on."""

    data: bytes


@dataclass(frozen=True)
class HangUp:
    """Send `data`, then close; `reason` is empty when the client asked for it."""

    data: bytes
    reason: str


@dataclass(frozen=True)
class ListNames:
    """Answer with `Negotiation.listed`."""


@dataclass(frozen=True)
class Describe:
    """Look `name` up without opening it; answer with `described` or `refused`."""

    option: int
    name: str
    queries: tuple[str, ...] = ()
    information: tuple[int, ...] = ()


@dataclass(frozen=True)
class Enter:
    """Open `name`; answer with `entered` (the handshake is over) or `refused`."""

    option: int
    name: str
    information: tuple[int, ...] = ()

    @property
    def wants_descriptor(self) -> bool:
        """Whether the client would read the storage itself."""
        return p.NBD_INFO_DESCRIPTOR in self.information

    @property
    def wants_process(self) -> bool:
        """Whether the client would watch the process that serves it."""
        return p.NBD_INFO_PROCESS in self.information


@dataclass(frozen=True)
class Agreed:
    """What another process needs to know to answer an `Enter` in this one's place and go on from there."""

    structured_replies: bool
    context_export: str | None
    no_zeroes: bool
    leftover: bytes


Step: TypeAlias = Reply | HangUp | ListNames | Describe | Enter


class _State(enum.Enum):
    CLIENT_FLAGS = enum.auto()
    OPTION_HEADER = enum.auto()
    OPTION_DATA = enum.auto()
    OPTION_SKIPPED = enum.auto()
    ENDED = enum.auto()


class Negotiation:
    """One client's handshake."""

    structured_replies: bool
    context_export: str | None
    """Export for which base:allocation was selected last."""
    block_status: bool
    """Whether that is the export that was entered."""

    def __init__(self) -> None:
        self.structured_replies = False
        self.context_export = None
        self.block_status = False
        self._state = _State.CLIENT_FLAGS
        self._buffer = bytearray()
        self._no_zeroes = False
        self._options = 0
        self._option = 0
        self._length = 0

    @classmethod
    def resumed(cls, agreed: Agreed) -> Negotiation:
        """Return one that has come to an `Enter` elsewhere, with what was agreed there."""
        negotiation = cls()
        negotiation.structured_replies = agreed.structured_replies
        negotiation.context_export = agreed.context_export
        negotiation._no_zeroes = agreed.no_zeroes
        negotiation._buffer += agreed.leftover
        negotiation._state = _State.OPTION_HEADER
        return negotiation

    @property
    def agreed(self) -> Agreed:
        """What was agreed so far, with the bytes that have come after the last option."""
        return Agreed(self.structured_replies, self.context_export, self._no_zeroes, self.leftover)

    def feed(self, data: bytes) -> None:
        """Take bytes from the client; at most one option's worth of them is ever kept."""
        self._buffer += data

    @property
    def leftover(self) -> bytes:
        """Bytes after the last option: requests of a client that did not wait for the answer."""
        return bytes(self._buffer)

    def next_step(self) -> Step | None:  # noqa: PLR0911 (one return for each state)
        """Return what to do next; None if more bytes are needed."""
        while True:
            match self._state:
                case _State.CLIENT_FLAGS:
                    if len(self._buffer) < options.CLIENT_FLAGS.size:
                        return None
                    (flags,) = options.CLIENT_FLAGS.unpack(self._take(options.CLIENT_FLAGS.size))
                    if flags & ~(p.NBD_FLAG_C_FIXED_NEWSTYLE | p.NBD_FLAG_C_NO_ZEROES):
                        return self._hang_up(f"unknown client flags {flags:#x}")
                    self._no_zeroes = bool(flags & p.NBD_FLAG_C_NO_ZEROES)
                    self._state = _State.OPTION_HEADER
                case _State.OPTION_HEADER:
                    if len(self._buffer) < options.OPTION.size:
                        return None
                    problem = self._begin_option(self._take(options.OPTION.size))
                    if problem:
                        return self._hang_up(problem)
                case _State.OPTION_DATA:
                    if len(self._buffer) < self._length:
                        return None
                    self._state = _State.OPTION_HEADER
                    return self._answer(self._option, self._take(self._length))
                case _State.OPTION_SKIPPED:
                    skipped = min(len(self._buffer), self._length)
                    del self._buffer[:skipped]
                    self._length -= skipped
                    if self._length:
                        return None
                    self._state = _State.OPTION_HEADER
                    return self._error(self._option, p.NBD_REP_ERR_TOO_BIG, "the option is too long")
                case _State.ENDED:
                    return None

    def listed(self, names: Iterable[tuple[str, str]]) -> bytes:
        """Return the answer to `ListNames`."""
        replies = [options.encode_server(p.NBD_OPT_LIST, name, description) for name, description in names]
        return b"".join([*replies, options.encode_option_reply(p.NBD_OPT_LIST, p.NBD_REP_ACK)])

    def described(self, step: Describe, info: ExportInfo) -> bytes:
        """Return the answer to `Describe`."""
        acknowledgement = options.encode_option_reply(step.option, p.NBD_REP_ACK)
        if step.option == p.NBD_OPT_INFO:
            return self._information(step.option, info) + acknowledgement
        selected = Feature.EXTENTS in info.features and _selects(step)
        if step.option == p.NBD_OPT_SET_META_CONTEXT and selected:
            self.context_export = step.name
        if not selected:
            return acknowledgement
        context_id = codec.CONTEXT_ID if step.option == p.NBD_OPT_SET_META_CONTEXT else 0
        return options.encode_meta_context(step.option, context_id, p.BASE_ALLOCATION) + acknowledgement

    def entered(
        self, step: Enter, info: ExportInfo, lent: Lent | None = None, *, told: bool | None = None
    ) -> bytes:
        """Return the answer to `Enter` that begins the transmission phase.

        What is lent goes with it, and before that the serving process' pidfd if it is `told`; False for one
        that cannot be, None where the process that listens serves.
        """
        self._state = _State.ENDED
        self.block_status = self.context_export == step.name
        if step.option == p.NBD_OPT_GO:
            described = self._information(step.option, info)
            if told is not None and step.wants_process:
                described += options.encode_info_process(step.option, told=told)
            if lent is not None:
                described += options.encode_info_descriptor(step.option, lent.origin_bytes)
            return described + options.encode_option_reply(step.option, p.NBD_REP_ACK)
        reply = options.EXPORT_NAME_REPLY.pack(info.size_bytes, self.flags(info))
        return reply if self._no_zeroes else reply + options.EXPORT_NAME_PADDING

    def refused(self, step: Describe | Enter, refusal: ExportRefused) -> Reply | HangUp:
        """Return the answer to a `Describe` or `Enter` that was refused."""
        if step.option == p.NBD_OPT_EXPORT_NAME:  # the one option that has no error reply
            return self._hang_up(refusal.message)
        return Reply(options.encode_option_error(step.option, refusal.reply_type, refusal.message))

    def flags(self, info: ExportInfo) -> int:
        """Return the transmission flags that this client is told."""
        return options.transmission_flags(
            info.features, read_only=info.read_only, structured=self.structured_replies
        )

    def _take(self, length: int) -> bytes:
        data = bytes(self._buffer[:length])
        del self._buffer[:length]
        return data

    def _begin_option(self, header: bytes) -> str:
        magic, self._option, self._length = options.OPTION.unpack(header)
        self._options += 1
        if magic != p.IHAVEOPT:
            return "an option does not begin with IHAVEOPT"
        if self._options > OPTIONS_MAX:
            return f"more than {OPTIONS_MAX} options"
        if self._length > OPTION_SKIPPED_MAX_BYTES:
            return f"an option of {self._length} bytes"
        # EXPORT_NAME has no error reply, so what is too long for a name cannot be answered.
        if self._option == p.NBD_OPT_EXPORT_NAME and self._length > p.STRING_MAX_BYTES:
            return f"an export name of {self._length} bytes"
        self._state = _State.OPTION_SKIPPED if self._length > OPTION_MAX_BYTES else _State.OPTION_DATA
        return ""

    def _answer(self, option: int, data: bytes) -> Step:
        try:
            return self._dispatch(option, data)
        except ProtocolViolation as violation:
            if option == p.NBD_OPT_EXPORT_NAME:
                return self._hang_up(str(violation))
            return self._error(option, p.NBD_REP_ERR_INVALID, str(violation))

    def _dispatch(self, option: int, data: bytes) -> Step:  # noqa: PLR0911 (one return for each option)
        match option:
            case p.NBD_OPT_EXPORT_NAME:
                return Enter(option, options.parse_string(data))
            case p.NBD_OPT_GO:
                request = options.parse_info_request(data)
                return Enter(option, request.name, request.information)
            case p.NBD_OPT_INFO:
                request = options.parse_info_request(data)
                return Describe(option, request.name, information=request.information)
            case p.NBD_OPT_ABORT:
                return self._hang_up("", options.encode_option_reply(option, p.NBD_REP_ACK))
            case p.NBD_OPT_LIST:
                _require_empty(data)
                return ListNames()
            case p.NBD_OPT_STRUCTURED_REPLY:
                _require_empty(data)
                self.structured_replies = True
                return Reply(options.encode_option_reply(option, p.NBD_REP_ACK))
            case p.NBD_OPT_LIST_META_CONTEXT | p.NBD_OPT_SET_META_CONTEXT:
                if option == p.NBD_OPT_SET_META_CONTEXT:
                    self.context_export = None  # replaced even when the option fails
                query = options.parse_context_query(data)
                if not self.structured_replies:
                    raise ProtocolViolation("structured replies must be negotiated first")
                return Describe(option, query.name, queries=query.queries)
            case p.NBD_OPT_STARTTLS:
                return self._error(option, p.NBD_REP_ERR_UNSUP, "this server has no TLS")
            case _:
                return self._error(option, p.NBD_REP_ERR_UNSUP, "this server does not know the option")

    def _information(self, option: int, info: ExportInfo) -> bytes:
        parts = [
            options.encode_info_export(option, info.size_bytes, self.flags(info)),
            options.encode_info_block_size(option, options.advertised_limits(info.limits)),
        ]
        if info.description:
            parts.append(options.encode_info_text(option, p.NBD_INFO_DESCRIPTION, info.description))
        return b"".join(parts)

    def _error(self, option: int, reply_type: int, message: str) -> Reply:
        return Reply(options.encode_option_error(option, reply_type, message))

    def _hang_up(self, reason: str, data: bytes = b"") -> HangUp:
        self._state = _State.ENDED
        return HangUp(data, reason)


def _require_empty(data: bytes) -> None:
    if data:
        raise ProtocolViolation("the option takes no data")


def _selects(step: Describe) -> bool:
    """Say whether the queries ask for base:allocation ("Metadata querying")."""
    if p.BASE_ALLOCATION in step.queries:
        return True
    return step.option == p.NBD_OPT_LIST_META_CONTEXT and (not step.queries or "base:" in step.queries)
