"""What of a mirror is read past it: the storage of the replica that reads are sent to anyhow.

Reads that are late, or that fail, come to the mirror, which repeats them on another replica. The others are
told of in sums, so that it is still the fastest replica that they go to.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Final

from farpage.volume.reading import Reads
from farpage.volume.replica import Mode, Replica
from farpage.volume.replicas import Replicas
from farpage.volume.shortcut import Place

LATE_SECONDS: Final = 0.01
"""Reads that take longer are asked of the mirror; those of a single replica wait longer for its storage."""


class MirrorShortcut:
    """A `Shortcut` over the replicas of one mirror."""

    def __init__(self, replicas: Replicas, reads: Reads) -> None:
        self.on_change: Callable[[bool], None] = lambda _useless: None
        self._replicas = replicas
        self._reads = reads
        self._used: Replica | None = None
        replicas.on_change = self.look
        reads.on_preferred = self.look

    @property
    def place(self) -> Place | None:
        """Where the storage of the replica in use is; None when it has lent none."""
        place = self._used.volume.shortcut.place if self._used is not None else None
        return place and place._replace(late_seconds=min(place.late_seconds, LATE_SECONDS))

    def answered(self, reads: int, seconds: float) -> None:
        """Count reads, and how fast the replica was."""
        if self._used is not None:
            self._used.volume.shortcut.answered(reads, seconds)
            self._used.latency.answered(seconds)
            self._reads.compare_soon()

    def failed(self) -> None:
        """Take note that a replica lets reads wait; the mirror finds out what is wrong with it."""
        if self._used is not None:
            self._used.latency.waited(LATE_SECONDS)

    def look(self) -> None:
        """Use the replica that reads are sent to now."""
        used = self._choice()
        before, self._used = self._used, used
        if used is before:
            return
        if before is not None:
            before.volume.shortcut.on_change = lambda _useless: None
        if used is not None:
            used.volume.shortcut.on_change = partial(self._changed, used)
        self.on_change(before is not None and not before.readable)

    def _choice(self) -> Replica | None:
        preferred = self._reads.preferred
        if preferred is not None and preferred.readable:
            return preferred
        counting = (replica for replica in self._replicas if replica.mode is Mode.COUNTS)
        return self._replicas.readable() or next(counting, None)

    def _changed(self, replica: Replica, useless: bool) -> None:
        """Take note that the storage of the replica in use is another one, or that it was given up."""
        self.look()
        if replica is self._used or useless:
            self.on_change(useless)
