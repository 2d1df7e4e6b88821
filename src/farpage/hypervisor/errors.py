"""What can be wrong with a request to the hypervisor."""

from __future__ import annotations

from dataclasses import dataclass

from farpage.errors import ExitStatus, FarpageError


@dataclass(eq=False)
class ClientAttached(FarpageError):
    """The client's memory is being paged."""

    code = "client_attached"
    template = "client {client!r} is attached to process {pid}"
    remedy = "detach it first: 'farpage client detach {client}'"
    exit_status = ExitStatus.CONFLICT
    client: str
    pid: int


@dataclass(eq=False)
class ClientNotAttached(FarpageError):
    """The client's memory is not being paged."""

    code = "client_not_attached"
    template = "client {client!r} is not attached"
    remedy = "attach it with 'farpage client attach {client} --pid PID'"
    exit_status = ExitStatus.CONFLICT
    client: str


@dataclass(eq=False)
class WorkerReplaced(FarpageError):
    """A data worker that has ended wanted something."""

    code = "worker_replaced"
    template = "client {client!r} has another data worker than the one of epoch {epoch}"
    remedy = "nothing is left to be done: the one that it has now asks for what it wants itself"
    exit_status = ExitStatus.CONFLICT
    client: str
    epoch: int


@dataclass(eq=False)
class ClientBusy(FarpageError):
    """Another request about the client is under way."""

    code = "client_busy"
    template = "another request about client {client!r} is under way: {what}"
    remedy = "wait until it has ended; 'farpage client show {client}' tells"
    exit_status = ExitStatus.CONFLICT
    client: str
    what: str


@dataclass(eq=False)
class ClientElsewhere(FarpageError):
    """Another hypervisor has claimed the client."""

    code = "client_elsewhere"
    template = "client {client!r} belongs to hypervisor {hypervisor!r} since epoch {epoch}"
    remedy = "ask that hypervisor for it; or attach the client here, which takes it over"
    exit_status = ExitStatus.CONFLICT
    client: str
    hypervisor: str
    epoch: int


@dataclass(eq=False)
class ClientRuns(FarpageError):
    """What runs cannot be released without being held up for good."""

    code = "client_runs"
    template = "client {client!r} cannot be released: its process {pid} runs"
    remedy = (
        "stop the VM ('--qmp SOCKET' does), or the process ('kill -STOP {pid}'); with '--force' it is "
        "released as it runs, and its accesses to memory wait from then on until it is ended"
    )
    exit_status = ExitStatus.CONFLICT
    client: str
    pid: int


@dataclass(eq=False)
class ClientMoving(FarpageError):
    """A client's volume is on its way to another device."""

    code = "client_moving"
    template = "client {client!r} cannot be released while its volume is moved to another device"
    remedy = "wait until the move has ended, or cancel it; 'farpage client show {client}' tells how far it is"
    exit_status = ExitStatus.CONFLICT
    client: str


@dataclass(eq=False)
class MemoryTooLarge(FarpageError):
    """The memory found is larger than what the client was created for."""

    code = "memory_too_large"
    template = "client {client!r} was created for {created_bytes} bytes and the process has {found_bytes}"
    remedy = "create a client of the right size: 'farpage client create NAME --memory {found_bytes}'"
    exit_status = ExitStatus.CONFLICT
    client: str
    created_bytes: int
    found_bytes: int


@dataclass(eq=False)
class DetachByOwner(FarpageError):
    """A region is detached by the process that made it."""

    code = "detach_by_owner"
    template = "client {client!r} is a region of process {pid}, which lets it go itself"
    remedy = "call close() on the region, or end the process"
    exit_status = ExitStatus.CONFLICT
    client: str
    pid: int


@dataclass(eq=False)
class NoDirectAccess(FarpageError):
    """No VIOS that this hypervisor reaches serves the device with the client's volume."""

    code = "no_direct_access"
    template = "client {client!r} has no direct access to device {device}: {why}"
    remedy = "start the hypervisor with a VIOS that reaches the device ('farpage device list')"
    exit_status = ExitStatus.UNREACHABLE
    client: str
    device: str
    why: str


@dataclass(eq=False)
class NoWorker(FarpageError):
    """Every data worker has ended."""

    code = "no_worker"
    template = "none of the {workers} data workers of the hypervisor runs at the moment"
    remedy = "try again in a second, when they have been replaced; the hypervisor's log says why they ended"
    exit_status = ExitStatus.UNREACHABLE
    workers: int


@dataclass(eq=False)
class ReplacementUnderWay(FarpageError):
    """The device is being replaced already."""

    code = "replacement_under_way"
    template = "device {old!r} is being replaced by {new!r} already"
    remedy = "watch it with 'farpage client list', or wait until it has ended"
    exit_status = ExitStatus.CONFLICT
    old: str
    new: str


@dataclass(eq=False)
class NotBeingReplaced(FarpageError):
    """Nobody has asked for that."""

    code = "not_being_replaced"
    template = "device {old!r} has not been replaced since the hypervisor was started"
    remedy = "begin with 'farpage device replace {old} NEW', which goes on where it was cut short"
    exit_status = ExitStatus.NOT_FOUND
    old: str


@dataclass(eq=False)
class NotCancellable(FarpageError):
    """A client that runs would lose its way to the source."""

    code = "not_cancellable"
    template = (
        "the move of client {client!r} cannot be cancelled while it runs: this hypervisor does not reach "
        "VIOS {vios!r}, over which device {device!r} is used"
    )
    remedy = "let it go on, or pause it with 'farpage client pause-move {client}'; or detach the client first"
    exit_status = ExitStatus.CONFLICT
    client: str
    device: str
    vios: str


@dataclass(eq=False)
class NotBeingEvacuated(FarpageError):
    """Nothing was moved off there since the hypervisor was started."""

    code = "not_being_evacuated"
    template = "{what} has not been evacuated since the hypervisor was started"
    remedy = "begin with 'farpage {what} evacuate' or see 'farpage definition show' for who is on it"
    exit_status = ExitStatus.NOT_FOUND
    what: str


@dataclass(eq=False)
class EvacuationUnderWay(FarpageError):
    """It is being evacuated just now."""

    code = "evacuation_under_way"
    template = "{what} is being evacuated already"
    remedy = "wait until that has ended"
    exit_status = ExitStatus.CONFLICT
    what: str
