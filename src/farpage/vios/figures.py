"""What a VIOS counts: for metrics, and to be added up over several processes. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields

import msgspec

from farpage.message import Message
from farpage.nbd.export import Counters


class CopyFigures(Message, frozen=True):
    """Of one volume that is copied to a device of the VIOS."""

    volume: str
    present_bytes: int
    total_bytes: int
    relay_connected: bool
    waiting_commands: int
    relayed_reads: int
    kept_pages: int
    filled_pages: int


class Figures(Message, frozen=True):
    """What there is to say at one moment; counts are from the start of the process."""

    counters: dict[str, Counters] = msgspec.field(default_factory=dict)
    """By volume name, over all of its connections."""
    connections: dict[str, int] = msgspec.field(default_factory=dict)
    """Those that are open now, by the volumes' identifiers."""
    refused: int = 0
    """Opens that were refused."""
    fenced: int = 0
    """Connections that a newer owner has cut off."""
    copies: list[CopyFigures] = msgspec.field(default_factory=list)

    @property
    def open_exports(self) -> int:
        """Connections that have a volume open now."""
        return sum(self.connections.values())

    @property
    def past(self) -> Figures:
        """What remains of them when the process has ended: its counts, and nothing that is open."""
        counters = {volume: _sum([c], in_flight=False) for volume, c in self.counters.items()}
        return Figures(counters=counters, refused=self.refused, fenced=self.fenced)


@dataclass(frozen=True)
class ViosState:
    """What a VIOS has to tell beside its devices."""

    figures: Figures
    leases: int
    definition_revision: int
    processes: int = 0
    restarts: int = 0


def merged(parts: Iterable[Figures]) -> Figures:
    """Add the figures of several processes up."""
    parts = list(parts)
    counted: dict[str, list[Counters]] = {}
    connections: dict[str, int] = {}
    for part in parts:
        for volume, counters in part.counters.items():
            counted.setdefault(volume, []).append(counters)
        for volume_id, count in part.connections.items():
            connections[volume_id] = connections.get(volume_id, 0) + count
    return Figures(
        counters={volume: _sum(several) for volume, several in counted.items()},
        connections=connections,
        refused=sum(part.refused for part in parts),
        fenced=sum(part.fenced for part in parts),
        copies=[copy for part in parts for copy in part.copies],
    )


def _sum(several: list[Counters], *, in_flight: bool = True) -> Counters:
    added = {f.name: sum(getattr(counters, f.name) for counters in several) for f in fields(Counters)}
    return Counters(**added if in_flight else added | {"in_flight": 0})
