"""The replicas of one mirror: which of them have everything, and what each of the others has missed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator

from farpage.definition.states import PAGE_BYTES
from farpage.errors import FarpageError
from farpage.volume.dirty import DirtyMap, DirtyStore, MemoryDirtyStore
from farpage.volume.replica import Mode, Replica


class Replicas:
    """The replicas of one mirror."""

    def __init__(self, size_bytes: int, store: DirtyStore | None) -> None:
        """Without a `store` nothing that a replica has missed is known any more after a restart."""
        self.all: list[Replica] = []
        self.opening = True
        """The mirror is not open yet: none is given up before it is known which of them answer."""
        self.closing = False
        self.changed = asyncio.Event()
        """Set whenever one of them was lost, has come back, or was taken out."""
        self.on_change: Callable[[], None] = lambda: None
        """Called then."""
        self._pages = size_bytes // PAGE_BYTES
        self._store: DirtyStore = store or MemoryDirtyStore(self._pages)

    def __iter__(self) -> Iterator[Replica]:
        """Go through them in the order of preference; what comes or goes meanwhile may be missed."""
        return iter(self.all)

    def have_changed(self) -> None:
        """Tell that one of them was lost, has come back, or was taken out."""
        self.changed.set()
        self.on_change()

    def find(self, device: str) -> Replica | None:
        """Return the replica on a device."""
        return next((replica for replica in self.all if replica.device == device), None)

    def counting(self, device: str) -> Replica | None:
        """Return the replica on a device if it has every acknowledged page."""
        replica = self.find(device)
        return replica if replica is not None and replica.mode is Mode.COUNTS else None

    def readable(self) -> Replica | None:
        """Return one that has everything and answers."""
        return next((replica for replica in self.all if replica.readable), None)

    def survives_without(self, replica: Replica) -> bool:
        """Tell whether another one has everything and answers."""
        return any(other is not replica and other.readable for other in self.all)

    def is_last(self, replica: Replica) -> bool:
        """Tell whether nothing can be read or written without a replica."""
        return replica.mode is Mode.COUNTS and not self.survives_without(replica)

    def push(self) -> None:
        """Send what was submitted in this turn now."""
        for replica in self.all:
            replica.volume.push()

    # What they have missed

    def dirty(self, replica: Replica, *, missed: bool = False) -> DirtyMap:
        """Return the map of what a replica has missed; with `missed` a new one says everything."""
        if replica.dirty is None:
            try:
                storage = self._store.dirty_map(replica.device, missed=missed)
            except FarpageError:
                # No room for it where it outlives the process: should that end, all pages count as missed.
                storage = memoryview(bytearray(bytes([missed]) * self._pages))
            replica.dirty = DirtyMap(storage)
        return replica.dirty

    def release(self, replica: Replica) -> None:
        """Let go of the map of what a replica has missed; it is there again after a restart."""
        if replica.dirty:
            replica.dirty.release()
            replica.dirty = None

    def forget_missed(self, device: str) -> None:
        """Drop the map of what the replica on a device has missed, for good."""
        replica = self.find(device)
        if replica is not None:
            self.release(replica)
        self._store.drop_dirty_map(device)
