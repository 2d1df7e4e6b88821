"""What a server serves: the border between the wire and whoever owns the volumes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol

from farpage.blockio import BlockIO, BlockLimits, Feature, Lent


@dataclass(frozen=True)
class Peer:
    """Who is at the other end of a connection."""

    address: str
    """As `farpage.address` writes it; `unix:` alone for a client's unnamed socket."""
    pid: int | None = None
    """Process of a UNIX socket's client, from SO_PEERCRED (unix(7)); None on TCP."""
    uid: int | None = None
    """User of a UNIX socket's client; None on TCP."""


@dataclass(slots=True)
class Counters:
    """What was done through one export; whoever owns the object may add up several connections in it."""

    reads: int = 0
    writes: int = 0
    others: int = 0
    """Zero, trim, flush, cache and block status commands."""
    read_bytes: int = 0
    written_bytes: int = 0
    errors: int = 0
    """Commands answered with an error, refused ones included."""
    in_flight: int = 0
    """Commands handed to the BlockIO and not yet finished."""


@dataclass(frozen=True)
class ExportInfo:
    """What a client may learn about an export without opening it."""

    size_bytes: int
    read_only: bool = False
    limits: BlockLimits = field(default_factory=BlockLimits)
    features: Feature = Feature.NONE
    description: str = ""

    @classmethod
    def of(cls, io: BlockIO, description: str = "") -> ExportInfo:
        """Return the information about what `io` is."""
        return cls(io.size_bytes, io.read_only, io.limits, io.features, description)


@dataclass(eq=False)
class Export:
    """One connection's hold on a volume."""

    name: str
    io: BlockIO
    description: str = ""
    on_closed: Callable[[], None] = lambda: None
    """Called exactly once, when the connection has ended and none of its commands is left in `io`."""
    counters: Counters = field(default_factory=Counters)
    on_given_up: Callable[[], None] = lambda: None
    """Called when nobody waits for the answers to the commands in flight any more, or they are to end now
    because the connection is fenced. An `io` whose commands may wait for something other than a device
    finishes them, at once or later. It may be called more than once."""
    lend: Callable[[], Awaitable[Lent | None]] | None = None
    """Opens the storage once more for a client on this host that asks to read it by itself; None, or an
    answer of None, where that cannot be."""


class ExportProvider(Protocol):
    """Resolves the names that clients ask for."""

    async def open(self, name: str, peer: Peer) -> Export:
        """Return a new hold on the export.

        The server counts the connection among those that `Server.fence` looks at from the moment this
        returns, with no other task in between; an open that a fence must stop is refused in here.

        :raise ExportRefused: for an unknown name, an older epoch, a peer that may not; its message is sent.
        """

    async def describe(self, name: str, peer: Peer) -> ExportInfo:
        """Describe an export without opening it or changing anything.

        :raise ExportRefused: as `open` would.
        """

    async def names(self, peer: Peer) -> list[tuple[str, str]]:
        """Return name and description of every export that this peer may see."""
