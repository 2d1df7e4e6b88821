"""What a data worker refuses."""

from __future__ import annotations

from dataclasses import dataclass

from farpage.errors import ExitStatus, FarpageError


@dataclass(eq=False)
class ClientExited(FarpageError):
    """The client's process ended during a request."""

    code = "client_exited"
    template = "client {client!r} exited meanwhile"
    remedy = "nothing is left to be done: its memory is gone"
    exit_status = ExitStatus.NOT_FOUND
    client: str


@dataclass(eq=False)
class NotAttached(FarpageError):
    """The worker does not page that client."""

    code = "not_attached"
    template = "client {client!r} is not attached"
    remedy = "attach it with 'farpage client attach {client} --pid PID'"
    exit_status = ExitStatus.CONFLICT
    client: str


@dataclass(eq=False)
class ScrubUnderWay(FarpageError):
    """One scrub of a client at a time."""

    code = "scrub_under_way"
    template = "client {client!r} is being scrubbed already"
    remedy = (
        "watch it with 'farpage client show {client}', or end it with 'farpage client scrub {client} --stop'"
    )
    exit_status = ExitStatus.CONFLICT
    client: str


@dataclass(eq=False)
class PagesLost(FarpageError):
    """A client with lost pages is not let go where accesses to them would read zeros."""

    code = "pages_lost"
    template = (
        "client {client!r} has lost pages, and this kernel cannot make accesses to them fail: "
        "once it is detached they would read zeros"
    )
    remedy = "end its process; with Linux 6.6 or newer accesses to such pages fail, and it can be detached"
    exit_status = ExitStatus.CONFLICT
    client: str
