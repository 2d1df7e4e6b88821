"""The errors that reach a user: each names the thing, the cause and the remedy.

A subclass is a dataclass whose fields are the typed attributes of its templates:

    @dataclass(eq=False)
    class VolumeNotFound(FarpageError):
        code = "volume_not_found"
        template = "volume {volume!r} is not on VIOS {vios!r}"
        remedy = "list the volumes with 'farpage vios show {vios}'"
        exit_status = ExitStatus.NOT_FOUND
        volume: str
        vios: str
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Any, ClassVar


class ExitStatus(enum.IntEnum):
    """What the `farpage` command returns to its shell."""

    OK = 0
    FAILURE = 1
    """The command ran and what it was asked for failed."""
    USAGE = 2
    """The command line, a configuration file or a request is wrong; nothing was changed."""
    NOT_FOUND = 3
    """A named client, device, VIOS or volume does not exist."""
    CONFLICT = 4
    """The thing exists, is in use, or was changed by somebody else meanwhile."""
    UNREACHABLE = 5
    """A daemon that the command needs does not answer."""
    UNSUPPORTED = 6
    """This kernel, machine or installation lacks something that the command needs."""


@dataclass(eq=False)
class FarpageError(Exception):
    """Base of every error that farpage raises on purpose."""

    code: ClassVar[str] = "error"
    """Stable, machine-readable name of the kind of error."""
    template: ClassVar[str] = "something failed"
    """What happened to which thing, and why; formatted with the attributes."""
    remedy: ClassVar[str] = ""
    """What the reader can do about it; formatted with the attributes."""
    exit_status: ClassVar[ExitStatus] = ExitStatus.FAILURE

    @property
    def cause(self) -> str:
        """The thing and the cause, in one sentence without the remedy."""
        return self.template.format_map(vars(self))

    @property
    def advice(self) -> str:
        """The remedy, formatted; empty where there is none."""
        return self.remedy.format_map(vars(self))

    def as_document(self) -> dict[str, Any]:
        """Return the JSON form that the control APIs answer with."""
        return {"code": self.code, "message": self.cause, "remedy": self.advice}

    def __str__(self) -> str:
        return f"{self.cause}; {self.advice}" if self.advice else self.cause


@dataclass(eq=False)
class InvalidInput(FarpageError):
    """A value from a command line, a configuration or a request is not acceptable."""

    code = "invalid_input"
    template = "{field}: {problem}"
    remedy = "{hint}"
    exit_status = ExitStatus.USAGE
    field: str
    problem: str
    hint: str


@dataclass(eq=False)
class Unsupported(FarpageError):
    """This kernel, machine or installation lacks something needed."""

    code = "unsupported"
    template = "{what} is not available: {cause_text}"
    remedy = "{hint}"
    exit_status = ExitStatus.UNSUPPORTED
    what: str
    cause_text: str
    hint: str


@dataclass(eq=False)
class Unreachable(FarpageError):
    """A daemon does not answer at its address."""

    code = "unreachable"
    template = "{who} at {address} does not answer: {cause_text}"
    remedy = "{hint}"
    exit_status = ExitStatus.UNREACHABLE
    who: str
    address: str
    cause_text: str
    hint: str
