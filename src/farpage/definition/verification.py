"""Whether the copies of a definition agree and are true, and what promoting one of them would do: pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from farpage.definition import rules
from farpage.definition.compare import compare, diff, is_newer
from farpage.definition.model import ClientRecord, Definition, ReplicaState, VolumeRecord

REVISION_JUMP = 1 << 20
"""A promoted copy's revision is this far above all that are known, so as to be above the unknown ones too."""


@dataclass(frozen=True)
class FoundVolume:
    """A volume as a VIOS reports it, with the highest epoch that it knows and that epoch's owner."""

    name: str
    device: str
    size_bytes: int
    epoch: int
    owner: str


def volume_problems(definition: Definition, found: Mapping[str, Sequence[FoundVolume]]) -> tuple[str, ...]:
    """Compare the definition's volumes with those that the VIOS have; VIOS not in `found` did not answer."""
    return tuple(_volume_problems(definition, found))


def _volume_problems(definition: Definition, found: Mapping[str, Sequence[FoundVolume]]) -> Iterator[str]:
    for client in definition.clients:
        for path in rules.paths(definition, client):
            if path.vios not in found:
                continue
            device = definition.devices[path.device].name
            where = f"client {client}: volume {path.volume} on device {device} at VIOS {path.vios}"
            volumes = [v for v in found[path.vios] if (v.name, v.device) == (path.volume, path.device)]
            if not volumes:
                yield f"{where} is not there"
                continue
            volume = volumes[0]
            if volume.size_bytes < path.size_bytes:
                yield f"{where} has {volume.size_bytes} bytes instead of {path.size_bytes}"
            if volume.epoch > path.epoch:
                yield f"{where} is at epoch {volume.epoch}, above the definition's {path.epoch}"


@dataclass(frozen=True)
class Promotion:
    """What promoting a copy comes to."""

    definition: Definition
    """What is stored everywhere then."""
    lost: tuple[str, ...]
    """The difference to the newest copy that is known."""
    at_risk: tuple[str, ...]
    """Clients whose replicas count as in sync although a copy that is not known may say that one is stale."""


def promote(
    copy: Definition,
    others: Sequence[Definition],
    *,
    volumes: Sequence[FoundVolume],
    kept: Mapping[str, ClientRecord],
    some_unknown: bool,
    now_seconds: float = 0.0,
) -> Promotion:
    """Make `copy` the newest of all, of those that are not known too.

    No client's epoch falls below what any copy or VIOS knows, with that epoch's owner. A replica that a newer
    copy calls stale is stale. Of several promotions the latest counts, by `now_seconds` of the Unix clock.
    The records in `kept` stay as they are: their clients are attached.

    :raise InvalidDefinition: the result would contradict itself.
    """
    clients = {name: _claimed(name, record, others, volumes) for name, record in copy.clients.items()}
    newer = [other for other in others if is_newer(other, copy)]
    clients = {name: _with_stale_marks(name, record, newer) for name, record in clients.items()}
    clients.update(kept)
    known = [copy, *others]
    floor = max([definition.revision for definition in known] + [client.epoch for client in clients.values()])
    promoted = rules.check(
        copy.model_copy(
            update={
                "clients": clients,
                "revision": floor + REVISION_JUMP,
                "promoted_ms": max(int(now_seconds * 1000), *(d.promoted_ms + 1 for d in known)),
            }
        )
    )
    newest = compare({str(number): definition for number, definition in enumerate(known)}).newest
    mirrored = [
        name
        for name, client in clients.items()
        if name not in kept and any(map(_is_mirrored, client.volumes))
    ]
    return Promotion(promoted, diff(newest, promoted), tuple(sorted(mirrored)) if some_unknown else ())


def _claimed(
    name: str, record: ClientRecord, others: Sequence[Definition], volumes: Sequence[FoundVolume]
) -> ClientRecord:
    own = {volume.name for volume in record.volumes}
    claims = [
        (record.epoch, record.owner),
        *((o.clients[name].epoch, o.clients[name].owner) for o in others if name in o.clients),
        *((volume.epoch, volume.owner) for volume in volumes if volume.name in own),
    ]
    epoch, owner = max(claims, key=lambda claim: claim[0])
    return record.model_copy(update={"epoch": epoch, "owner": owner})


def _with_stale_marks(name: str, record: ClientRecord, newer: Sequence[Definition]) -> ClientRecord:
    stale = {
        (volume.name, replica.device)
        for definition in newer
        if name in definition.clients
        for volume in definition.clients[name].volumes
        for replica in volume.replicas
        if replica.state is ReplicaState.STALE
    }
    return record.model_copy(update={"volumes": tuple(_marked(volume, stale) for volume in record.volumes)})


def _marked(volume: VolumeRecord, stale: set[tuple[str, str]]) -> VolumeRecord:
    replicas = tuple(
        replica.model_copy(update={"state": ReplicaState.STALE})
        if (volume.name, replica.device) in stale and replica.state is ReplicaState.IN_SYNC
        else replica
        for replica in volume.replicas
    )
    if not any(replica.state is ReplicaState.IN_SYNC for replica in replicas):
        return volume  # the last one is never stale
    return volume.model_copy(update={"replicas": replicas})


def _is_mirrored(volume: VolumeRecord) -> bool:
    return sum(replica.state is ReplicaState.IN_SYNC for replica in volume.replicas) > 1
