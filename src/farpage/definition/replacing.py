"""Replaces one device by another in the definition, client by client: pure.

A client goes from `old` alone, or beside others, through the steps below; each is one revision, and each
can be the last one before a crash.

1. `begin`: a replica on the new device, stale: it has nothing yet.
2. Its owner records it in sync when it has everything (`rules.set_replica_states`).
3. `finish`, or the owner itself: the old replica is retired, so nobody reads or writes it any more.
4. `forget`: its volume is gone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from farpage.definition.errors import DeviceMissing, InvalidDefinition, MoveUnderWay, NotReplaceable
from farpage.definition.model import (
    ClientRecord,
    Definition,
    Redundancy,
    Replica,
    ReplicaState,
    ViosRedundancy,
)
from farpage.definition.placement import NEEDED_COMMANDS, free_bytes_of
from farpage.definition.releasing import refusal
from farpage.definition.rules import client_of, next_revision


@dataclass(frozen=True)
class Replacing:
    """Who asks: the hypervisor, the VIOS that it reaches, and what these say a device has given away."""

    hypervisor: str
    reached_vioses: AbstractSet[str]
    provisioned_bytes: Mapping[str, int]


def device_named(definition: Definition, wanted: str) -> str:
    """Return the identifier of a device by its name or identifier.

    :raise DeviceMissing: there is none.
    """
    if wanted in definition.devices:
        return wanted
    for identifier, device in definition.devices.items():
        if device.name == wanted:
            return identifier
    raise DeviceMissing(wanted, ", ".join(sorted(d.name for d in definition.devices.values())) or "none")


def plan(
    definition: Definition, old: str, new: str, asking: Replacing, only: str | None = None
) -> tuple[str, ...]:
    """Return the clients with a replica on `old` that are to get one on `new`; names or identifiers.

    `only` is the one client that is, of several. Clients of which that has begun are among them: it is gone
    on with.

    :raise DeviceMissing: there is no such device.
    :raise MoveUnderWay: an intermediate client moves one of them.
    :raise NotReplaceable: saying everything that is in the way; no client is changed then.
    """
    old, new = device_named(definition, old), device_named(definition, new)
    clients = [
        name
        for name, client in sorted(definition.clients.items())
        if only in (None, name) and (_holds(client, old) or _state(client, old) is ReplicaState.RETIRED)
    ]
    for name in clients:
        if name in definition.moves:
            raise MoveUnderWay(name)
    problems = list(_problems(definition, old, new, clients, asking))
    if problems:
        devices = definition.devices
        raise NotReplaceable(devices[old].name, devices[new].name, "; ".join(problems))
    return tuple(clients)


def _problems(
    definition: Definition, old: str, new: str, clients: list[str], asking: Replacing
) -> Iterator[str]:
    if old == new:
        yield "they are one device"
        return
    device = definition.devices[new]
    reaching = {reach.vios for reach in device.reached_by}
    reached = reaching & asking.reached_vioses
    if not reached:
        named = ", ".join(sorted(reaching))
        yield f"{device.name} is reached by VIOS {named}, and none of them is this hypervisor's"
        return
    if missing := NEEDED_COMMANDS - set(device.commands):
        yield f"{device.name} does not take the commands {', '.join(sorted(missing))}"
    needed_bytes = 0
    for name in clients:
        client = definition.clients[name]
        if client.hypervisor != asking.hypervisor:
            yield f"client {name} belongs to hypervisor {client.hypervisor!r}"
        if client.released is not None:
            yield f"client {name} is released, and nobody copies its pages: attach it first"
        if _holds(client, old) and _holds(client, new):
            if not is_under_way(client, old, new):
                yield f"client {name} has a replica on {device.name} already"
        elif _holds(client, old):
            needed_bytes += sum(volume.size_bytes for volume in client.volumes)
            kept = [r.device for r in client.volumes[0].replicas if r.device not in (old, new)]
            yield from _unmet(definition, name, kept, new, reached)
    free_bytes = free_bytes_of(definition, new, asking.provisioned_bytes.get(new, 0))
    if needed_bytes > free_bytes:
        yield f"{device.name} has {free_bytes} bytes free, and {needed_bytes} are needed"


def _unmet(
    definition: Definition, name: str, kept: list[str], new: str, reached: AbstractSet[str]
) -> Iterator[str]:
    """Say which wishes of a client for redundancy would be unmet; `kept` are its other devices."""
    client = definition.clients[name]
    if client.redundancy is Redundancy.MIRROR:
        vioses = set(reached)
        for other in kept:
            if _holds(client, other):
                vioses |= {reach.vios for reach in definition.devices[other].reached_by}
        if len(vioses) < 2:
            yield f"client {name} is a mirror, and all of it would be behind VIOS {', '.join(sorted(vioses))}"
    elif (
        client.redundancy is Redundancy.PATH
        and client.vios_redundancy is ViosRedundancy.REQUIRED
        and len(reached) < 2
    ):
        device = definition.devices[new].name
        only = ", ".join(sorted(reached))
        yield f"client {name} requires two VIOS, and {device} is reached over {only} alone"


def _state(client: ClientRecord, device: str) -> ReplicaState | None:
    return next((r.state for v in client.volumes for r in v.replicas if r.device == device), None)


def _holds(client: ClientRecord, device: str) -> bool:
    return _state(client, device) not in (None, ReplicaState.RETIRED)


def is_under_way(client: ClientRecord, old: str, new: str) -> bool:
    """Tell whether a client has one replica more than it wants, on these two devices."""
    current = [r for r in client.volumes[0].replicas if r.state is not ReplicaState.RETIRED]
    wanted = 2 if client.redundancy is Redundancy.MIRROR else 1
    return _holds(client, old) and _holds(client, new) and len(current) > wanted


def begin(definition: Definition, name: str, new: str) -> Definition:
    """Give a client a stale replica on another device; nothing changes when it has one there.

    :raise ClientMissing: there is none.
    :raise ClientReleased: nobody would copy its pages.
    :raise InvalidDefinition: it does not fit.
    """
    client = _not_released(definition, name)
    if _holds(client, new):
        return definition
    volumes = tuple(
        volume.model_copy(
            update={
                "replicas": (
                    *(replica for replica in volume.replicas if replica.device != new),
                    Replica(device=new, state=ReplicaState.STALE),
                )
            }
        )
        for volume in client.volumes
    )
    return _with_volumes(definition, name, client.model_copy(update={"volumes": volumes}))


def finish(definition: Definition, name: str, old: str, new: str) -> Definition:
    """Retire the old replica of a client that has nothing paged out: so the new one is in sync too.

    :raise ClientMissing: there is none.
    :raise ClientReleased: it has everything paged out.
    """
    client = _not_released(definition, name)
    states = {new: ReplicaState.IN_SYNC, old: ReplicaState.RETIRED}
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
    return _with_volumes(definition, name, client.model_copy(update={"volumes": volumes}))


def forget(definition: Definition, name: str, device: str, state: ReplicaState) -> Definition:
    """Take a replica that is in a state out of a client's record; one in another state stays.

    :raise ClientMissing: there is none.
    """
    client = client_of(definition, name)
    volumes = tuple(
        volume.model_copy(
            update={
                "replicas": tuple(
                    replica
                    for replica in volume.replicas
                    if (replica.device, replica.state) != (device, state)
                )
            }
        )
        for volume in client.volumes
    )
    return _with_volumes(definition, name, client.model_copy(update={"volumes": volumes}))


def _not_released(definition: Definition, name: str) -> ClientRecord:
    client = client_of(definition, name)
    if client.released is not None:
        raise refusal(name, client.released, client.hypervisor)
    return client


def _with_volumes(definition: Definition, name: str, client: ClientRecord) -> Definition:
    for volume in client.volumes:
        if all(replica.state is not ReplicaState.IN_SYNC for replica in volume.replicas):
            raise InvalidDefinition(
                definition.revision, f"clients[{name}].volumes[{volume.name}].replicas: none is in sync"
            )
    return next_revision(definition, clients={**definition.clients, name: client})
