"""Words for the hypervisor."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from farpage.cli.output import fields, table
from farpage.terminal.sizes import format_duration

if TYPE_CHECKING:
    from rich.console import RenderableType

    from farpage.hypervisor.model import HypervisorInfo

_LOOPS = {True: "compiled", False: "in Python", None: "-"}


def details(info: HypervisorInfo) -> Iterator[RenderableType]:
    """Return the daemon and its workers."""
    yield fields(
        [
            ("hypervisor", info.hypervisor),
            ("version", info.version),
            ("pid", str(info.pid)),
            ("up", format_duration(info.uptime_seconds)),
            ("definition revision", str(info.definition_revision)),
            *([("definition", info.definition_problem)] if info.definition_problem else []),
            ("clients", str(info.clients)),
        ]
    )
    yield ""
    yield table(
        ["worker", "pid", "clients", "CPUs", "loops"],
        (
            (
                str(worker.index),
                str(worker.pid),
                str(worker.clients),
                worker.cpus or "-",
                _LOOPS[worker.compiled],
            )
            for worker in info.workers
        ),
    )
