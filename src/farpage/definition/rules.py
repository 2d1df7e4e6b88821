"""The definition's rules: pure functions from a document to the next.

Every function that changes something returns a new document with the next revision, and the
document itself when nothing changes. Documents that break the rules are refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from farpage.definition.document import same_content
from farpage.definition.errors import (
    ClientExists,
    ClientMissing,
    DeviceMismatch,
    InvalidDefinition,
    NotTheOwner,
)
from farpage.definition.model import (
    ClientRecord,
    Definition,
    DeviceRecord,
    Move,
    MoveState,
    PagingCommand,
    Reach,
    Redundancy,
    Replica,
    ReplicaState,
    ViosRecord,
    ViosRedundancy,
    VolumeRecord,
)
from farpage.definition.placement import Wish, choose_devices, defined_bytes


@dataclass(frozen=True)
class FoundDevice:
    """A device as one VIOS reports it."""

    id: str
    name: str
    kind: str
    spec: str
    size_bytes: int
    commands: tuple[PagingCommand, ...]


@dataclass(frozen=True)
class VolumePath:
    """One way to a client's volume."""

    vios: str
    control: str
    data: tuple[str, ...]
    device: str
    volume: str
    size_bytes: int
    epoch: int
    replica: ReplicaState


# What a document must fulfil


def problems(definition: Definition) -> tuple[str, ...]:
    """Say everything that is wrong with a document, each naming the field; empty when it is sound."""
    return (
        *_device_problems(definition),
        *_client_problems(definition),
        *_grant_problems(definition),
        *_move_problems(definition),
    )


def check(definition: Definition) -> Definition:
    """Return the document if it is sound.

    :raise InvalidDefinition: naming every problem.
    """
    found = problems(definition)
    if found:
        raise InvalidDefinition(definition.revision, "; ".join(found))
    return definition


def _twice(values: Iterable[str]) -> list[str]:
    return sorted(value for value, count in Counter(values).items() if count > 1)


def _device_problems(definition: Definition) -> Iterator[str]:
    for name in _twice(device.name for device in definition.devices.values()):
        yield f"devices: the name {name!r} is used twice"
    for identifier, device in definition.devices.items():
        where = f"devices[{device.name}]"
        for vios in _twice(reach.vios for reach in device.reached_by):
            yield f"{where}.reached_by: VIOS {vios!r} is named twice"
        for vios in sorted({reach.vios for reach in device.reached_by} - set(definition.vioses)):
            yield f"{where}.reached_by: VIOS {vios!r} is not in the definition"
        for command in _twice(device.commands):
            yield f"{where}.commands: {command!r} is named twice"
        used_bytes = defined_bytes(definition, identifier)
        if used_bytes > device.size_bytes:
            yield f"{where}.size_bytes: {device.size_bytes} bytes are less than its volumes' {used_bytes}"


def _client_problems(definition: Definition) -> Iterator[str]:
    for name in _twice(volume.name for client in definition.clients.values() for volume in client.volumes):
        yield f"clients: the volume name {name!r} is used twice"
    for name, client in definition.clients.items():
        where = f"clients[{name}]"
        if client.entitlement_bytes > client.memory_bytes:
            yield f"{where}.entitlement_bytes: more than the memory of {client.memory_bytes} bytes"
        if sum(volume.size_bytes for volume in client.volumes) < client.memory_bytes:
            yield f"{where}.volumes: smaller than the memory of {client.memory_bytes} bytes"
        for volume in client.volumes:
            yield from _volume_problems(definition, client, volume, f"{where}.volumes[{volume.name}]")


def _volume_problems(
    definition: Definition, client: ClientRecord, volume: VolumeRecord, where: str
) -> Iterator[str]:
    used = [replica.device for replica in volume.replicas]
    for device in _twice(used):
        yield f"{where}.replicas: device {device} is named twice"
    unknown = sorted(set(used) - set(definition.devices))
    for device in unknown:
        yield f"{where}.replicas: device {device} is not in the definition"
    if unknown:
        return
    current = [replica.device for replica in volume.replicas if replica.state is not ReplicaState.RETIRED]
    if client.redundancy is Redundancy.MIRROR and len(current) < 2:
        yield f"{where}.replicas: redundancy 'mirror' needs two"


def _grant_problems(definition: Definition) -> Iterator[str]:
    volumes = {volume.name for client in definition.clients.values() for volume in client.volumes}
    for volume in sorted({grant.volume for grant in definition.grants} - volumes):
        yield f"grants: volume {volume!r} is not in the definition"
    devices = {grant.device for grant in definition.grants if grant.device is not None}
    for device in sorted(devices - set(definition.devices)):
        yield f"grants: device {device} is not in the definition"


def _move_problems(definition: Definition) -> Iterator[str]:
    for _ in _twice(move.principal for move in definition.moves.values()):
        yield "moves: a principal is used twice"
    for name, move in definition.moves.items():
        where = f"moves[{name}]"
        for vios in sorted({move.source_vios, move.target_vios} - set(definition.vioses)):
            yield f"{where}: VIOS {vios!r} is not in the definition"
        client = definition.clients.get(name)
        if client is None:
            yield f"{where}: client {name!r} is not in the definition"
            continue
        replicas = {r.device: r.state for v in client.volumes if v.name == move.volume for r in v.replicas}
        if not replicas:
            yield f"{where}.volume: client {name!r} has no volume {move.volume!r}"
        elif move.source == move.target:
            yield f"{where}.target: it is the source"
        else:
            yield from _replica_problems(where, move, replicas)
    for name, client in definition.clients.items():
        under_way = definition.moves.get(name)
        for volume in client.volumes:
            for replica in volume.replicas:
                if replica.state is ReplicaState.COPYING and (
                    under_way is None or replica.device != under_way.target
                ):
                    yield (
                        f"clients[{name}].volumes[{volume.name}].replicas: the one on device "
                        f"{replica.device} is copying, and no move fills it"
                    )


def _replica_problems(where: str, move: Move, replicas: Mapping[str, ReplicaState]) -> Iterator[str]:
    if move.state is MoveState.RETIRING:
        wanted = {move.source: ReplicaState.RETIRED}
    else:
        wanted = {move.source: ReplicaState.IN_SYNC, move.target: ReplicaState.COPYING}
    for device, state in wanted.items():
        found = replicas.get(device)
        if found is not state:
            is_now = f"is {found}" if found else "is not there"
            yield f"{where}.state: {move.state}, so the replica on device {device} is {state}; it {is_now}"


def unmet_wishes(definition: Definition) -> tuple[str, ...]:
    """Say which clients have less redundancy than they want, because a VIOS lost a device meanwhile.

    That is no contradiction: a definition must be able to say what is.
    """
    unmet: list[str] = []
    for name, client in definition.clients.items():
        if client.vios_redundancy is ViosRedundancy.NONE or client.redundancy is Redundancy.NONE:
            continue
        reached = sorted({path.vios for path in paths(definition, name)})
        if len(reached) < 2:
            wish = "requires" if client.vios_redundancy is ViosRedundancy.REQUIRED else "wants"
            unmet.append(f"client {name} {wish} two VIOS and is reached by {', '.join(reached) or 'none'}")
    return tuple(unmet)


# Changes


def next_revision(definition: Definition, **changes: Any) -> Definition:
    """Return the document with some fields replaced and the next revision, or itself if nothing differs.

    The revision stays at or above every epoch, jumping if it must. So a client that is made anew under
    an old name begins, at the revision, above every epoch that the old one can have had.

    :raise InvalidDefinition: the result is not sound.
    """
    changed = definition.model_copy(update=changes)
    if same_content(changed, definition):
        return definition
    highest_epoch = max((client.epoch for client in changed.clients.values()), default=0)
    revision = max(definition.revision + 1, highest_epoch)
    return check(changed.model_copy(update={"revision": revision}))


def register_vios(
    definition: Definition, name: str, record: ViosRecord, found: Sequence[FoundDevice]
) -> Definition:
    """Enter a VIOS with the devices that it found, and make a device that another one found too a common one.

    A new device gets its name (with a number behind where that is taken) and the commands that it can
    carry out; a known one keeps those that were configured and still can be. A device that this VIOS
    reached before and does not now is no longer reached by it; one that no other VIOS reaches
    stays as it is while a client's volume is on it, and goes otherwise.

    :raise DeviceMismatch: a device's size or kind is not what the definition says.
    """
    devices = dict(definition.devices)
    for device in found:
        known = devices.get(device.id)
        if known is None:
            taken = {other.name for other in devices.values()}
            devices[device.id] = DeviceRecord(
                name=_free_name(device.name, taken),
                kind=device.kind,
                size_bytes=device.size_bytes,
                reached_by=(Reach(vios=name, spec=device.spec),),
                commands=_ordered(device.commands),
            )
        else:
            devices[device.id] = _reach_too(device.id, known, name, device)
    present = {device.id for device in found}
    for identifier, known in list(devices.items()):
        if identifier in present or name not in {reach.vios for reach in known.reached_by}:
            continue
        left = tuple(reach for reach in known.reached_by if reach.vios != name)
        if left:
            devices[identifier] = known.model_copy(update={"reached_by": left})
        elif not _is_used(definition, identifier):
            del devices[identifier]
    return next_revision(definition, vioses={**definition.vioses, name: record}, devices=devices)


def _free_name(wanted: str, taken: set[str]) -> str:
    name, number = wanted, 2
    while name in taken:
        suffix = f"-{number}"
        name, number = wanted[: 63 - len(suffix)] + suffix, number + 1
    return name


def _ordered(commands: Iterable[PagingCommand]) -> tuple[PagingCommand, ...]:
    given = set(commands)
    return tuple(command for command in PagingCommand if command in given)


def _reach_too(identifier: str, known: DeviceRecord, vios: str, found: FoundDevice) -> DeviceRecord:
    if (known.kind, known.size_bytes) != (found.kind, found.size_bytes):
        raise DeviceMismatch(
            identifier,
            vios,
            f"{found.kind} of {found.size_bytes} bytes",
            f"{known.kind} of {known.size_bytes} bytes",
        )
    others = [reach for reach in known.reached_by if reach.vios != vios]
    reached_by = sorted([*others, Reach(vios=vios, spec=found.spec)], key=lambda reach: reach.vios)
    return known.model_copy(
        update={
            "reached_by": tuple(reached_by),
            "commands": _ordered(set(known.commands) & set(found.commands)),
        }
    )


def _is_used(definition: Definition, identifier: str) -> bool:
    return any(
        replica.device == identifier
        for client in definition.clients.values()
        for volume in client.volumes
        for replica in volume.replicas
    )


def add_client(
    definition: Definition,
    name: str,
    *,
    memory_bytes: int,
    hypervisor: str,
    entitlement_bytes: int = 0,
    weight: int = 128,
    limit_bytes: int | None = None,
    redundancy: Redundancy = Redundancy.PATH,
    vios_redundancy: ViosRedundancy = ViosRedundancy.IF_POSSIBLE,
    provisioned_bytes: Mapping[str, int] | None = None,
) -> Definition:
    """Enter a client with one volume, named as it, on the device that fits best.

    `provisioned_bytes` says by device identifier what the VIOS report as given away.

    :raise ClientExists: the name is taken.
    :raise NoDeviceFits: saying for each device why not.
    :raise InvalidDefinition: a value contradicts another one.
    """
    if name in definition.clients:
        raise ClientExists(name)
    devices = choose_devices(
        definition, Wish(name, memory_bytes, redundancy, vios_redundancy, provisioned_bytes or {})
    )
    volume = VolumeRecord(
        name=name,
        size_bytes=memory_bytes,
        replicas=tuple(Replica(device=device, state=ReplicaState.IN_SYNC) for device in devices),
    )
    client = ClientRecord(
        memory_bytes=memory_bytes,
        entitlement_bytes=entitlement_bytes,
        weight=weight,
        limit_bytes=limit_bytes,
        hypervisor=hypervisor,
        epoch=definition.revision + 1,
        redundancy=redundancy,
        vios_redundancy=vios_redundancy,
        volumes=(volume,),
    )
    return next_revision(definition, clients={**definition.clients, name: client})


def remove_client(definition: Definition, name: str) -> Definition:
    """Remove a client, its volumes, the grants on them and its move.

    :raise ClientMissing: there is none.
    """
    client = client_of(definition, name)
    gone = {volume.name for volume in client.volumes}
    return next_revision(
        definition,
        clients={other: record for other, record in definition.clients.items() if other != name},
        grants=tuple(grant for grant in definition.grants if grant.volume not in gone),
        moves={other: move for other, move in definition.moves.items() if other != name},
    )


def claim(definition: Definition, name: str, owner: str, hypervisor: str, at_least: int = 0) -> Definition:
    """Give a client's volumes to a new owner: the epoch rises by one, or to `at_least` if that is more.

    `owner` is the claim's token, `hypervisor` the name of who makes it. A release ends with it.

    :raise ClientMissing: there is none.
    """
    client = client_of(definition, name)
    claimed = client.model_copy(
        update={
            "epoch": max(client.epoch + 1, at_least),
            "owner": owner,
            "hypervisor": hypervisor,
            "released": None,
        }
    )
    return next_revision(definition, clients={**definition.clients, name: claimed})


def raise_epoch(definition: Definition, name: str, at_least: int = 0) -> Definition:
    """Raise the epoch of a client's owner by one, or to `at_least` if that is more: a path took over.

    :raise ClientMissing: there is none.
    """
    client = client_of(definition, name)
    raised = client.model_copy(update={"epoch": max(client.epoch + 1, at_least)})
    return next_revision(definition, clients={**definition.clients, name: raised})


def set_replica_states(
    definition: Definition, name: str, owner: str, epoch: int, states: Mapping[str, ReplicaState]
) -> Definition:
    """Say what the replicas of a client are worth, by the identifiers of their devices.

    `epoch` is that of the owner who says so; the client's rises to it, so that of two documents that
    contradict each other the later owner's is followed.

    :raise ClientMissing: there is none.
    :raise NotTheOwner: somebody else has claimed the client.
    :raise InvalidDefinition: no replica would be in sync.
    """
    client = client_of(definition, name)
    if client.owner != owner:
        raise NotTheOwner(name, client.epoch)
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
    for volume in volumes:
        if all(replica.state is not ReplicaState.IN_SYNC for replica in volume.replicas):
            raise InvalidDefinition(
                definition.revision, f"clients[{name}].volumes[{volume.name}].replicas: none is in sync"
            )
    changed = client.model_copy(update={"epoch": max(client.epoch, epoch), "volumes": volumes})
    return next_revision(definition, clients={**definition.clients, name: changed})


def set_limit(definition: Definition, name: str, limit_bytes: int) -> Definition:
    """Change the most memory that a client's pages take.

    :raise ClientMissing: there is none.
    """
    changed = client_of(definition, name).model_copy(update={"limit_bytes": limit_bytes})
    return next_revision(definition, clients={**definition.clients, name: changed})


# Questions


def client_of(definition: Definition, name: str) -> ClientRecord:
    """Look a client up.

    :raise ClientMissing: there is none.
    """
    if name not in definition.clients:
        raise ClientMissing(name)
    return definition.clients[name]


def paths(definition: Definition, name: str) -> tuple[VolumePath, ...]:
    """List the ways to a client's volumes: for each replica the VIOS that reach it, in a fixed order.

    :raise ClientMissing: there is none.
    """
    client = client_of(definition, name)
    return tuple(
        VolumePath(
            vios=reach.vios,
            control=definition.vioses[reach.vios].control,
            data=definition.vioses[reach.vios].data,
            device=replica.device,
            volume=volume.name,
            size_bytes=volume.size_bytes,
            epoch=client.epoch,
            replica=replica.state,
        )
        for volume in client.volumes
        for replica in volume.replicas
        if replica.state is not ReplicaState.RETIRED
        for reach in definition.devices[replica.device].reached_by
    )


def claims(definition: Definition) -> dict[str, tuple[int, str]]:
    """Return epoch and owner of every volume."""
    return {
        volume.name: (client.epoch, client.owner)
        for client in definition.clients.values()
        for volume in client.volumes
    }
