"""Which way leads from a client to a location: decided from the definition alone. No I/O.

A location is a paging device that holds a client's volume. The client has direct access to it when
a VIOS that its hypervisor reaches also reaches the device. Where it has not, a second device is located: one
that holds the volume in sync too.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TypeAlias

from farpage.definition import rules
from farpage.definition.model import Definition, ReplicaState
from farpage.definition.rules import VolumePath


@dataclass(frozen=True)
class Direct:
    """VIOS that the hypervisor reaches serve the device; in the definition's order."""

    device: str
    paths: tuple[VolumePath, ...]


@dataclass(frozen=True)
class ThroughSecond:
    """The device is out of reach; a second one holds the volume in sync.

    `paths` lead to the second device, over the VIOS that the hypervisor reaches first.
    """

    device: str
    second_device: str
    paths: tuple[VolumePath, ...]


@dataclass(frozen=True)
class NoAccess:
    """Neither the device nor another one with the volume can be reached; the reason, device by device."""

    device: str
    reasons: tuple[str, ...]


Access: TypeAlias = Direct | ThroughSecond | NoAccess


def resolve(definition: Definition, client: str, device: str, reached_vioses: AbstractSet[str]) -> Access:
    """Decide how a client, whose hypervisor reaches `reached_vioses`, gets at its volume on `device`.

    :raise ClientMissing: there is no such client.
    """
    paths = rules.paths(definition, client)
    direct = tuple(path for path in paths if path.device == device and path.vios in reached_vioses)
    if direct:
        return Direct(device, direct)
    others = [path for path in paths if path.device != device and path.replica is ReplicaState.IN_SYNC]
    others.sort(key=lambda path: path.vios not in reached_vioses)
    if others:
        second = others[0].device
        return ThroughSecond(device, second, tuple(path for path in others if path.device == second))
    return NoAccess(device, _reasons(definition, client, device, reached_vioses))


def _reasons(
    definition: Definition, client: str, device: str, reached_vioses: AbstractSet[str]
) -> tuple[str, ...]:
    if device not in definition.devices:
        return (f"device {device} is not in the definition",)
    record = definition.devices[device]
    reaching = [reach.vios for reach in record.reached_by]
    reasons = []
    if not any(path.device == device for path in rules.paths(definition, client)):
        reasons.append(f"device {record.name} holds no volume of client {client}")
    if not set(reaching) & reached_vioses:
        known = ", ".join(sorted(reached_vioses)) or "none"
        reasons.append(
            f"device {record.name} is reached by VIOS {', '.join(reaching)}; the hypervisor reaches {known}"
        )
    reasons.append("no other device holds the volume in sync")
    return tuple(reasons)
