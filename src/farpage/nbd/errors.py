"""What can go wrong between an NBD client and a server, as users read it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from farpage.errors import ExitStatus, FarpageError
from farpage.nbd import protocol as p


@dataclass(eq=False)
class ExportRefused(FarpageError):
    """Raised by an `ExportProvider`: this peer does not get this export.

    The message becomes the text of the option's error reply, so it must not tell more than the peer may know.
    """

    code = "export_refused"
    template = "{message}"
    exit_status = ExitStatus.NOT_FOUND
    reply_type: int
    """An NBD_REP_ERR_* value."""
    message: str

    @classmethod
    def unknown(cls, name: str) -> ExportRefused:
        """Return the refusal of an export that does not exist, or that the peer must not see."""
        return cls(p.NBD_REP_ERR_UNKNOWN, f"export {name!r} is not available here")

    @classmethod
    def forbidden(cls, message: str) -> ExportRefused:
        """Return the refusal of an export that exists but is not for this peer, or not now."""
        return cls(p.NBD_REP_ERR_POLICY, message)


@dataclass(eq=False)
class ConnectFailed(FarpageError):
    """Base: no connection to an export came about."""

    code = "nbd_connect_failed"
    template = "NBD export {export!r} at {address}: {reason}"
    exit_status: ClassVar[ExitStatus] = ExitStatus.UNREACHABLE
    export: str
    address: str
    reason: str
    """What happened; the server's own words where it sent some."""


@dataclass(eq=False)
class ServerRefused(ConnectFailed):
    """The server answered and does not give out this export."""

    code = "nbd_refused"
    template = "NBD export {export!r} at {address}: the server refuses it ({reply}): {reason}"
    remedy = "check the export's name with 'nbdinfo --list', and that this client may use it"
    exit_status = ExitStatus.NOT_FOUND
    reply: str
    """The reply's name in the specification, as NBD_REP_ERR_UNKNOWN."""


@dataclass(eq=False)
class ServerUnreachable(ConnectFailed):
    """Nobody accepts connections at the address, or the connection broke during the handshake."""

    code = "nbd_unreachable"
    template = "NBD export {export!r} at {address}: the server cannot be reached: {reason}"
    remedy = "check that the server runs and listens at this address"


@dataclass(eq=False)
class HandshakeTimedOut(ConnectFailed):
    """The server accepted the connection and did not finish the handshake in time."""

    code = "nbd_handshake_timeout"
    template = "NBD export {export!r} at {address}: no answer to the handshake: {reason}"
    remedy = "check that the server's process is not stopped or overloaded"


@dataclass(eq=False)
class ServerViolatedProtocol(ConnectFailed):
    """The server's answer is no NBD, or not what the specification allows."""

    code = "nbd_protocol_violation"
    template = "NBD export {export!r} at {address}: the server does not keep to the NBD protocol: {reason}"
    remedy = "check that an NBD server with the fixed newstyle handshake listens at this address"


@dataclass(eq=False)
class ConnectionEnded(FarpageError):
    """An established connection is gone; what `Connection.on_lost` is called with."""

    code = "nbd_connection_lost"
    template = "NBD export {export!r} at {address}: the connection ended: {reason}"
    remedy = "connect again"
    exit_status = ExitStatus.UNREACHABLE
    export: str
    address: str
    reason: str
