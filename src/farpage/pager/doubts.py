"""Pages that a killed pager was writing or repairing: has that reached the volume? Nobody knows at first."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from farpage.pager.recovery import Pages
from farpage.pager.space import Space
from farpage.pager.states import DIRTY, REWRITTEN
from farpage.pager.table import runs_of

LOOK_SECONDS: Final = 0.1
"""Pause between two looks whether the servers are fenced."""


class Doubts:
    """Keeps such pages in memory until no write of the dead pager can arrive any more.

    See `farpage.volume.predecessors` for when that is.
    """

    def __init__(self, space: Space, on_settled: Callable[[], None]) -> None:
        self._space = space
        self._on_settled = on_settled
        self._loop = asyncio.get_running_loop()
        self._runs: list[tuple[int, int]] = []
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, pages: Pages) -> None:
        """Hold pages, all REWRITTEN, and the page under repair."""
        self._runs = runs_of(pages.tolist())
        self._space.doubtful_pages = len(pages)
        if self._space.repair_mark[0]:
            self._space.unwritable_page = self._space.repair_mark[0] - 1
        self._look()

    def _look(self) -> None:
        self._timer = None
        if not self._runs and self._space.unwritable_page is None:
            return
        if self._space.volume.predecessors_gone:
            self.settle()
        else:
            self._timer = self._loop.call_later(LOOK_SECONDS, self._look)

    def settle(self) -> None:
        """Let the pages be written again."""
        runs, self._runs = self._runs, []
        repaired, self._space.unwritable_page = self._space.unwritable_page, None
        if repaired is not None:
            self._space.repair_mark[0] = 0
        self._space.doubtful_pages = 0
        for first, count in runs:
            self._space.table.move(first, count, REWRITTEN, DIRTY)
            self._space.replacement.returned(first, count)
        if runs or repaired is not None:
            self._on_settled()

    def cancel(self) -> None:
        """Look no more."""
        if self._timer:
            self._timer.cancel()
