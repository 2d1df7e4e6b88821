"""A scrub: reads what every replica in sync holds of a client's pages, in the background, and repairs it.

It finds what has gone wrong on a device before the page is wanted, while another replica is there to repair
it from. A page may change its state at any time meanwhile; what counts is that the volume was to hold content
with the same checksum when it was read and when it is judged.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from farpage.pager.checksum import page_checksums
from farpage.pager.faults import Faults
from farpage.pager.progress import ScrubProgress, ScrubState
from farpage.pager.space import Space
from farpage.pager.table import PAGE_BYTES, runs_of

WINDOW_PAGES: Final = 64
"""Pages that are read with one command."""
EMPTY_WINDOWS: Final = 256
"""After so many windows without a stored page other work gets its turn."""
GIVE_WAY_SECONDS: Final = 0.01
GIVE_WAY_TIMES: Final = 20
"""How often in a row a scrub gives way to accesses that wait, before it reads one window all the same."""


class Scrub:
    """One scrub of one client."""

    def __init__(
        self,
        space: Space,
        faults: Faults,
        rate_bytes: int,
        on_ended: Callable[[], None] = lambda: None,
    ) -> None:
        """`rate_bytes` is the most that is read from each replica per second; `on_ended` is called once."""
        self._space = space
        self._faults = faults
        self._loop = asyncio.get_running_loop()
        now = self._loop.time()
        self.progress = ScrubProgress(rate_bytes, space.table.pages, now)
        self._next_seconds = now
        self._on_ended = on_ended
        self._told_to_stop = asyncio.Event()
        self._task = self._loop.create_task(self._run())
        self._task.add_done_callback(self._ended)

    @property
    def running(self) -> bool:
        """Whether it goes on."""
        return self.progress.state is ScrubState.RUNNING

    def stop(self) -> None:
        """End it where it is; a repair under way is carried out."""
        if self.running:
            self._end(ScrubState.STOPPED)
            self._told_to_stop.set()

    def _end(self, state: ScrubState) -> None:
        self.progress.state = state
        self.progress.ended_seconds = self._loop.time()
        self._on_ended()

    def _ended(self, task: asyncio.Task[None]) -> None:
        if self.running:
            self._end(ScrubState.STOPPED)
        if not task.cancelled():
            task.result()

    @property
    def _may_go_on(self) -> bool:
        return self.running and not self._space.closed

    async def _run(self) -> None:
        pages, empty = self._space.table.pages, 0
        for first in range(0, pages, WINDOW_PAGES):
            count = min(WINDOW_PAGES, pages - first)
            stored = [page for page in range(first, first + count) if self._faults.salvage.is_stored(page)]
            if stored:
                for start, length in runs_of(stored):
                    await self._compare(start, length)
                    if not self._may_go_on:
                        return
            else:
                empty += 1
                if empty % EMPTY_WINDOWS == 0:
                    await asyncio.sleep(0)
                    if not self._may_go_on:
                        return
            self.progress.pages_done += count
        self._end(ScrubState.FINISHED)

    async def _compare(self, first: int, count: int) -> None:
        """Read a run from every replica and have those pages repaired that are not what they were to be."""
        await self._wait_turn(count)
        space, salvage = self._space, self._faults.salvage
        if not self._may_go_on:
            return
        expected: list[int] = space.table.checksums[first : first + count].tolist()
        devices = space.volume.replicas
        contents = await asyncio.gather(*(salvage.read_replica(device, first, count) for device in devices))
        if space.closed:
            return
        wrong: set[int] = set()
        for content in contents:
            if content is None:
                continue  # no longer in sync
            found = page_checksums(memoryview(content))
            wrong |= {first + index for index in range(count) if found[index] != expected[index]}
            self.progress.compared_pages += count
            space.counters.scrubbed_pages += count
        wrong = {page for page in wrong if salvage.still_stored(page, expected[page - first])}
        if wrong:
            space.counters.checksum_errors += len(wrong)
            result = await salvage.search(sorted(wrong))
            self.progress.wrong_pages += result.wrong_pages
            self.progress.repaired_pages += result.repaired_pages
            self.progress.lost_pages += len(result.lost)

    async def _wait_turn(self, pages: int) -> None:
        """Keep to the rate, and let accesses that wait go first."""
        now = self._loop.time()
        self._next_seconds = max(self._next_seconds, now)
        if self._next_seconds > now:
            await self._pause(self._next_seconds - now)
        self._next_seconds += pages * PAGE_BYTES / self.progress.rate_bytes
        for _ in range(GIVE_WAY_TIMES):
            if not self._faults.stalled:
                return
            await self._pause(GIVE_WAY_SECONDS)

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._told_to_stop.wait()
