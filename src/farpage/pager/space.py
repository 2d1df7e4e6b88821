"""What the parts of one client's pager share: its memory, table, volume, order of eviction and counts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import TYPE_CHECKING, Protocol, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from farpage.pager.buffers import BufferPool
from farpage.pager.checksum import page_checksums
from farpage.pager.counters import Counters
from farpage.pager.limit import Limit
from farpage.pager.memory import ClientGone, PagedMemory
from farpage.pager.replacement import Replacement, new_replacement
from farpage.pager.states import CLEAN, DIRTY, POISONED, READING, REWRITTEN, STORED, WRITING, ZERO
from farpage.pager.table import PAGE_BYTES, PageTable
from farpage.pager.tier import RamTier
from farpage.volume.paged import PagedVolume

if TYPE_CHECKING:
    from farpage.pager.lane import ShortWay


@dataclass
class Space:
    """One client's paging space."""

    memory: PagedMemory
    table: PageTable
    volume: PagedVolume
    limit: Limit
    buffers: BufferPool
    alarm: Callable[[str, str], None]
    on_gone: Callable[[], None]
    ram_tier_percent: int = 0
    """Share of the limit that compressed pages may take."""
    tier: RamTier = field(init=False)
    """What left memory and may come back without a device; only pages that are ON_DEVICE."""
    replacement: Replacement = field(init=False)
    counters: Counters = field(default_factory=Counters)
    full: bool = False
    """No device has room: nothing can be written out."""
    cut_off: bool = False
    """Pages are read, but nothing can be written out: the intermediate client of a move is away."""
    doubtful_pages: int = 0
    """Pages that wait until no write of a killed pager can arrive any more."""
    repair_mark: memoryview = field(default_factory=lambda: memoryview(bytearray(8)).cast("Q"))
    """One word that outlives the pager: the page that a repair is under way for, plus one; 0 for none."""
    unwritable_page: int | None = None
    """The page that a killed pager was repairing: not written before that repair can no longer arrive."""
    paging_out: bool = False
    """Page-outs go on until there is room again: they need not be told that there is little."""
    short: ShortWay | None = None
    """What the compiled loop does for this client; None where there is none."""
    closed: bool = False
    """The client is gone or detached: nothing may touch its memory any more."""

    def __post_init__(self) -> None:
        self.replacement = new_replacement(self.table.pages)
        self.tier = RamTier()
        self.set_limit(self.limit)

    def set_limit(self, limit: Limit) -> None:
        """Change the limit, and with it how much of it may hold compressed pages."""
        self.limit = limit
        self.tier.resize(limit.pages * PAGE_BYTES * self.ram_tier_percent // 100)
        self.changed()

    def settle(self) -> None:
        """Count what the short way has done; before anybody looks at the counters."""
        if self.short is not None:
            self.short.settle()

    def changed(self) -> None:
        """Take note that the limit, or what counts against it, is another one."""
        if self.short is not None:
            self.short.refresh()

    @property
    def page_outs_wait(self) -> bool:
        """Whether nothing can be written out, while pages that are stored can still be brought in."""
        return self.full or self.cut_off

    @property
    def taken(self) -> int:
        """Pages in memory and on their way into it, and what compressed ones take."""
        counts = self.table.counts
        in_memory = counts[CLEAN] + counts[DIRTY] + counts[WRITING] + counts[REWRITTEN]
        return in_memory + counts[READING] + self.tier.taken_pages

    @property
    def room(self) -> int:
        """Pages that may still be brought in."""
        limit = self.limit
        return min(limit.most - self.taken, limit.reading - self.table.counts[READING])

    def wanted_pages(self) -> NDArray[np.bool_]:
        """Tell which pages' content is on the volume, or about to be, there alone or in memory as well."""
        return np.isin(self.table.states, (ZERO, DIRTY, POISONED), invert=True)

    def wrong_pages(self, first: int, content: memoryview) -> set[int]:
        """Tell which pages of a run, as the volume returned it, are not what was paged out last.

        Nothing is said of pages that the volume is not to hold, or that a write is in flight for.
        """
        checksums, states = self.table.checksums, self.table.state
        return {
            page
            for page, found in enumerate(page_checksums(content), first)
            if states[page] in STORED and found != checksums[page]
        }

    def waited(self, began_seconds: float, ended_seconds: float) -> None:
        """Count an access that waited for its page."""
        seconds = ended_seconds - began_seconds
        self.counters.waited(seconds)
        if seconds > 0.01:
            self.volume.failovers.note_stall(began_seconds, ended_seconds)


class _Part(Protocol):
    _space: Space


Step = TypeVar("Step", bound=Callable[..., None])


def ends_with_client(step: Step) -> Step:
    """Make a method that the event loop calls end quietly when the client has exited meanwhile."""

    @wraps(step)
    def guarded(part: _Part, *arguments: object) -> None:
        if part._space.closed:
            return
        try:
            step(part, *arguments)
        except ClientGone:
            part._space.on_gone()

    return cast(Step, guarded)
