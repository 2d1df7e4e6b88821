"""Holds every read of a run against the history of its page's register. Pure.

A page is a register with one writer: its writes never overlap. A read returns the last write that was
acknowledged before the read began, or one that was in flight at some moment of the read. Instants are numbers
that only rise: what happened at 3 was before what happened at 4.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass
class Write:
    """One write: acknowledged at `ended`, or never."""

    page: int
    version: int
    began: int
    ended: int | None = None


@dataclass(frozen=True)
class Read:
    """One read, and the version that it returned; None for content that nobody ever wrote there."""

    page: int
    version: int | None
    began: int
    ended: int
    by: str = ""


@dataclass
class History:
    """What was written and read; `version` 0 is what every page holds at first."""

    writes: dict[int, list[Write]] = field(default_factory=dict)
    reads: list[Read] = field(default_factory=list)
    _instant: int = 0

    def instant(self) -> int:
        """Return the next instant."""
        self._instant += 1
        return self._instant

    def begin_write(self, page: int, version: int) -> Write:
        """Record that a write was begun."""
        write = Write(page, version, self.instant())
        self.writes.setdefault(page, []).append(write)
        return write

    def end_write(self, write: Write) -> None:
        """Record that a write was acknowledged."""
        write.ended = self.instant()

    def read(self, page: int, version: int | None, began: int, by: str = "") -> None:
        """Record a read that has ended."""
        self.reads.append(Read(page, version, began, self.instant(), by))


def allowed(writes: list[Write], began: int, ended: int) -> set[int]:
    """Return the versions that a read may return; `writes` are those of its page, in their order."""
    versions = {0}
    for write in writes:
        if write.began > ended:
            break
        if write.ended is not None and write.ended < began:
            versions = set()
        versions.add(write.version)
    return versions


def wrong_reads(history: History) -> Iterator[str]:
    """Say of every read that may not be what it was."""
    for read in history.reads:
        may = allowed(history.writes.get(read.page, []), read.began, read.ended)
        if read.version not in may:
            found = "foreign content" if read.version is None else f"version {read.version}"
            yield (
                f"page {read.page}: {read.by or 'a read'} returned {found}, "
                f"but only {', '.join(map(str, sorted(may)))} may be there"
            )
