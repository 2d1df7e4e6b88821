"""What a pager needs of a client's volume, be it one replica or several on different devices.

Beyond a `BlockIO`'s reads and writes, which wait out every failure, a pager sees the replicas one by one:
to compare what each of them holds, and to put one right.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from farpage.blockio import Done, ReadDone, Run
from farpage.volume.connector import Endpoint
from farpage.volume.failover import FailoverLog
from farpage.volume.link import PathStatus
from farpage.volume.ownership import Ownership
from farpage.volume.shortcut import Shortcut
from farpage.volume.state import ReplicaHealth


@dataclass(frozen=True)
class ReplicaStatus:
    """One replica as users see it. `rate_bytes` is per second; `eta_seconds` None while nobody can tell."""

    device: str
    """Identifier of the device."""
    name: str
    """The device's name."""
    health: ReplicaHealth
    reason: str
    """Why it is not in sync; empty while it is."""
    dirty_pages: int
    resynced_pages: int
    rate_bytes: float
    eta_seconds: float | None
    since_seconds: float
    """Loop time of the last change of health."""


@dataclass(frozen=True)
class MirrorCounts:
    """Reads that were repeated on another replica because they were late, and how many of those won."""

    hedged_reads: int = 0
    hedges_won: int = 0


class PagedVolume(Protocol):
    """A client's volume. No error of a path or a device reaches the caller of read, write and zero."""

    ownership: Ownership
    """What all replicas are written under; its `fenced` says why not any more."""
    failovers: FailoverLog
    on_active: Callable[[], None]
    """Called when a path has taken over: what was held up can go on."""
    on_full: Callable[[bool], None]
    """Called with True when writes wait because no device has room for them, with False when they go on."""
    on_no_path: Callable[[bool], None]
    """Called with True when no path is left, or the last one doesn't answer, and with False when one does."""

    wanted_pages: Callable[[], NDArray[np.bool_]] | None
    """Tells which pages' content will be read before they are written again; None for all."""

    wrong_pages: Callable[[int, memoryview], set[int]] | None
    """`wrong_pages(first, content)` tells which pages of a run that was read are not what they should be.

    None where nobody knows.
    """

    @property
    def shortcut(self) -> Shortcut | None:
        """What may be read past the volume; None where everything is to be asked of it."""

    @property
    def epoch(self) -> int:
        """The highest epoch that the volume was opened with."""

    @property
    def predecessors_gone(self) -> bool:
        """Whether no server can still carry out what it was sent before this owner, or worker, began."""

    @property
    def held_bytes(self) -> int:
        """Bytes of writes that wait until a failed server is fenced."""

    @property
    def relayed(self) -> bool:
        """Whether it is being moved, and over a VIOS that is connected.

        Then pages that are present are read although others, and every write, may wait for an intermediate
        client.
        """

    @property
    def replicas(self) -> tuple[str, ...]:
        """The replicas that have every acknowledged page, by the identifier of their device."""

    @property
    def counts(self) -> MirrorCounts:
        """What was read twice."""

    def status(self) -> list[PathStatus]:
        """Every path, in the order of preference."""

    def replica_status(self) -> list[ReplicaStatus]:
        """Every replica."""

    async def open(self, timeout_seconds: float) -> None:
        """Connect, and wait until commands can be carried out.

        :raise NoPath: when they cannot after `timeout_seconds`; the volume is closed then.
        """

    def read(self, offset: int, length: int, done: ReadDone) -> None:
        """Read from whichever replica is fastest; waits out every failure."""

    def write(self, offset: int, data: memoryview, done: Done) -> None:
        """Write to every replica in sync; waits out every failure."""

    def write_runs(self, runs: Sequence[Run], done: Done) -> None:
        """Write several runs, `(offset, data)` in rising order; as `write`, and done when all are written."""

    def zero(self, offset: int, length: int, done: Done) -> None:
        """Zero on every replica in sync; waits out every failure."""

    def push(self) -> None:
        """Send what was submitted in this turn now."""

    def read_replica(
        self, device: str, offset: int, length: int, done: ReadDone, *, other_path: bool = False
    ) -> None:
        """Read what one replica holds; finishes with ESTALE when it is not, or no longer, in sync.

        With `other_path` it is read once over a path that does not carry the commands, which helps where the
        other VIOS or its network is at fault; finishes with ENOLINK when there is none.
        """

    def rewrite_replica(self, device: str, offset: int, data: memoryview, done: Done) -> None:
        """Put one replica right with content that is known to be good.

        Not to be called while a write of the same pages is in flight; writes that are begun meanwhile wait
        for it. Finishes with ESTALE when the replica is not, or no longer, in sync.
        """

    async def go_over(
        self, endpoints: Sequence[Endpoint], device: str, device_name: str, fences: str = ""
    ) -> None:
        """Use the one replica at other endpoints from now on, at which its content is just the same.

        For another device one of them is opened under a raised epoch, which drains the VIOS `fences` of what
        was in flight there. The paths to the same device go on, beside new ones.

        :raise NoPath: none of the endpoints can be opened; the volume is used as before.
        :raise SeveralReplicas: there is more than one.
        """

    async def leave(self, vios: str) -> None:
        """Move off a VIOS that is about to stop; on return it has no command of this volume any more.

        :raise NoPath: nothing can be read or written without it; the VIOS goes on being used then.
        """

    def rejoin(self, vios: str, reason: str = "") -> None:
        """Try the paths over a VIOS again from now on; until one is back its reason is `reason`."""

    async def close(self) -> None:
        """Wait for the commands in flight, then let go of the paths."""

    async def abandon(self) -> None:
        """Let go of the paths at once; commands not finished end with ESHUTDOWN."""
