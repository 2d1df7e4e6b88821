"""What goes wrong between a VIOS and its data processes, and how their own errors come through."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, TypeAlias

from farpage.errors import ExitStatus, FarpageError

Details: TypeAlias = Mapping[str, bool | int | float | str]


@dataclass(eq=False)
class DataProcessAway(FarpageError):
    """A volume's data process is not up."""

    code = "data_process_away"
    template = "data process {process} of the VIOS does not serve its volumes yet"
    remedy = "try again: it is started by itself; look into the VIOS' log if it stays away"
    exit_status = ExitStatus.UNREACHABLE
    process: int


@dataclass(eq=False)
class DataProcessLost(FarpageError):
    """A data process has ended before it answered; it may have done what it was asked for."""

    code = "data_process_lost"
    template = "data process {process} of the VIOS ended before it answered {request!r}"
    remedy = "try again: another one is started in its place; look into the VIOS' log for why it ended"
    exit_status = ExitStatus.UNREACHABLE
    process: int
    request: str


@dataclass(eq=False)
class DataProcessSilent(FarpageError):
    """A data process does not answer in time; it may have done what it was asked for all the same."""

    code = "data_process_silent"
    template = "data process {process} of the VIOS has not answered {request!r} for {seconds:g} s"
    remedy = "try again; look into the VIOS' log"
    exit_status = ExitStatus.UNREACHABLE
    process: int
    request: str
    seconds: float


class _Relayed(FarpageError):
    """An error of a data process, in its own words; a subclass has its code and exit status."""

    message: ClassVar[str]
    remedy_text: ClassVar[str]

    def __init__(self, details: Details) -> None:
        super().__init__()
        vars(self).update(details)

    @property
    def cause(self) -> str:
        """The thing and the cause."""
        return self.message

    @property
    def advice(self) -> str:
        """The remedy."""
        return self.remedy_text


def relayed(code: str, message: str, remedy: str, status: int, details: Details) -> FarpageError:
    """Return an error that came from a data process: for users, and for programs, as it was raised there."""
    words = {"code": code, "message": message, "remedy_text": remedy, "exit_status": ExitStatus(status)}
    kind: type[_Relayed] = type("Relayed", (_Relayed,), words)
    return kind(details)


def details_of(error: FarpageError) -> dict[str, bool | int | float | str]:
    """Return what programs look at in an error, as the control API does."""
    return {name: value for name, value in vars(error).items() if isinstance(value, bool | int | float | str)}
