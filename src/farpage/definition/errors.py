"""What can be wrong with a definition, with a change of it, or with its store."""

from __future__ import annotations

from dataclasses import dataclass

from farpage.errors import ExitStatus, FarpageError


@dataclass(eq=False)
class InvalidDefinition(FarpageError):
    """The document contradicts itself."""

    code = "invalid_definition"
    template = "definition revision {revision}: {problems}"
    remedy = "correct it and send it again; nothing was changed"
    exit_status = ExitStatus.USAGE
    revision: int
    problems: str


@dataclass(eq=False)
class RevisionConflict(FarpageError):
    """Somebody else changed the definition meanwhile."""

    code = "revision_conflict"
    template = "the definition is at revision {current_revision}, not {expected_revision}"
    remedy = "read the definition again, repeat the change on it and send that"
    exit_status = ExitStatus.CONFLICT
    expected_revision: int
    current_revision: int


@dataclass(eq=False)
class ClientExists(FarpageError):
    """The name is taken."""

    code = "client_exists"
    template = "client {client!r} exists already"
    remedy = "choose another name; 'farpage client list' shows those in use"
    exit_status = ExitStatus.CONFLICT
    client: str


@dataclass(eq=False)
class ClientMissing(FarpageError):
    """There is no such client."""

    code = "client_not_found"
    template = "client {client!r} is not in the definition"
    remedy = "list the clients with 'farpage client list'"
    exit_status = ExitStatus.NOT_FOUND
    client: str


@dataclass(eq=False)
class NotTheOwner(FarpageError):
    """A change of a client by somebody who has it no more."""

    code = "not_the_owner"
    template = "client {client!r} has been claimed by another owner at epoch {epoch}"
    remedy = "let only one hypervisor have the client: detach it from the other one first"
    exit_status = ExitStatus.CONFLICT
    client: str
    epoch: int


@dataclass(eq=False)
class NoDeviceFits(FarpageError):
    """No paging device can take the new client's volume."""

    code = "no_device_fits"
    template = "no paging device fits client {client!r} with {size_bytes} bytes: {reasons}"
    remedy = "add a device with 'farpage device add', or ask for less memory or redundancy"
    exit_status = ExitStatus.CONFLICT
    client: str
    size_bytes: int
    reasons: str


@dataclass(eq=False)
class DeviceMismatch(FarpageError):
    """Two VIOS describe a device of one identifier differently."""

    code = "device_mismatch"
    template = "device {device} is {found} for VIOS {vios!r} and {known} in the definition"
    remedy = "one of them has a copy: give the copy a label of its own"
    exit_status = ExitStatus.CONFLICT
    device: str
    vios: str
    found: str
    known: str


@dataclass(eq=False)
class StoreFailed(FarpageError):
    """The database's file cannot be opened, read or written."""

    code = "store_failed"
    template = "the definition's store {path} failed: {problem}"
    remedy = "check that the folder exists and can be written, and that its file system has room"
    path: str
    problem: str


@dataclass(eq=False)
class StoreDamaged(FarpageError):
    """The database cannot be read."""

    code = "store_damaged"
    template = "the definition's store {path} cannot be used: {problem}"
    remedy = (
        "move the file (and those with -wal and -shm) away and start again: "
        "the hypervisor brings the definition from another VIOS"
    )
    path: str
    problem: str


@dataclass(eq=False)
class DeviceMissing(FarpageError):
    """There is no such device."""

    code = "device_not_found"
    template = "device {device!r} is not in the definition; these are: {known}"
    remedy = "list the devices with 'farpage device list'; add one with 'farpage device add'"
    exit_status = ExitStatus.NOT_FOUND
    device: str
    known: str


@dataclass(eq=False)
class NotMovable(FarpageError):
    """A client's volume cannot be moved to that device."""

    code = "not_movable"
    template = "client {client!r} cannot be moved to device {device!r}: {problems}"
    remedy = "see 'farpage path explain {client} --to {device}'; nothing was changed"
    exit_status = ExitStatus.CONFLICT
    client: str
    device: str
    problems: str


@dataclass(eq=False)
class MoveMissing(FarpageError):
    """The client is not being moved."""

    code = "move_not_found"
    template = "client {client!r} is not being moved"
    remedy = "begin with 'farpage client move {client} --to DEVICE'"
    exit_status = ExitStatus.NOT_FOUND
    client: str


@dataclass(eq=False)
class MoveUnderWay(FarpageError):
    """The client is being moved already."""

    code = "move_under_way"
    template = "client {client!r} is being moved already"
    remedy = (
        "see how far it is with 'farpage client move-status {client}', or end that with "
        "'farpage client cancel-move {client}'; nothing was changed"
    )
    exit_status = ExitStatus.CONFLICT
    client: str


@dataclass(eq=False)
class MoveOver(FarpageError):
    """The move has come too far for this."""

    code = "move_over"
    template = "the move of client {client!r} is {state}, so {what}"
    remedy = "see 'farpage client move-status {client}'"
    exit_status = ExitStatus.CONFLICT
    client: str
    state: str
    what: str


@dataclass(eq=False)
class NotReplaceable(FarpageError):
    """One device cannot take the place of another."""

    code = "not_replaceable"
    template = "device {old!r} cannot be replaced by {new!r}: {problems}"
    remedy = "name a device that takes them all ('farpage device list'); nothing was changed"
    exit_status = ExitStatus.CONFLICT
    old: str
    new: str
    problems: str
