"""Leases: an owner's writes are carried out only while it goes on asking for that.

Each data worker of a hypervisor keeps one connection to the export `lease:ID`, a few bytes that are no
volume. Reading them gives a nonce; writing the nonce back makes the lease last until `lease` after the moment
at which that nonce was *given*. So a renewal that lay in a socket's buffer while this process was
stopped extends nothing, and whoever wrote it knows when the lease ends at the latest: `lease` after it got
the nonce.

A lease that has run out never lives again. Its owner opens a new one, and its volumes anew.
"""

from __future__ import annotations

import errno
import re
import struct
import time
from collections.abc import Callable
from typing import Protocol

from farpage.blockio import BlockLimits, Done, Feature, ReadDone
from farpage.vios.refusing import RefusingCommands

DEFAULT_LEASE_SECONDS = 5.0

_EXPORT = re.compile(r"lease:([0-9a-f]{16})")
_OFFER = struct.Struct("<QQ")
"""A nonce, and for how many nanoseconds it makes the lease last."""
_NONCE = struct.Struct("<Q")


def boot_seconds() -> float:
    """Return the time that leases go by: CLOCK_BOOTTIME, which a suspended host does not stop."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def parse_lease_name(text: str) -> str | None:
    """Return the identifier in `lease:ID`; None for any other export name."""
    match = _EXPORT.fullmatch(text)
    return match[1] if match else None


class Lease:
    """One lease; begun by its first renewal. `over` may be asked from any thread."""

    __slots__ = ("_clock", "_ends_at", "_given_at", "_lease_seconds", "_nonce", "_used", "on_renewed")

    def __init__(self, lease_seconds: float, clock: Callable[[], float]) -> None:
        self._lease_seconds = lease_seconds
        self._clock = clock
        self._ends_at: float | None = None
        self._nonce = 0
        self._used = True
        self._given_at = 0.0
        self.on_renewed: Callable[[float], None] = lambda ends_at: None
        """Told when it ends from now on, by its clock."""

    def over(self) -> bool:
        """Tell whether it has run out, or was never begun."""
        ends_at = self._ends_at
        return ends_at is None or self._clock() >= ends_at

    def offer(self) -> bytes:
        """Return a new nonce and how long it makes the lease last; only the latest one counts."""
        self._nonce += 1
        self._used = False
        self._given_at = self._clock()
        return _OFFER.pack(self._nonce, int(self._lease_seconds * 1e9))

    def renew(self, nonce: bytes) -> bool:
        """Extend the lease with the latest nonce, once; False when it has run out or the nonce is another."""
        valid = nonce == _NONCE.pack(self._nonce) and not self._used
        if not valid or (self._ends_at is not None and self.over()):
            return False
        self._used = True
        self._ends_at = self._given_at + self._lease_seconds
        self.on_renewed(self._ends_at)
        return True


class Leases:
    """The leases of a VIOS, by their identifiers; lives in the data plane's event loop."""

    def __init__(
        self, lease_seconds: float = DEFAULT_LEASE_SECONDS, clock: Callable[[], float] = boot_seconds
    ) -> None:
        self.lease_seconds = lease_seconds
        self._clock = clock
        self._leases: dict[str, Lease] = {}

    def begin(self, identifier: str) -> LeaseExport | None:
        """Enter a new lease; None when there is one of that name."""
        if identifier in self._leases:
            return None
        lease = self._leases[identifier] = self._made(identifier)
        return LeaseExport(lease)

    def _made(self, identifier: str) -> Lease:
        del identifier
        return Lease(self.lease_seconds, self._clock)

    def end(self, identifier: str) -> None:
        """Forget a lease whose connection has ended; what is open under it may write until it is over."""
        self._leases.pop(identifier, None)

    def find(self, identifier: str) -> Lease | None:
        """Look up a lease that is not over."""
        lease = self._leases.get(identifier)
        return None if lease is None or lease.over() else lease

    @property
    def alive(self) -> int:
        """Count those that are not over. Safe to call from any thread."""
        return sum(not lease.over() for lease in tuple(self._leases.values()))


class GivesLeases(Protocol):
    """The leases of a VIOS, as its exports see them."""

    @property
    def lease_seconds(self) -> float:
        """So long a lease lasts after its renewal was offered."""

    @property
    def alive(self) -> int:
        """Count those that are not over. Safe to call from any thread."""

    def begin(self, identifier: str) -> LeaseExport | None:
        """Enter a new lease; None when it cannot be had."""

    def end(self, identifier: str) -> None:
        """Forget a lease whose connection has ended."""

    def find(self, identifier: str) -> Ending | None:
        """Look up a lease that is not over."""


class Ending(Protocol):
    """What ends, at a time that may yet be put off."""

    def over(self) -> bool:
        """Tell whether it has ended, from any thread."""


class LeaseExport(RefusingCommands):
    """A lease as a `BlockIO`: read the offer, write the nonce."""

    size_bytes = _OFFER.size
    read_only = False
    limits = BlockLimits(minimum=1, preferred=4096, maximum=4096)
    features = Feature.NONE

    def __init__(self, lease: Lease) -> None:
        self._lease = lease

    def read_now(self, offset: int, into: memoryview) -> bool:
        """Fill `into` with an offer."""
        into[:] = self._lease.offer()[offset : offset + len(into)]
        return True

    def read(self, offset: int, length: int, done: ReadDone) -> None:
        """Read an offer."""
        done(0, memoryview(self._lease.offer())[offset : offset + length])

    def write(self, offset: int, data: memoryview, done: Done, *, fua: bool = False) -> None:
        """Renew; finishes with ESHUTDOWN when the lease is over, or the nonce is not the latest."""
        del fua
        done(0 if offset == 0 and self._lease.renew(bytes(data)) else errno.ESHUTDOWN)

    def flush(self, done: Done) -> None:
        """Do nothing."""
        done(0)

    async def close(self) -> None:
        """Do nothing: the lease runs out by itself."""
