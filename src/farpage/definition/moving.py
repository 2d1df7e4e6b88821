"""Moves a client's volume from one device to another in the definition: pure.

A move goes through the steps below; each is one revision, made by the client's hypervisor, and each can be
the last one before a crash.

1. `begin`: a replica on the target, copying, beside the one in sync; the grants of the intermediate client.
2. `start`: nobody writes to the source but through the target's VIOS, so pages may be copied. A move whose
   client has no pager that is already running begins here.
3. `finish`: the target is in sync, the source retired, the grants are revoked.
4. `forget`: the volume on the source is gone, and so are the retired replica and the move.

`cancel` in place of 3: the target is retired; `replacing.forget` takes it out when its volume is gone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from farpage.definition.errors import MoveMissing, MoveOver, NotMovable, NotTheOwner
from farpage.definition.model import (
    Access,
    ClientRecord,
    Definition,
    Grant,
    Move,
    MoveState,
    Replica,
    ReplicaState,
)
from farpage.definition.placement import NEEDED_COMMANDS, free_bytes_of
from farpage.definition.rules import client_of, next_revision


@dataclass(frozen=True)
class Claim:
    """Who changes a client: the token of its owner, and the newest epoch that this one has written under.

    The client's epoch rises to it, so that of two documents that contradict each other the later
    owner's is followed.
    """

    owner: str
    epoch: int


@dataclass(frozen=True)
class Route:
    """From which device to which, by identifiers, and the VIOS that serves each."""

    source: str
    source_vios: str
    target: str
    target_vios: str


def begin(
    definition: Definition,
    name: str,
    claim: Claim,
    route: Route,
    principal: str,
    *,
    bandwidth_bytes: int | None = None,
    running: bool = False,
    provisioned_bytes: int = 0,
) -> Definition:
    """Begin to move a client; the document itself when it is on that route already.

    `principal` is the new intermediate client, 16 random hexadecimal digits; `running` whether a pager has
    the volume open on the source; `provisioned_bytes` what the target's VIOS report as given away there.

    :raise ClientMissing: there is none.
    :raise NotTheOwner: somebody else has claimed the client.
    :raise NotMovable: saying everything that is in the way.
    """
    client = _owned(definition, name, claim)
    under_way = definition.moves.get(name)
    if under_way is not None and _route(under_way) == route and under_way.state is not MoveState.RETIRING:
        return definition
    problems = "; ".join(in_the_way(definition, name, route, provisioned_bytes))
    if problems:
        device = definition.devices.get(route.target)
        raise NotMovable(name, device.name if device else route.target, problems)
    (volume,) = client.volumes
    replicas = (
        *(replica for replica in volume.replicas if replica.device != route.target),
        Replica(device=route.target, state=ReplicaState.COPYING),
    )
    move = Move(
        volume=volume.name,
        source=route.source,
        target=route.target,
        source_vios=route.source_vios,
        target_vios=route.target_vios,
        principal=principal,
        state=MoveState.PREPARING if running else MoveState.COPYING,
        bandwidth_bytes=bandwidth_bytes,
    )
    volume = volume.model_copy(update={"replicas": replicas})
    grants = (
        Grant(principal=principal, volume=volume.name, access=Access.WRITE, device=route.source),
        Grant(principal=principal, volume=volume.name, access=Access.FILL, device=route.target),
    )
    return next_revision(
        definition,
        clients=_with_client(definition, name, client.model_copy(update={"volumes": (volume,)}), claim),
        grants=(*definition.grants, *grants),
        moves={**definition.moves, name: move},
    )


def start(definition: Definition, name: str, claim: Claim) -> Definition:
    """Let pages be copied: the client's pager has gone over to the target's VIOS, or there is none.

    :raise ClientMissing: there is none.
    :raise NotTheOwner: somebody else has claimed the client.
    :raise MoveMissing: it is not being moved.
    """
    client, move = _owned(definition, name, claim), move_of(definition, name)
    if move.state is not MoveState.PREPARING:
        return definition
    started = move.model_copy(update={"state": MoveState.COPYING})
    return next_revision(
        definition,
        clients=_with_client(definition, name, client, claim),
        moves={**definition.moves, name: started},
    )


def adjust(definition: Definition, name: str, *, paused: bool, bandwidth_bytes: int | None) -> Definition:
    """Pause or go on, and say how much may be copied in a second; None for as much as the client leaves.

    :raise MoveMissing: the client is not being moved.
    :raise MoveOver: everything is copied.
    """
    move = move_of(definition, name)
    if move.state is MoveState.RETIRING:
        raise MoveOver(name, move.state, "nothing is copied any more")
    adjusted = move.model_copy(update={"paused": paused, "bandwidth_bytes": bandwidth_bytes})
    return next_revision(definition, moves={**definition.moves, name: adjusted})


def finish(definition: Definition, name: str, claim: Claim) -> Definition:
    """Make the target the volume's place: it has every page.

    :raise ClientMissing: there is none.
    :raise NotTheOwner: somebody else has claimed the client.
    :raise MoveMissing: it is not being moved.
    :raise MoveOver: nothing was copied yet.
    """
    client, move = _owned(definition, name, claim), move_of(definition, name)
    if move.state is MoveState.RETIRING:
        return definition
    if move.state is MoveState.PREPARING:
        raise MoveOver(name, move.state, "it cannot be finished")
    states = {move.source: ReplicaState.RETIRED, move.target: ReplicaState.IN_SYNC}
    finished = move.model_copy(update={"state": MoveState.RETIRING})
    return next_revision(
        definition,
        clients=_with_client(definition, name, _with_states(client, states), claim),
        grants=_revoked(definition, move),
        moves={**definition.moves, name: finished},
    )


def forget(definition: Definition, name: str) -> Definition:
    """Take the retired source and the move out: the source's volume is gone. Nothing changes without a move.

    :raise ClientMissing: there is none.
    :raise MoveOver: the source still counts.
    """
    client = client_of(definition, name)
    move = definition.moves.get(name)
    if move is None:
        return definition
    if move.state is not MoveState.RETIRING:
        raise MoveOver(name, move.state, "the source still counts")
    volumes = tuple(
        volume.model_copy(update={"replicas": tuple(r for r in volume.replicas if r.device != move.source)})
        for volume in client.volumes
    )
    return next_revision(
        definition,
        clients={**definition.clients, name: client.model_copy(update={"volumes": volumes})},
        moves=_without(definition, name),
    )


def cancel(definition: Definition, name: str, claim: Claim) -> Definition:
    """End a move where it began: the source, which is whole, serves alone again, and the target is retired.

    :raise ClientMissing: there is none.
    :raise NotTheOwner: somebody else has claimed the client.
    :raise MoveMissing: it is not being moved.
    :raise MoveOver: it is finished.
    """
    client, move = _owned(definition, name, claim), move_of(definition, name)
    if move.state is MoveState.RETIRING:
        raise MoveOver(name, move.state, "the source is not whole any more")
    retired = _with_states(client, {move.target: ReplicaState.RETIRED})
    return next_revision(
        definition,
        clients=_with_client(definition, name, retired, claim),
        grants=_revoked(definition, move),
        moves=_without(definition, name),
    )


# Questions


def move_of(definition: Definition, name: str) -> Move:
    """Look a client's move up.

    :raise ClientMissing: there is no such client.
    :raise MoveMissing: it is not being moved.
    """
    client_of(definition, name)
    if name not in definition.moves:
        raise MoveMissing(name)
    return definition.moves[name]


def may(definition: Definition, principal: str, volume: str, device: str, *accesses: Access) -> bool:
    """Tell whether a principal has a grant of one of these accesses on a volume's replica."""
    return any(
        (grant.principal, grant.volume) == (principal, volume)
        and grant.access in accesses
        and grant.device in (None, device)
        for grant in definition.grants
    )


def in_the_way(
    definition: Definition, name: str, route: Route, provisioned_bytes: int = 0
) -> tuple[str, ...]:
    """Say everything that keeps a client from being moved on a route; `begin` has the parameters."""
    client = definition.clients[name]
    if name in definition.moves:
        move = definition.moves[name]
        devices = definition.devices
        return (f"it is being moved from {devices[move.source].name} to {devices[move.target].name}",)
    if unknown := {route.source, route.target} - set(definition.devices):
        return tuple(f"device {device} is not in the definition" for device in sorted(unknown))
    if route.source == route.target:
        return ("it is there already",)
    if len(client.volumes) > 1:
        return ("it has more than one volume",)
    return (
        *_replicas_in_the_way(definition, client, route),
        *_without_reach(definition, route),
        *why_unfit(definition, client, route.target, provisioned_bytes),
    )


def why_unfit(
    definition: Definition, client: ClientRecord, device: str, provisioned_bytes: int = 0
) -> Iterator[str]:
    """Say why a device cannot take a client's volume, wherever that is now."""
    record = definition.devices[device]
    if missing := NEEDED_COMMANDS - set(record.commands):
        yield f"{record.name} does not take the commands {', '.join(sorted(missing))}"
    needed_bytes = sum(volume.size_bytes for volume in client.volumes)
    free_bytes = free_bytes_of(definition, device, provisioned_bytes)
    if needed_bytes > free_bytes:
        yield f"{record.name} has {free_bytes} bytes free, and {needed_bytes} are needed"


# Helpers


def _route(move: Move) -> Route:
    return Route(move.source, move.source_vios, move.target, move.target_vios)


def _owned(definition: Definition, name: str, claim: Claim) -> ClientRecord:
    client = client_of(definition, name)
    if client.owner != claim.owner:
        raise NotTheOwner(name, client.epoch)
    return client


def _replicas_in_the_way(definition: Definition, client: ClientRecord, route: Route) -> Iterator[str]:
    states: Mapping[str, ReplicaState] = {r.device: r.state for v in client.volumes for r in v.replicas}
    source, target = definition.devices[route.source].name, definition.devices[route.target].name
    if states.get(route.source) is not ReplicaState.IN_SYNC:
        yield f"its replica on {source} is {states.get(route.source, 'not there')}, not in sync"
    if states.get(route.target) is ReplicaState.RETIRED:
        yield f"a volume of it that was given up is still on {target}"
    elif route.target in states:
        yield f"it has a replica on {target}"
    others = [d for d, s in states.items() if s is not ReplicaState.RETIRED and d != route.source]
    if set(others) - {route.target}:
        yield "it has more than one replica: replace the device of one of them"


def _without_reach(definition: Definition, route: Route) -> Iterator[str]:
    for device, vios in ((route.source, route.source_vios), (route.target, route.target_vios)):
        record = definition.devices[device]
        if vios not in {reach.vios for reach in record.reached_by}:
            yield f"VIOS {vios} does not reach {record.name}"


def _with_states(client: ClientRecord, states: Mapping[str, ReplicaState]) -> ClientRecord:
    volumes = tuple(
        volume.model_copy(
            update={
                "replicas": tuple(
                    replica.model_copy(update={"state": states.get(replica.device, replica.state)})
                    for replica in volume.replicas
                )
            }
        )
        for volume in client.volumes
    )
    return client.model_copy(update={"volumes": volumes})


def _with_client(
    definition: Definition, name: str, client: ClientRecord, claim: Claim
) -> dict[str, ClientRecord]:
    raised = client.model_copy(update={"epoch": max(client.epoch, claim.epoch)})
    return {**definition.clients, name: raised}


def _revoked(definition: Definition, move: Move) -> tuple[Grant, ...]:
    return tuple(grant for grant in definition.grants if grant.principal != move.principal)


def _without(definition: Definition, name: str) -> dict[str, Move]:
    return {other: move for other, move in definition.moves.items() if other != name}
