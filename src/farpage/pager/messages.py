"""What a hypervisor's control process and its data workers say to each other."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from farpage.attach.memory import ClientKind
from farpage.definition.states import ReplicaState
from farpage.message import Message
from farpage.pager.progress import ScrubState
from farpage.volume.state import PathState, ReplicaHealth


class EndpointSpec(Message, frozen=True, kw_only=True):
    """Where one VIOS serves a replica; `address` as `farpage.address` spells it.

    `lease_seconds` says how long a lease of it lasts; None when that is not known.
    """

    vios: str
    address: str
    lease_seconds: float | None = None


class ReplicaSpec(Message, frozen=True, kw_only=True):
    """A replica of the client's volume: `device` is the device's identifier, `name` what users call it.

    `state` is the one of the definition, `endpoints` the VIOS that serve it, in the order of preference.
    `source` is the identifier of the device that it is being moved from, and `source_vios` the VIOS over
    which the target's VIOS gets at that; empty when it is not being moved. `others` are VIOSes that
    nothing is sent to and that reach the device, or the one that it is being moved from, each with how long
    its leases last. A state that is `unsure` was being changed: the replica is what it says, but the
    definition may say something else by now, or soon.
    """

    device: str
    name: str
    state: ReplicaState
    endpoints: tuple[EndpointSpec, ...]
    unsure: bool = False
    source: str = ""
    source_vios: str = ""
    others: tuple[tuple[str, float], ...] = ()


class Attach(Message, frozen=True, kw_only=True):
    """`attach`, with the descriptors [uffd, memfd, state file, pidfd]: page this memory from now on."""

    client: str
    volume: str
    epoch: int
    owner: str
    """Token of the claim that the epoch belongs to."""
    kind: ClientKind
    pid: int
    pages: Annotated[int, Meta(gt=0)]
    start_address: int
    memfd_offset_bytes: int
    limit_pages: Annotated[int, Meta(gt=0)]
    replicas: Annotated[tuple[ReplicaSpec, ...], Meta(min_length=1)]
    resync_bytes_per_second: Annotated[int, Meta(gt=0)] = 100 << 20
    direct_reads: bool = True
    """Read the storage that VIOSes on this host lend without them."""
    had_owner: bool = False
    """Somebody has used the volume before: what a server was sent then may yet arrive."""
    recover: bool = False
    """Go on with what a worker that ended has left, instead of beginning with nothing paged out.

    The epoch is the newest that is known of then; the worker raises it.
    """
    handed_over: bool = False
    """The state file's table came from another hypervisor: no page of it is in memory yet."""
    frozen: bool = False
    """With `recover`: answer no access until told so, or told to let go."""
    state_path: str
    """Where the state file is; a worker without a control process removes it at the client's end."""
    path_timeout_seconds: Annotated[float, Meta(gt=0)]
    no_path_timeout_seconds: Annotated[float, Meta(gt=0)] | None = None
    """Accesses that waited so long without a path are answered with poison; None for never."""
    open_timeout_seconds: Annotated[float, Meta(gt=0)]
    ram_tier_percent: Annotated[int, Meta(ge=0, le=50)] = 0
    """Share of the limit that pages which left memory may take, compressed."""


class Detach(Message, frozen=True, kw_only=True):
    """`detach`: bring every page back and stop; with `discard` just stop, the memory is going away."""

    client: str
    discard: bool = False


class PageOut(Message, frozen=True, kw_only=True):
    """`page_out`: answer no access of the client any more, and bring every page to its volume.

    Answered when all pages are there; the client stays frozen then. A second request changes nothing.
    """

    client: str


class PagedOut(Message, frozen=True, kw_only=True):
    """The answer: every page is on the volume and written under at most this epoch."""

    epoch: int


class Thaw(Message, frozen=True, kw_only=True):
    """`thaw`: take `page_out` back; the client goes on as before."""

    client: str


class LetGo(Message, frozen=True, kw_only=True):
    """`let_go`: forget a frozen client; its memory stays registered, so accesses wait for good."""

    client: str


class SetLimit(Message, frozen=True, kw_only=True):
    """`set_limit`."""

    client: str
    limit_pages: Annotated[int, Meta(gt=0)]


class StartScrub(Message, frozen=True, kw_only=True):
    """`start_scrub`: read what every replica holds, at most so much a second from each, and repair it."""

    client: str
    rate_bytes: Annotated[int, Meta(gt=0)]


class StopScrub(Message, frozen=True, kw_only=True):
    """`stop_scrub`."""

    client: str


class Leave(Message, frozen=True, kw_only=True):
    """`leave`: move off a VIOS that is about to stop; answered when nothing of the client is with it."""

    client: str
    vios: str


class Rejoin(Message, frozen=True, kw_only=True):
    """`rejoin`: use a VIOS again as soon as it answers; `reason` is shown until then."""

    client: str
    vios: str
    reason: str


class AddReplica(Message, frozen=True, kw_only=True):
    """`add_replica`: a replica that the definition has as stale; everything is copied to it."""

    client: str
    replica: ReplicaSpec


class RetireReplica(Message, frozen=True, kw_only=True):
    """`retire_replica`: have a replica recorded retired; answered when nothing is sent to it any more."""

    client: str
    device: str


class GoOver(Message, frozen=True, kw_only=True):
    """`go_over`: use the one replica where it is now; answered when commands go there, and nowhere else.

    `over` is the VIOS that is opened first, which drains the VIOS `fences` of what is in flight there.
    """

    client: str
    replica: ReplicaSpec
    over: str = ""
    fences: str = ""


class Query(Message, frozen=True, kw_only=True):
    """`query`: answer with a `ClientReport`."""

    client: str


class WorkerClients(Message, frozen=True, kw_only=True):
    """The answer to `clients`: those that the worker pages, or is about to."""

    clients: tuple[str, ...]


class HandOver(Message, frozen=True, kw_only=True):
    """`hand_over`: answer with a `HandedOver` and the descriptors [uffd, memfd, state file, pidfd]."""

    client: str


class HandedOver(Message, frozen=True, kw_only=True):
    """A client as a control process that was started anew has to know it."""

    order: Attach
    epoch: int
    limit_pages: int
    inherited: bool = False
    """It has taken the client over from a worker that ended, while there was no control process."""


class Nothing(Message, frozen=True, kw_only=True):
    """The answer of a request that has none, and the parameters of one without."""


class Pong(Message, frozen=True, kw_only=True):
    """The answer to `ping`."""

    compiled: bool | None = None
    """Whether the worker has the compiled loops; None when it is too old to tell."""


class PathReport(Message, frozen=True, kw_only=True):
    """One path of a client; times are loop seconds (CLOCK_MONOTONIC)."""

    vios: str
    device: str
    state: PathState
    reason: str
    epoch: int
    in_flight: int
    held: int
    losses: int
    since_seconds: float
    direct: bool = False
    direct_reads: int = 0
    direct_failures: int = 0


class FailoverReport(Message, frozen=True, kw_only=True):
    """One loss of the active path."""

    from_vios: str
    to_vios: str | None
    device: str
    reason: str
    detected_at_seconds: float
    active_at_seconds: float | None
    replayed_commands: int
    quarantined_bytes: int
    longest_stall_seconds: float


class CounterReport(Message, frozen=True, kw_only=True):
    """`farpage.pager.counters.Counters` as it stands."""

    faults: int
    page_in_pages: int
    page_out_pages: int
    zero_fill_pages: int
    zero_evict_pages: int
    clean_evict_pages: int
    cancelled_pages: int
    read_ahead_pages: int
    read_ahead_wasted_pages: int
    tier_hit_pages: int
    checksum_errors: int
    repaired_pages: int
    scrubbed_pages: int
    poisoned_pages: int
    stalls_over_100ms: int
    longest_stall_ms: float
    wait_seconds: float
    wait_buckets: tuple[int, ...]
    wrong_by_device: dict[str, int]
    repaired_by_device: dict[str, int]


class ScrubReport(Message, frozen=True, kw_only=True):
    """`farpage.pager.scrub.ScrubProgress` as it stands."""

    state: ScrubState
    rate_bytes: int
    pages_total: int
    pages_done: int
    compared_pages: int
    wrong_pages: int
    repaired_pages: int
    lost_pages: int
    started_seconds: float
    ended_seconds: float | None


class ReplicaReport(Message, frozen=True, kw_only=True):
    """One replica of a client; `since_seconds` is a loop time."""

    device: str
    name: str
    health: ReplicaHealth
    reason: str
    dirty_pages: int
    resynced_pages: int
    rate_bytes: float
    eta_seconds: float | None
    since_seconds: float


class TierReport(Message, frozen=True, kw_only=True):
    """The RAM tier of a client: its pages, what they take, and what their contents are compressed to."""

    pages: int = 0
    taken_bytes: int = 0
    stored_bytes: int = 0


class ClientReport(Message, frozen=True, kw_only=True):
    """A client as its worker sees it: pages by state, waits, paths."""

    replicas: tuple[ReplicaReport, ...]
    hedged_reads: int
    hedges_won: int

    client: str
    pages_by_state: dict[str, int]
    limit_pages: int
    tier: TierReport = TierReport()
    epoch: int
    fenced: str
    """Why another owner has the volume instead; empty while this one has it."""
    stalled_faults: int
    without_path_seconds: float | None
    """For how long no path has worked; None while one does."""
    device_full: bool
    page_outs_wait: bool
    """For room on a device, or for the intermediate client of a move; stored pages come in all the same."""
    scrub: ScrubReport | None
    """The latest one since the worker pages the client."""
    counters: CounterReport
    paths: tuple[PathReport, ...]
    failovers: tuple[FailoverReport, ...]


class RecordReplicas(Message, frozen=True, kw_only=True):
    """`record_replicas`, a worker asks: store what the replicas are worth; answered when it is stored."""

    client: str
    owner: str
    epoch: int
    states: dict[str, ReplicaState]
    """By the identifier of the device."""


class EpochRaised(Message, frozen=True, kw_only=True):
    """`epoch_raised`: the client's volume was opened under a newer epoch of its owner."""

    client: str
    epoch: int
    owner: str


class ViosDoubted(Message, frozen=True, kw_only=True):
    """`vios_doubted`: the path that carries a client's commands has failed or does not answer."""

    client: str
    vios: str


class OutageChanged(Message, frozen=True, kw_only=True):
    """`outage`: the client's volume is without a path or without room, or no longer.

    One whose pages can be read in part, as it is being moved, is not without a path.
    """

    client: str
    without_path: bool
    device_full: bool


class ScrubEnded(Message, frozen=True, kw_only=True):
    """`scrub_ended`: a client's scrub has come to its end, or was stopped."""

    client: str


class ClientLost(Message, frozen=True, kw_only=True):
    """`client_gone`: the client's process has exited, or its memory alone; its paging has ended."""

    client: str
    lives: bool = False
    """Its process runs on, with other memory (execve(2)) or without that."""


class AlarmRaised(Message, frozen=True, kw_only=True):
    """`alarm`: an operator should look."""

    client: str
    kind: str
    message: str
