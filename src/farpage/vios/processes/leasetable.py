"""The ends of leases in memory that the front writes and its data processes read.

A data process looks at the end itself, in the thread right before the system call. So a write is never
carried out after its lease because a message was late: renewals, which may be late, only ever extend it.

The memory is words of 64 bits: how many places are in use, then three words for each place:

    generation    which lease of the front's has the place; never used twice
    identifier    its name while it can be asked for, else 0
    end           nanoseconds of CLOCK_BOOTTIME; 0 before its first renewal

Words are written and read whole, and in order (x86-64 keeps it). A place is given to another lease only when
its lease is over; whoever holds that one yet finds another generation there, and so that it is over.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Final

from farpage.kernel.memory import create_memfd
from farpage.vios.leases import DEFAULT_LEASE_SECONDS, Lease, LeaseExport, Leases, boot_seconds

PLACES: Final = 1 << 13
"""More than a front takes connections."""
_WORDS: Final = 3
_GENERATION, _IDENTIFIER, _END = range(_WORDS)
TABLE_BYTES: Final = 8 * (1 + _WORDS * PLACES)


def _first_word(place: int) -> int:
    return 1 + place * _WORDS


class LeaseTable(Leases):
    """The leases of a front, whose ends its data processes see."""

    def __init__(
        self, lease_seconds: float = DEFAULT_LEASE_SECONDS, clock: Callable[[], float] = boot_seconds
    ) -> None:
        super().__init__(lease_seconds, clock)
        self.descriptor = create_memfd("farpage-leases", TABLE_BYTES)
        """The memory, for data processes; they can only read it as long as they map it so."""
        self._words = memoryview(mmap.mmap(self.descriptor, TABLE_BYTES)).cast("Q")
        self._generation = 0
        self._places: dict[str, int] = {}
        """Of the leases whose connections last."""
        self._left: set[int] = set()
        """Places of those whose connections have ended."""

    def begin(self, identifier: str) -> LeaseExport | None:
        """Enter a new lease; None when there is one of that name, or no place."""
        if identifier in self._places or (place := self._free_place()) is None:
            return None
        self._generation += 1
        at = _first_word(place)
        self._words[at + _IDENTIFIER] = 0
        self._words[at + _END] = 0
        self._words[at + _GENERATION] = self._generation
        self._words[at + _IDENTIFIER] = int(identifier, 16)
        self._words[0] = max(self._words[0], place + 1)
        self._left.discard(place)
        self._places[identifier] = place
        return super().begin(identifier)

    def end(self, identifier: str) -> None:
        """Forget a lease whose connection has ended; what is open under it may write until it is over."""
        super().end(identifier)
        place = self._places.pop(identifier, None)
        if place is not None:
            self._words[_first_word(place) + _IDENTIFIER] = 0
            self._left.add(place)

    def close(self) -> None:
        """Close the descriptor: no further process will map the memory."""
        os.close(self.descriptor)

    def _made(self, identifier: str) -> Lease:
        lease = super()._made(identifier)
        lease.on_renewed = partial(self._renewed, self._places[identifier])
        return lease

    def _renewed(self, place: int, ends_at: float) -> None:
        self._words[_first_word(place) + _END] = int(ends_at * 1e9)

    def _free_place(self) -> int | None:
        now = int(self._clock() * 1e9)
        for place in self._left:
            if self._words[_first_word(place) + _END] <= now:
                return place
        used = self._words[0]
        return used if used < PLACES else None


class SharedLease:
    """One lease as a data process sees it. `over` may be asked from any thread."""

    __slots__ = ("_at", "_clock_ns", "_generation", "_words")

    def __init__(self, words: memoryview, place: int, generation: int, clock_ns: Callable[[], int]) -> None:
        self._words = words
        self._at = _first_word(place)
        self._generation = generation
        self._clock_ns = clock_ns

    def over(self) -> bool:
        """Tell whether it has run out, or was never begun."""
        # In this order: an end that is another lease's comes with that one's generation.
        end = self._words[self._at + _END]
        if self._words[self._at + _GENERATION] != self._generation:
            return True
        return self._clock_ns() >= end


def _boot_nanoseconds() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class SharedLeases:
    """The front's leases, for a data process."""

    alive = 0
    """They are counted by the front."""

    def __init__(
        self, descriptor: int, lease_seconds: float, clock_ns: Callable[[], int] = _boot_nanoseconds
    ) -> None:
        """Map the memory; the descriptor is not needed any more then."""
        self.lease_seconds = lease_seconds
        mapped = mmap.mmap(descriptor, TABLE_BYTES, mmap.MAP_SHARED, mmap.PROT_READ)
        self._words = memoryview(mapped).cast("Q")
        self._clock_ns = clock_ns

    def find(self, identifier: str) -> SharedLease | None:
        """Look up a lease that is not over."""
        wanted, words = int(identifier, 16), self._words
        for place in range(words[0]):
            at = _first_word(place)
            generation = words[at + _GENERATION]
            if words[at + _IDENTIFIER] == wanted and words[at + _GENERATION] == generation:
                lease = SharedLease(words, place, generation, self._clock_ns)
                return None if lease.over() else lease
        return None

    def begin(self, identifier: str) -> LeaseExport | None:
        """Refuse: a data process is handed no connections of leases."""
        del identifier
        return None

    def end(self, identifier: str) -> None:
        """Do nothing."""
