"""Makes a client's volume from an order: of one replica, or a mirror, also around a running one."""

from __future__ import annotations

from farpage.address import parse_address
from farpage.definition.states import ReplicaState
from farpage.pager.messages import Attach, GoOver, ReplicaSpec
from farpage.pager.table import PAGE_BYTES
from farpage.volume.connector import Connector, Endpoint
from farpage.volume.dirty import DirtyStore
from farpage.volume.events import MirrorEvents
from farpage.volume.lease import Leases
from farpage.volume.mirror import MirrorVolume
from farpage.volume.multipath import MultipathVolume
from farpage.volume.ownership import Ownership
from farpage.volume.paged import PagedVolume
from farpage.volume.replica import ReplicaPlace


def make(
    order: Attach,
    ownership: Ownership,
    events: MirrorEvents,
    store: DirtyStore,
    leases: Leases,
    *,
    connector: Connector,
) -> PagedVolume:
    """Make the volume of a client that is about to be attached or recovered; it is not open yet."""
    order = order.model_copy(update={"replicas": _used(order.replicas)})
    if len(order.replicas) > 1:
        return _mirror(order, ownership, events, store, leases, connector=connector)
    (replica,) = order.replicas
    return MultipathVolume(
        order.volume,
        order.pages * PAGE_BYTES,
        ownership,
        list(_endpoints(replica)),
        connector=connector,
        events=events,
        device=replica.device,
        device_name=replica.name,
        leases=leases,
        had_owner=order.had_owner,
        path_timeout_seconds=order.path_timeout_seconds,
    )


def _used(replicas: tuple[ReplicaSpec, ...]) -> tuple[ReplicaSpec, ...]:
    """Leave retired replicas out, but those that may be about to come back, with nothing to rely on."""
    return tuple(
        spec.model_copy(update={"state": ReplicaState.STALE}) if spec.state is ReplicaState.RETIRED else spec
        for spec in replicas
        if spec.state is not ReplicaState.RETIRED or spec.unsure
    )


def _mirror(
    order: Attach,
    ownership: Ownership,
    events: MirrorEvents,
    store: DirtyStore,
    leases: Leases,
    *,
    connector: Connector,
    empty: bool = False,
) -> MirrorVolume:
    return MirrorVolume(
        order.volume,
        order.pages * PAGE_BYTES,
        ownership,
        [] if empty else [_place(spec) for spec in order.replicas],
        connector=connector,
        events=events,
        store=store,
        recover=(order.recover or order.handed_over) and not empty,
        leases=leases,
        had_owner=order.had_owner and not empty,
        path_timeout_seconds=order.path_timeout_seconds,
        resync_bytes_per_second=order.resync_bytes_per_second,
    )


def is_repairing(volume: PagedVolume) -> bool:
    """Tell whether the volume cannot become a mirror just now."""
    return isinstance(volume, MultipathVolume) and volume.repairing


def with_replica(
    volume: PagedVolume,
    replica: ReplicaSpec,
    *,
    order: Attach,
    events: MirrorEvents,
    store: DirtyStore,
    leases: Leases,
    connector: Connector,
) -> PagedVolume:
    """Return the volume with one replica more, a stale one: a mirror, which goes on with its commands."""
    if isinstance(volume, MultipathVolume):
        mirror = _mirror(order, volume.ownership, events, store, leases, connector=connector, empty=True)
        mirror.adopt(volume)
        volume = mirror
    assert isinstance(volume, MirrorVolume)
    volume.add(_place(replica))
    return volume


async def retire(volume: PagedVolume, device: str) -> None:
    """Take a replica out; returns when it is recorded retired and nothing is sent to it any more."""
    if isinstance(volume, MirrorVolume):
        await volume.retire(device)


async def go_over(volume: PagedVolume, order: GoOver) -> None:
    """Use the one replica of a volume where it is now, first over one VIOS, then over all.

    :raise NoPath: it cannot be opened there.
    :raise SeveralReplicas: it is a mirror.
    """
    replica, endpoints = order.replica, _endpoints(order.replica)
    first = [endpoint for endpoint in endpoints if order.over in ("", endpoint.vios)]
    await volume.go_over(first, replica.device, replica.name, order.fences)
    await volume.go_over(endpoints, replica.device, replica.name)


def _place(spec: ReplicaSpec) -> ReplicaPlace:
    return ReplicaPlace(spec.device, spec.name, spec.state, _endpoints(spec), spec.unsure)


def _endpoints(replica: ReplicaSpec) -> tuple[Endpoint, ...]:
    name, source, others = replica.name, replica.source, replica.others
    return tuple(
        Endpoint(spec.vios, parse_address(spec.address), name, source, spec.lease_seconds, others)
        for spec in replica.endpoints
    )
