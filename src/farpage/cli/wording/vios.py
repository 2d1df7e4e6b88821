"""Words for VIOSes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from farpage.cli.output import fields, table
from farpage.cli.wording.device import figures
from farpage.terminal.sizes import format_duration, format_size

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from farpage.embedded.control import ViosDetails
    from farpage.embedded.model import ViosStarted
    from farpage.hypervisor.model import ViosStatus, ViosStopped
    from farpage.vios.model import Health


def overview(vioses: Sequence[ViosStatus]) -> Table:
    """Return one line per VIOS."""
    return table(
        ["vios", "reachable", "pid", "revision", "devices", "control", "problem"],
        (
            (
                vios.name,
                Text("yes", style="green") if vios.reachable else Text("no", style="red"),
                "-" if vios.pid is None else str(vios.pid),
                "-" if vios.definition_revision is None else str(vios.definition_revision),
                str(len(vios.devices)),
                vios.control,
                vios.problem or "-",
            )
            for vios in vioses
        ),
    )


def stopped(answer: ViosStopped) -> Iterator[str]:
    """Say what stopping a VIOS has come to."""
    yield f"VIOS {answer.vios} (process {answer.pid}) has stopped with nothing in flight"
    if answer.moved:
        yield f"clients moved to their other paths: {', '.join(answer.moved)}"
    if answer.waiting:
        yield f"clients whose accesses to paged-out memory wait until it is back: {', '.join(answer.waiting)}"


def started(answer: ViosStarted) -> Iterator[str]:
    """Say what starting a VIOS has come to."""
    yield f"VIOS {answer.vios} {'runs already' if answer.was_running else 'has started'}, pid {answer.pid}"


def _data_processes(health: Health) -> Iterator[tuple[str, str]]:
    if health.data_processes:
        yield "data processes", ", ".join(map(str, health.data_processes))


def details(found: ViosDetails) -> Iterator[RenderableType]:
    """Return the daemon, its devices and its volumes."""
    health = found.health
    yield fields(
        [
            ("vios", health.vios),
            ("version", health.version),
            ("pid", str(health.pid)),
            *_data_processes(health),
            ("up", format_duration(health.uptime_seconds)),
            ("definition revision", str(health.definition_revision)),
            ("data", ", ".join(health.data)),
            ("open exports", str(health.open_exports)),
            ("leases", f"{health.leases} of {format_duration(health.lease_seconds)}"),
        ]
    )
    yield ""
    yield table(
        ["device", "kind", "size", "provisioned", "used", "volumes", "spec", "id"],
        (
            (
                device.name,
                device.kind,
                *figures(device),
                device.spec,
                device.id,
            )
            for device in found.devices
        ),
    )
    if found.volumes:
        yield ""
        yield table(
            ["volume", "size", "used", "epoch", "connections", "device"],
            (
                (
                    volume.name,
                    format_size(volume.size_bytes),
                    format_size(volume.used_bytes),
                    str(volume.epoch),
                    str(volume.open_connections),
                    volume.device,
                )
                for volume in found.volumes
            ),
        )
