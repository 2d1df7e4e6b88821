"""What a front and its data processes say to each other.

What may be longer than a message of the channel comes in a file in memory, whose descriptor goes with it.
"""

from __future__ import annotations

import os
from typing import Any, TypeVar

import msgspec

from farpage.blockio import BlockLimits, Feature
from farpage.device.claim import Claim
from farpage.errors import FarpageError
from farpage.kernel.memory import create_memfd
from farpage.message import Message, encode
from farpage.nbd.export import ExportInfo
from farpage.nbd.negotiation import Agreed, Enter
from farpage.vios.processes.errors import details_of, relayed

LONGEST_BYTES = 1 << 16
"""What is longer is put into a file."""

Result = TypeVar("Result")


class Nothing(Message, frozen=True):
    """No parameters, or no result."""


class Begin(Message, frozen=True):
    """`begin`, with the definition, the epochs and the leases as descriptors: serve."""

    vios: str
    state_dir: str
    lease_seconds: float
    devices: list[str]


class Device(Message, frozen=True):
    """`device`: serve a device too."""

    spec: str


class Open(Message, frozen=True):
    """`open`, with the client's socket: serve it. What was negotiated, as `Enter` and `Agreed` have it."""

    option: int
    name: str
    information: list[int]
    structured_replies: bool
    context_export: str | None
    no_zeroes: bool
    leftover: bytes

    @classmethod
    def of(cls, step: Enter, agreed: Agreed) -> Open:
        """Say where a negotiation has come to."""
        return cls(
            option=step.option,
            name=step.name,
            information=list(step.information),
            structured_replies=agreed.structured_replies,
            context_export=agreed.context_export,
            no_zeroes=agreed.no_zeroes,
            leftover=agreed.leftover,
        )

    @property
    def step(self) -> Enter:
        """The option that the client sent."""
        return Enter(self.option, self.name, tuple(self.information))

    @property
    def agreed(self) -> Agreed:
        """What was agreed before."""
        return Agreed(self.structured_replies, self.context_export, self.no_zeroes, self.leftover)


class Refusal(Message, frozen=True):
    """The NBD_REP_ERR_* and its text, where an export is refused."""

    reply_type: int
    message: str


class Alive(Message, frozen=True):
    """The answer to `ping`."""

    open_exports: int
    """Connections that have a volume open."""


class Opened(Message, frozen=True):
    """The answer to `open`: the client is served or gone, or was refused and has got no answer."""

    refusal: Refusal | None = None


class Described(Message, frozen=True):
    """The answer to `describe`."""

    refusal: Refusal | None = None
    size_bytes: int = 0
    read_only: bool = False
    limits: tuple[int, int, int] = (1, 1, 1)
    features: int = 0
    description: str = ""

    @classmethod
    def of(cls, info: ExportInfo) -> Described:
        """Say what a client may know."""
        limits = info.limits
        return cls(
            size_bytes=info.size_bytes,
            read_only=info.read_only,
            limits=(limits.minimum, limits.preferred, limits.maximum),
            features=info.features.value,
            description=info.description,
        )

    @property
    def info(self) -> ExportInfo:
        """What a client may know."""
        limits, features = BlockLimits(*self.limits), Feature(self.features)
        return ExportInfo(self.size_bytes, self.read_only, limits, features, self.description)


class Volume(Message, frozen=True):
    """`describe` (an export's name), `delete`, `claim`, `flush`, `refuse`: a volume, and who asks."""

    name: str
    device: str = ""
    epoch: int | None = None
    owner: str = ""

    @property
    def claim(self) -> Claim:
        """The claim of an owner."""
        return Claim(self.epoch or 0, self.owner)


class Deleted(Message, frozen=True):
    """The answer to `delete`."""

    open: bool
    """Whether a volume of that name is open or copied yet: another replica."""


class VolumeId(Message, frozen=True):
    """The answer to `flush` and `refuse`."""

    device: str
    volume_id: str


class Claims(Message, frozen=True):
    """`claims`, in a file: give volumes to their owners, by name with epoch and token."""

    wanted: dict[str, tuple[int, str]]


class Report(Message, frozen=True):
    """`intermediary` with a report, and `copy_status` without: about a volume that is copied to a device."""

    name: str
    device: str
    report: str = ""
    """JSON."""


class Document(Message, frozen=True):
    """An answer that is a document of the control API."""

    json: str


class Epoch(Message, frozen=True):
    """`epoch`, of a data process: record that it was seen. `forget`: drop the volume's record."""

    volume_id: str
    epoch: int = 0
    owner: str = ""


class Failure(Message, frozen=True):
    """An error as users and programs see it."""

    code: str
    message: str
    remedy: str
    status: int
    details: dict[str, bool | int | float | str]

    @classmethod
    def of(cls, error: FarpageError) -> Failure:
        """Say what went wrong."""
        return cls(
            code=error.code,
            message=error.cause,
            remedy=error.advice,
            status=int(error.exit_status),
            details=details_of(error),
        )

    @property
    def error(self) -> FarpageError:
        """The error, to be raised again."""
        return relayed(self.code, self.message, self.remedy, self.status, self.details)


class Outcome(Message, frozen=True):
    """Every answer of a data process: what came of a request; the result may be in a file instead."""

    result: Any = None
    failure: Failure | None = None

    def read(self, kind: type[Result], descriptors: list[int]) -> Result:
        """Return the result; takes the descriptors over.

        :raise FarpageError: the error, if it is one.
        """
        content = [read_file(descriptor) for descriptor in descriptors]
        if self.failure is not None:
            raise self.failure.error
        return msgspec.json.decode(content[0], type=kind) if content else msgspec.convert(self.result, kind)


def file_of(content: bytes) -> int:
    """Return a file in memory with `content`; the descriptor is the caller's.

    :raise OSError: ENOMEM, EMFILE.
    """
    descriptor = create_memfd("farpage-message", 0)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_file(descriptor: int) -> bytes:
    """Return what is in a file in memory, and close it."""
    try:
        return os.pread(descriptor, os.fstat(descriptor).st_size, 0)
    finally:
        os.close(descriptor)


def encoded(message: object) -> bytes:
    """Return a message as bytes, for a file."""
    return encode(message)
