"""One replica of a mirror: its paths, what it has missed, and what it is good for."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from farpage.blockio import BlockIO, Done, ReadDone
from farpage.definition.states import ReplicaState
from farpage.volume.command import Finished
from farpage.volume.connector import Endpoint
from farpage.volume.dirty import DirtyMap
from farpage.volume.hedge import Latency
from farpage.volume.multipath import MultipathVolume
from farpage.volume.pace import Pace
from farpage.volume.paged import ReplicaStatus
from farpage.volume.resync import Resync
from farpage.volume.state import ReplicaHealth

PAGE_SHIFT = 12

Start: TypeAlias = Callable[[BlockIO, Finished], None]
"""Begins to carry something out, as in a `Command`."""

FIRST_PAUSE_SECONDS = 1.0
LONGEST_PAUSE_SECONDS = 30.0
"""Between two tries of a device that answers, but with errors."""


@dataclass(frozen=True)
class ReplicaPlace:
    """A replica: its device, the ways to it, and what the definition says of it."""

    device: str
    name: str
    state: ReplicaState
    endpoints: tuple[Endpoint, ...]
    unsure: bool = False
    """The definition may say something else by now, or soon: a change was under way."""


class Mode(enum.Enum):
    """What a replica gets."""

    COUNTS = enum.auto()
    """Every write, and none is acknowledged without it. It has every acknowledged page."""
    AWAY = enum.auto()
    """Nothing: it is lost, and what it misses is marked."""
    RESYNCING = enum.auto()
    """Every write, and besides what it has missed."""


def pages_of(offset: int, length_bytes: int) -> tuple[int, int]:
    """Return the first page of a range, and how many it touches."""
    first = offset >> PAGE_SHIFT
    return first, (offset + length_bytes - (first << PAGE_SHIFT) + 4095) >> PAGE_SHIFT


class Write:
    """A write, or something like it, on its way to the replicas."""

    __slots__ = (
        "count",
        "done",
        "error",
        "first",
        "length",
        "missed_by",
        "offset",
        "parts",
        "pending",
        "start",
    )

    def __init__(self, start: Start, offset: int, length_bytes: int, done: Done, pending: int) -> None:
        """`start(io, end)` is that of a `Command`; `pending` is how many replicas have yet to be heard of."""
        self.start = start
        self.offset = offset
        self.length = length_bytes
        self.first, self.count = pages_of(offset, length_bytes)
        self.parts: Sequence[tuple[int, int]] = ((self.first, self.count),)
        """The runs of pages that it writes, which may be less than its range; a replica that has it may lack
        what is between them."""
        self.done = done
        self.pending = pending
        self.error = 0
        self.missed_by: list[Replica] = []


class Read:
    """A read, repeated on another replica when it has to be."""

    __slots__ = ("done", "hedged_to", "length", "offset", "on")

    def __init__(self, offset: int, length: int, done: ReadDone) -> None:
        self.offset = offset
        self.length = length
        self.done: ReadDone | None = done
        """None once it is answered."""
        self.on = 0
        """Replicas that it is in flight on."""
        self.hedged_to: Replica | None = None


@dataclass(eq=False)
class Replica:
    """A replica and what the mirror knows of it."""

    device: str
    name: str
    volume: MultipathVolume
    pace: Pace
    mode: Mode
    since_seconds: float
    well: bool = False
    """A path answers, and the device takes writes."""
    reason: str = ""
    """Why it is not in sync."""
    dirty: DirtyMap | None = None
    busy: set[int] = field(default_factory=set)
    """Pages with a write in flight while it does not count."""
    unrecorded: list[Write] = field(default_factory=list)
    """Writes that it missed, which wait until it is recorded stale, or has them after all."""
    resync: Resync | None = None
    resynced_pages: int = 0
    latency: Latency = field(default_factory=Latency)
    reads: dict[Read, float] = field(default_factory=dict)
    """Reads in flight, with the time that each was started; oldest first."""
    pause_seconds: float = FIRST_PAUSE_SECONDS
    not_before_seconds: float = 0.0
    was_lost: bool = False
    """It has been away since it was last recorded in sync."""
    retiring: bool = False
    """It is to be taken out as soon as that can be recorded."""
    gone: bool = False
    """It was taken out: nothing waits for it any more."""

    @property
    def readable(self) -> bool:
        """Whether it has everything and answers."""
        return self.mode is Mode.COUNTS and self.well

    def become(self, mode: Mode, now_seconds: float, reason: str = "") -> None:
        """Change what it gets; `reason` says why it is not in sync."""
        self.mode = mode
        self.reason = reason
        self.since_seconds = now_seconds

    def has(self, read: Read) -> bool:
        """Tell whether it has the pages of a read, though not all others."""
        if self.mode is not Mode.RESYNCING or not self.well or self.dirty is None:
            return False
        first = read.offset >> PAGE_SHIFT
        return not self.dirty.any(first, (read.length + 4095) >> PAGE_SHIFT)

    def missed(self, write: Write, dirty: DirtyMap) -> None:
        """Mark what it has not got."""
        known = self in write.missed_by
        if not known:
            write.missed_by.append(self)
        for first, count in write.parts:
            dirty.mark(first, count)
            if not known:
                self.busy.update(range(first, first + count))

    def pause(self, now_seconds: float) -> None:
        """Leave a device alone that answers with errors."""
        self.not_before_seconds = now_seconds + self.pause_seconds
        self.pause_seconds = min(self.pause_seconds * 2, LONGEST_PAUSE_SECONDS)

    def status(self, recorded: ReplicaState | None, now_seconds: float) -> ReplicaStatus:
        """Return what users see."""
        dirty = self.dirty.count if self.dirty else 0
        if self.mode is Mode.COUNTS and recorded not in (ReplicaState.STALE, None):
            health = ReplicaHealth.IN_SYNC
        else:
            health = ReplicaHealth.STALE if self.mode is Mode.AWAY else ReplicaHealth.RESYNCING
        rate = self.pace.rate(now_seconds) if self.mode is Mode.RESYNCING else 0.0
        copied = self.resync.copied_pages if self.resync else self.resynced_pages
        return ReplicaStatus(
            device=self.device,
            name=self.name,
            health=health,
            reason="" if self.mode is Mode.COUNTS else self.reason,
            dirty_pages=dirty,
            resynced_pages=copied,
            rate_bytes=rate,
            eta_seconds=(dirty << PAGE_SHIFT) / rate if rate > 0 else None,
            since_seconds=self.since_seconds,
        )
