"""Chooses the paging device for a new client: pure."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field

from farpage.definition.errors import NoDeviceFits
from farpage.definition.model import (
    Definition,
    DeviceRecord,
    PagingCommand,
    Redundancy,
    ReplicaState,
    ViosRedundancy,
)

NEEDED_COMMANDS = frozenset(
    {PagingCommand.OPEN, PagingCommand.PAGE_IN, PagingCommand.PAGE_OUT, PagingCommand.CLOSE}
)


@dataclass(frozen=True)
class Wish:
    """What a client wants of its volume; `provisioned_bytes` is what each device has given away.

    A device counts as used by the larger of that and the sum of the volumes that the definition puts on it.
    """

    client: str
    size_bytes: int
    redundancy: Redundancy = Redundancy.PATH
    vios_redundancy: ViosRedundancy = ViosRedundancy.IF_POSSIBLE
    provisioned_bytes: Mapping[str, int] = field(default_factory=dict)


def choose_devices(definition: Definition, wish: Wish) -> tuple[str, ...]:
    """Return the identifiers of the devices for a new client's volume, one for each replica.

    It is the one with the least free room that fits. Redundancy `path` takes a common device; where the
    VIOS redundancy is not `required` an independent one will do when no common one fits. Redundancy `mirror`
    takes two devices that no single VIOS serves alone, independent ones before common ones.

    :raise NoDeviceFits: saying for each device why not.
    """
    mirror = wish.redundancy is Redundancy.MIRROR
    common_only = wish.vios_redundancy is ViosRedundancy.REQUIRED and not mirror
    common_first = wish.redundancy is Redundancy.PATH and wish.vios_redundancy is not ViosRedundancy.NONE
    fitting: list[tuple[bool, int, str, str]] = []
    reasons: list[str] = []
    for identifier, device in definition.devices.items():
        free_bytes = free_bytes_of(definition, identifier, wish.provisioned_bytes.get(identifier, 0))
        reason = _why_not(device, free_bytes, wish.size_bytes, common_only=common_only)
        if reason:
            reasons.append(f"{device.name} {reason}")
        else:
            fitting.append((common_first and not device.is_common, free_bytes, device.name, identifier))
    if mirror:
        return _choose_pair(definition, wish, [identifier for *_, identifier in sorted(fitting)], reasons)
    if not fitting:
        raise NoDeviceFits(wish.client, wish.size_bytes, "; ".join(sorted(reasons)) or "there is no device")
    return (min(fitting)[-1],)


def _choose_pair(
    definition: Definition, wish: Wish, fitting: list[str], reasons: list[str]
) -> tuple[str, ...]:
    """Return two of the devices that fit, each served when any one VIOS is lost by a VIOS or by the other."""

    def reaching(device: str) -> set[str]:
        return {reach.vios for reach in definition.devices[device].reached_by}

    pairs = [
        pair for pair in itertools.combinations(fitting, 2) if len(reaching(pair[0]) | reaching(pair[1])) > 1
    ]
    if pairs:
        return min(pairs, key=lambda pair: sum(definition.devices[device].is_common for device in pair))
    reasons = [
        *reasons,
        *(
            f"{definition.devices[device].name} fits, but no second device over another VIOS"
            for device in fitting
        ),
    ]
    detail = "; ".join(sorted(reasons)) or "there is no device"
    raise NoDeviceFits(wish.client, wish.size_bytes, f"a mirror needs two devices: {detail}")


def free_bytes_of(definition: Definition, identifier: str, provisioned_bytes: int = 0) -> int:
    """Return the room left on a device; not below zero."""
    return max(
        0,
        definition.devices[identifier].size_bytes
        - max(defined_bytes(definition, identifier), provisioned_bytes),
    )


def defined_bytes(definition: Definition, identifier: str) -> int:
    """Add up the volumes that the definition puts on a device."""
    return sum(
        volume.size_bytes
        for client in definition.clients.values()
        for volume in client.volumes
        for replica in volume.replicas
        if replica.device == identifier and replica.state is not ReplicaState.RETIRED
    )


def _why_not(device: DeviceRecord, free_bytes: int, size_bytes: int, *, common_only: bool) -> str:
    missing = NEEDED_COMMANDS - set(device.commands)
    if missing:
        return f"does not take the commands {', '.join(sorted(missing))}"
    if free_bytes < size_bytes:
        return f"has {free_bytes} bytes free"
    if common_only and not device.is_common:
        return f"is reached by VIOS {device.reached_by[0].vios} alone, and two are required"
    return ""
