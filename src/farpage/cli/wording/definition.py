"""Words for the device interface definition."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from farpage.cli.output import table
from farpage.cli.sizes import format_size

if TYPE_CHECKING:
    from rich.console import RenderableType

    from farpage.definition.model import Definition


def details(definition: Definition) -> Iterator[RenderableType]:
    """Return the whole document as tables."""
    yield f"revision {definition.revision}, format {definition.format}"
    yield ""
    yield table(
        ["vios", "control", "data"],
        ((name, vios.control, ", ".join(vios.data)) for name, vios in definition.vioses.items()),
    )
    yield ""
    yield table(
        ["device", "kind", "size", "reached by", "access", "id"],
        (
            (
                device.name,
                device.kind,
                format_size(device.size_bytes),
                ", ".join(f"{reach.vios} ({reach.spec})" for reach in device.reached_by),
                "common" if device.is_common else "independent",
                device_id,
            )
            for device_id, device in definition.devices.items()
        ),
    )
    if definition.clients:
        yield ""
        yield table(
            ["client", "memory", "hypervisor", "epoch", "redundancy", "volume", "replicas"],
            (
                (
                    name,
                    format_size(client.memory_bytes),
                    client.hypervisor,
                    str(client.epoch),
                    str(client.redundancy),
                    volume.name,
                    ", ".join(f"{replica.device} {replica.state}" for replica in volume.replicas),
                )
                for name, client in definition.clients.items()
                for volume in client.volumes
            ),
        )
    if definition.grants:
        yield ""
        yield table(
            ["principal", "volume", "access"],
            ((grant.principal, grant.volume, str(grant.access)) for grant in definition.grants),
        )
