"""Copies to a returned replica what it has missed, while the client runs.

The rules: never two commands for one page in flight on the replica, and new data always wins.

- Pages with a write in flight, to this replica or past it, are left alone until the write is done everywhere.
- A write that comes while its page is being read from another replica goes out at once, and what was read
  is dropped.
- A write that comes while its page is being written here waits for that.
- A page counts as missed until its copy is acknowledged.
- What comes with other content than was paged out is read again, in case it was wrong on its way. After a few
  times it is copied all the same: the checksum of the page tells it from right content on any replica.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from farpage.blockio import Done, ReadDone
from farpage.definition.states import PAGE_BYTES
from farpage.volume.dirty import DirtyMap
from farpage.volume.pace import Pace

RUN_PAGES: Final = 64
"""256 KiB."""
RUNS_IN_FLIGHT: Final = 4
READS_OF_WRONG_PAGE: Final = 3

Read = Callable[[int, int, ReadDone], bool]
"""Start to read from a replica that has everything; False when there is none at the moment."""
Write = Callable[[int, memoryview, Done], None]


@dataclass(eq=False)
class _Run:
    """Pages on their way from one replica to the other."""

    first: int
    count: int
    writing: int = 0
    """Writes in flight; 0 while it is read."""
    overtaken: set[int] = field(default_factory=set)
    behind: list[Callable[[], None]] = field(default_factory=list)
    failed: bool = False

    def overlaps(self, first: int, count: int) -> bool:
        return self.first < first + count and first < self.first + self.count


class Resync:
    """The copy to one replica, from its return until it has everything or is lost again."""

    def __init__(
        self,
        dirty: DirtyMap,
        busy: set[int],
        pace: Pace,
        *,
        read: Read,
        write: Write,
        wrong: Callable[[int, memoryview], set[int]] | None,
        on_copied: Callable[[], None],
    ) -> None:
        """`busy` holds the pages that a write is in flight for; its owner calls `wake` when it shrinks."""
        self._dirty = dirty
        self._busy = busy
        self._pace = pace
        self._read = read
        self._write = write
        self._wrong = wrong
        self._wrong_reads: dict[int, int] = {}
        self._on_copied = on_copied
        self._loop = asyncio.get_running_loop()
        self._runs: list[_Run] = []
        self._copying: set[int] = set()
        self._cursor = 0
        self._timer: asyncio.TimerHandle | None = None
        self._scheduled: asyncio.Handle | None = None
        self._stopped = False
        self.copied_pages = 0

    def wake(self) -> None:
        """Go on, if there is something to copy and a replica to copy from; returns at once."""
        if self._scheduled is None and self._timer is None and not self._stopped:
            self._scheduled = self._loop.call_soon(self._pump)

    def stop(self) -> None:
        """Copy no more; starts the writes that waited, which find the replica lost."""
        self._stopped = True
        if self._timer:
            self._timer.cancel()
        if self._scheduled:
            self._scheduled.cancel()
        runs, self._runs = self._runs, []
        for run in runs:
            for start in run.behind:
                start()

    def admit(self, first: int, count: int, start: Callable[[], None]) -> None:
        """Start a new write to the replica as soon as no copy of its pages is being written."""
        for run in self._runs:
            if run.overlaps(first, count):
                if run.writing:
                    run.behind.append(partial(self.admit, first, count, start))
                    return
                run.overtaken.update(range(max(first, run.first), min(first + count, run.first + run.count)))
        start()

    # From run to run

    def _pump(self) -> None:
        self._scheduled = self._timer = None
        while len(self._runs) < RUNS_IN_FLIGHT:
            now = self._loop.time()
            delay = self._pace.delay(now)
            found = self._dirty.next_run(self._cursor, RUN_PAGES, self._busy | self._copying)
            if found is None:
                return
            if delay > 0:
                self._timer = self._loop.call_later(delay, self._pump)
                return
            run = _Run(*found)
            if not self._read(run.first * PAGE_BYTES, run.count * PAGE_BYTES, partial(self._arrived, run)):
                return
            self._pace.took(run.count * PAGE_BYTES, now)
            self._cursor = run.first + run.count
            self._copying.update(range(run.first, run.first + run.count))
            self._runs.append(run)

    def _arrived(self, run: _Run, error: int, payload: memoryview | None) -> None:
        if self._stopped:
            return
        if error or payload is None:
            self._ended(run)
            return
        content = memoryview(bytes(payload))  # the payload is valid only now
        run.overtaken |= self._to_read_again(run, content)
        pieces = self._pieces(run)
        run.writing = len(pieces)
        if not pieces:
            self._ended(run)
        for first, count in pieces:
            at = (first - run.first) * PAGE_BYTES
            part = content[at : at + count * PAGE_BYTES]
            self._write(first * PAGE_BYTES, part, partial(self._written, run, first, count))

    def _to_read_again(self, run: _Run, content: memoryview) -> set[int]:
        wrong = self._wrong(run.first, content) if self._wrong else set()
        for page in wrong:
            self._wrong_reads[page] = self._wrong_reads.get(page, 0) + 1
        return {page for page in wrong if self._wrong_reads[page] < READS_OF_WRONG_PAGE}

    @staticmethod
    def _pieces(run: _Run) -> list[tuple[int, int]]:
        """Return the parts of a run that are right and that no newer write has overtaken."""
        pieces: list[tuple[int, int]] = []
        for page in range(run.first, run.first + run.count):
            if page in run.overtaken:
                continue
            if pieces and sum(pieces[-1]) == page:
                pieces[-1] = (pieces[-1][0], pieces[-1][1] + 1)
            else:
                pieces.append((page, 1))
        return pieces

    def _written(self, run: _Run, first: int, count: int, error: int) -> None:
        if self._stopped:
            return
        if not error:
            self._dirty.clear(first, count)
            self.copied_pages += count
            self._pace.copied(count * PAGE_BYTES, self._loop.time())
        run.writing -= 1
        if not run.writing:
            self._ended(run)

    def _ended(self, run: _Run) -> None:
        self._runs.remove(run)
        self._copying.difference_update(range(run.first, run.first + run.count))
        for start in run.behind:
            start()
        self._on_copied()
        self.wake()
