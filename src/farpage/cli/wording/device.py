"""Words for paging devices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from farpage.cli.output import table
from farpage.definition.model import PAGE_BYTES
from farpage.terminal.sizes import format_size

if TYPE_CHECKING:
    from rich.table import Table

    from farpage.cli.devices import ViosDevices
    from farpage.hypervisor.model import DeviceReplacement
    from farpage.vios.model import DeviceInfo


def overview(reached: Sequence[ViosDevices]) -> Table:
    """Return one line per device, with the VIOSes that reach it."""
    devices: dict[str, DeviceInfo] = {}
    reached_by: dict[str, list[str]] = {}
    for entry in reached:
        for device in entry.devices:
            devices.setdefault(device.id, device)
            reached_by.setdefault(device.id, []).append(entry.vios)
    return table(
        ["device", "kind", "size", "provisioned", "used", "volumes", "reached by", "spec", "id"],
        (
            (
                device.name,
                device.kind,
                *figures(device),
                ", ".join(reached_by[device.id]),
                device.spec,
                device.id,
            )
            for device in devices.values()
        ),
    )


def figures(device: DeviceInfo) -> tuple[str, str, str, str]:
    """Return size, bytes provisioned and used, and number of volumes; those as - that nobody can tell now."""
    provisioned, used = (
        "-" if size_bytes is None else format_size(size_bytes)
        for size_bytes in (device.provisioned_bytes, device.used_bytes)
    )
    volumes = "-" if device.volumes is None else str(device.volumes)
    return format_size(device.size_bytes), provisioned, used, volumes


def replaced(replacement: DeviceReplacement) -> Table | str:
    """Return one line per client, with what became of it."""
    if not replacement.clients:
        return f"no client has a volume on device {replacement.old}"
    return table(
        ["client", "from", "to", "stage", "missing", "problem"],
        (
            (
                client.client,
                replacement.old,
                replacement.new,
                client.stage.value,
                format_size(client.missing_pages * PAGE_BYTES),
                client.problem or "-",
            )
            for client in replacement.clients
        ),
    )


def problems(reached: Sequence[ViosDevices]) -> Iterator[Text]:
    """Return a line for each VIOS that did not answer."""
    for entry in reached:
        if entry.problem:
            yield Text(f"{entry.vios}: {entry.problem}", style="red")
