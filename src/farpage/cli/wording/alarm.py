"""Words for alarms."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from farpage.cli.output import table

if TYPE_CHECKING:
    from rich.table import Table

    from farpage.hypervisor.model import Alarm


def overview(alarms: Sequence[Alarm]) -> Table:
    """Return one line per alarm."""
    return table(
        ["at", "client", "kind", "message"],
        ((alarm.at, alarm.client or "-", alarm.kind, alarm.message) for alarm in alarms),
    )
