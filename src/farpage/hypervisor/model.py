"""Documents of the hypervisor control API."""

from __future__ import annotations

import enum

from pydantic import BaseModel, ConfigDict, Field

from farpage.definition.model import NUMBER_MAX, PAGE_BYTES, Name, Redundancy, ViosRedundancy
from farpage.pager.progress import ScrubState
from farpage.volume.state import PathState, ReplicaHealth

PID_MAX = (1 << 22) - 1
"""PID_MAX_LIMIT of a 64-bit kernel (proc_sys_kernel(5), pid_max)."""


class Document(BaseModel):
    """Base of the API's documents."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class Attachment(enum.StrEnum):
    """Whether and how a client's memory is paged."""

    NONE = "none"
    REGION = "region"
    PROCESS = "process"


class ClientCreate(Document):
    """`POST /v1/clients`: make the client and its volume; its memory is attached later."""

    name: Name
    memory_bytes: int = Field(gt=0, le=NUMBER_MAX, multiple_of=PAGE_BYTES)
    limit_bytes: int | None = Field(default=None, gt=0, le=NUMBER_MAX)
    entitlement_bytes: int = Field(default=0, ge=0, le=NUMBER_MAX)
    weight: int = Field(default=128, ge=0, le=255)
    redundancy: Redundancy = Redundancy.PATH
    vios_redundancy: ViosRedundancy = ViosRedundancy.IF_POSSIBLE


class ClientAttach(Document):
    """`POST /v1/clients/{name}/attach`: page the memory of a running process.

    A client that does not exist is created with the size of the memory found.
    """

    pid: int = Field(gt=0, le=PID_MAX)
    memory: str | None = Field(default=None, max_length=255)
    qmp: str | None = Field(default=None, pattern="^/", max_length=107)
    """Absolute path of a QMP socket for farpage alone: the VM is paused by it while no path works."""
    limit_bytes: int | None = Field(default=None, gt=0, le=NUMBER_MAX)


class ClientRelease(Document):
    """`POST /v1/clients/{name}/release`: bring every page to the devices and let go of the client.

    Another hypervisor can adopt it then. It has to be stopped, which is done over QMP where that is known.
    """

    qmp: str | None = Field(default=None, pattern="^/", max_length=107)
    """Absolute path of a QMP socket by which the VM is stopped."""
    force: bool = False
    """Also while the process runs: its accesses wait from then on, for good."""


class ClientAdopt(Document):
    """`POST /v1/clients/{name}/adopt`: take a released client; its next attachment begins with its pages."""

    force: bool = False
    """Also from a hypervisor that has adopted it and not attached it yet."""


class ReleasedInfo(Document):
    """A client that is all on its devices, and attached nowhere."""

    hypervisor: Name
    """Who released it."""
    adopter: str
    """Who may attach it; empty while anybody may adopt it."""
    epoch: int


class ReadWay(enum.StrEnum):
    """How page-ins of a path's client get at the volume."""

    DIRECT = "direct"
    """The hypervisor's worker reads the storage that the VIOS has lent."""
    SERVED = "served"
    """The VIOS reads it."""


class PathInfo(Document):
    """One way from the client over a VIOS to its volume."""

    client: Name
    vios: Name
    device: str
    state: PathState
    epoch: int
    reason: str
    in_flight: int
    held: int = 0
    """Page-outs kept back, with their pages in memory, until the VIOS that failed with them is fenced."""
    failovers: int
    since_seconds: float
    reads: ReadWay = ReadWay.SERVED
    direct_reads: int = 0
    direct_failures: int = 0
    """Direct reads that failed or were late, and were served instead."""


class ClientCounters(Document):
    """Counts since the attachment, in pages where they end in `_pages`."""

    faults: int = 0
    page_in_pages: int = 0
    page_out_pages: int = 0
    zero_fill_pages: int = 0
    zero_evict_pages: int = 0
    clean_evict_pages: int = 0
    cancelled_pages: int = 0
    read_ahead_pages: int = 0
    read_ahead_wasted_pages: int = 0
    tier_hit_pages: int = 0
    checksum_errors: int = 0
    repaired_pages: int = 0
    scrubbed_pages: int = 0
    poisoned_pages: int = 0
    stalls_over_100ms: int = 0
    longest_stall_ms: float = 0.0
    wrong_by_device: dict[str, int] = Field(default_factory=dict)
    """Pages whose replica was not what was paged out, by the name of the device."""
    repaired_by_device: dict[str, int] = Field(default_factory=dict)


class RamTierInfo(Document):
    """Pages of a client that left memory and are kept there compressed, beside what its device holds."""

    pages: int = 0
    taken_bytes: int = 0
    """Memory that they take, which is a part of the client's limit."""
    stored_bytes: int = 0
    """Size of their compressed contents alone."""


class ScrubStart(Document):
    """`POST /v1/clients/{name}/scrub`: compare what every replica holds with its checksum, and repair it."""

    rate_bytes: int = Field(default=64 << 20, ge=PAGE_BYTES, le=NUMBER_MAX)
    """The most that is read from each replica per second."""


class ScrubInfo(Document):
    """The latest scrub of a client. Pages wrong, repaired and compared count once for each replica."""

    state: ScrubState
    rate_bytes: int
    pages_total: int
    pages_done: int
    compared_pages: int
    wrong_pages: int
    repaired_pages: int
    lost_pages: int
    seconds: float
    """How long it has run, or ran."""


class FailoverInfo(Document):
    """One loss of the active path, as the client's worker saw it.

    Times are CLOCK_MONOTONIC seconds, which every process of a host shares.
    """

    client: Name
    from_vios: Name
    to_vios: Name | None
    device: str = ""
    reason: str
    detected_at_seconds: float
    active_at_seconds: float | None
    replayed_commands: int
    quarantined_pages: int
    longest_stall_ms: float


class ReplicaInfo(Document):
    """One replica of a client's volume: `state` is what it is good for at the moment."""

    device: str
    state: ReplicaHealth
    reason: str
    dirty_pages: int
    """Pages that it has missed and not got yet."""
    resynced_pages: int
    """Pages that the latest resync has copied."""
    rate_bytes: float
    """What the resync copies a second."""
    eta_seconds: float | None
    since_seconds: float


class ClientInfo(Document):
    """`GET /v1/clients`."""

    name: Name
    attachment: Attachment
    pid: int | None
    memory_bytes: int
    limit_bytes: int
    resident_bytes: int
    ram_tier: RamTierInfo = RamTierInfo()
    on_device_bytes: int
    zero_bytes: int
    entitlement_bytes: int
    weight: int
    redundancy: Redundancy
    epoch: int
    released: ReleasedInfo | None = None
    """It was released and waits for being adopted, or attached by its adopter."""
    fenced: str = ""
    """Why another owner has the volume instead; empty while this hypervisor has it."""
    worker: int | None
    stalled_faults: int
    without_path_seconds: float | None
    """For how long no path to the volume has worked; None while one does."""
    device_full: bool
    """No device has room for the client's page-outs."""
    qmp: str | None
    guest_paused: bool
    """The VM was paused by that socket because no path works."""
    scrub: ScrubInfo | None
    counters: ClientCounters
    hedged_reads: int = 0
    """Reads that were repeated on another replica because they were late."""
    hedges_won: int = 0
    replicas: tuple[ReplicaInfo, ...] = ()
    paths: tuple[PathInfo, ...]
    failovers: tuple[FailoverInfo, ...]


class WorkerInfo(Document):
    """One data worker."""

    index: int
    pid: int
    clients: int
    cpus: str = ""
    """Those that it may run on, such as `0-3,8`; empty when it has just ended."""
    compiled: bool | None = None
    """Whether it has the compiled loops; null before it has told."""


class HypervisorInfo(Document):
    """`GET /v1/hypervisor`."""

    hypervisor: Name
    version: str
    pid: int
    uptime_seconds: float
    definition_revision: int
    definition_problem: str = ""
    """Why the definition cannot be changed now; empty when it can."""
    workers: tuple[WorkerInfo, ...]
    clients: int


class ViosStatus(Document):
    """`GET /v1/vioses`: what the hypervisor knows of a VIOS."""

    name: Name
    control: str
    reachable: bool
    problem: str
    pid: int | None
    definition_revision: int | None
    devices: tuple[str, ...]


class ViosStop(Document):
    """`POST /v1/vioses/{name}/stop`; `force` also when clients cannot do without the VIOS."""

    force: bool = False


class ViosStopped(Document):
    """A VIOS that has ended: clients that were moved off it, and clients that wait until it is back."""

    vios: Name
    pid: int
    moved: tuple[Name, ...]
    waiting: tuple[Name, ...]


class DeviceReplace(Document):
    """`POST /v1/devices/{old}/replace`: give every client with a replica on `old` one on `new` instead."""

    new: str = Field(min_length=1, max_length=63)
    """Name or identifier."""


class ReplaceStage(enum.StrEnum):
    """How far a client is on its way from one device to another."""

    WAITING = "waiting"
    """For another request about it, or for a VIOS; or it is not its turn yet."""
    COPYING = "copying"
    DONE = "done"
    FAILED = "failed"
    """It is as it was before, or the old volume is left; `problem` says which."""


class ReplacedClient(Document):
    """One client on its way to another device."""

    client: Name
    stage: ReplaceStage
    problem: str
    missing_pages: int = 0
    """What the new device has yet to get."""
    copied_pages: int = 0
    rate_bytes: float = 0.0
    """What is copied a second."""
    eta_seconds: float | None = None


class DeviceReplacement(Document):
    """`GET /v1/devices/{old}/replace`: one device taking the place of another; names."""

    old: str
    new: str
    done: bool
    """Nothing is under way any more; clients that failed are tried again by another request."""
    clients: tuple[ReplacedClient, ...]


class DefinitionPromote(Document):
    """`POST /v1/definition/promote`: follow the copy of a VIOS; without `force` just say what that does."""

    vios: Name
    force: bool = False


class DefinitionPromotion(Document):
    """What promoting a copy does, or would do when it is not `done`."""

    vios: Name
    copy_revision: int
    revision: int
    """Of the definition that is stored everywhere then."""
    lost: tuple[str, ...]
    """The difference to the newest copy that is known."""
    missing: dict[Name, str]
    """VIOS whose copies are not known, and why; what only they have is lost."""
    at_risk: tuple[Name, ...]
    """Clients for which a mark that a replica is stale may be missing."""
    done: bool


class PoolMember(Document):
    """One client's share of the memory pool."""

    client: Name
    limit_bytes: int
    resident_bytes: int
    ram_tier_bytes: int = 0
    """What its RAM tier takes, which is a part of the limit too."""


class PoolInfo(Document):
    """`GET /v1/pool`: RAM shared by the clients."""

    size_bytes: int
    resident_bytes: int
    ram_tier_bytes: int = 0
    default_limit_bytes: int | None
    members: tuple[PoolMember, ...]


class PoolSet(Document):
    """`PUT /v1/pool`: change the pool's size, or one client's limit."""

    size_bytes: int | None = Field(default=None, gt=0, le=NUMBER_MAX)
    client: Name | None = None
    limit_bytes: int | None = Field(default=None, gt=0, le=NUMBER_MAX)


class Alarm(Document):
    """`GET /v1/alarms`: something that an operator should look at, newest last."""

    at: str
    client: str
    kind: str
    message: str
