"""One client whose memory is paged: its table, its faults, its page-outs, and its way in and out."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import numpy as np

from farpage.nbd import eventloop
from farpage.pager.buffers import BufferPool
from farpage.pager.doubts import Doubts
from farpage.pager.eviction import Eviction
from farpage.pager.faults import Faults
from farpage.pager.limit import Limit
from farpage.pager.memory import CannotPoison, ClientGone, PagedMemory
from farpage.pager.outage import Outage
from farpage.pager.recovery import recover
from farpage.pager.releasing import Freeze
from farpage.pager.replacement import new_replacement
from farpage.pager.scrub import Scrub
from farpage.pager.space import Space
from farpage.pager.states import DIRTY, ON_DEVICE, POISONED, READING, REWRITTEN, WRITING, ZERO
from farpage.pager.table import PageTable, runs_of
from farpage.volume.paged import PagedVolume

if TYPE_CHECKING:
    from farpage.pager._hub import Hub

DETACH_WINDOW_PAGES: Final = 64
DETACH_READS: Final = 8
"""Reads in flight while a client is detached."""


class VolumeFenced(Exception):
    """Another owner has the volume, so nothing can be brought back from it; says why."""


class PagedClient:
    """Pages one client's registered memory against its open volume."""

    def __init__(
        self,
        memory: PagedMemory,
        table: PageTable,
        volume: PagedVolume,
        limit_pages: int,
        buffers: BufferPool,
        *,
        alarm: Callable[[str, str], None],
        on_gone: Callable[[], None],
        on_outage: Callable[[], None] = lambda: None,
        no_path_timeout_seconds: float | None = None,
        repair_mark: memoryview | None = None,
        ram_tier_percent: int = 0,
        hub: Hub | None = None,
    ) -> None:
        """`on_outage` is called when the volume stalls, or its device is full, and when no longer.

        `repair_mark` is kept with the table (`Space.repair_mark`). With a `hub` page-ins take the short way.
        """
        self.space = Space(
            memory, table, volume, Limit(limit_pages), buffers, alarm, on_gone, ram_tier_percent
        )
        if repair_mark is not None:
            self.space.repair_mark = repair_mark
        self.faults = Faults(self.space)
        self.eviction = Eviction(self.space, self.faults.admit)
        self.faults.on_pressure = self.eviction.wake
        # Pages held back from a failed server leave room for others to be written over the next path.
        volume.on_active = self.eviction.wake
        self.outage = Outage(self.space, self.faults, self.eviction, no_path_timeout_seconds, on_outage)
        volume.on_no_path = self.outage.no_path
        volume.on_full = self.outage.full
        volume.wanted_pages = self.space.wanted_pages
        volume.wrong_pages = self.space.wrong_pages
        self.scrub: Scrub | None = None
        """The latest one."""
        self.freeze = Freeze(self.space, self.faults, self.eviction, self.outage)
        self._doubts = Doubts(self.space, self.eviction.wake)
        self._loop = asyncio.get_running_loop()
        if hub is not None:
            self.faults.shorten(hub)

    def use(self, volume: PagedVolume) -> None:
        """Go on with another volume, which has the commands of the one before."""
        self.space.volume = volume
        self.faults.follow_volume()

    def start(self) -> None:
        """Take what is in memory into the table, and answer faults from now on.

        The memory is registered already, so nothing comes into it meanwhile.
        """
        table = self.space.table
        for first, count in self.space.memory.present_runs():
            table.move(first, count, ZERO, DIRTY)
            self.space.replacement.added(first, count)
        eventloop.add_reader(self._loop, self.space.memory.fileno(), self.faults.on_events)
        self.eviction.wake()

    def start_handed_over(self) -> None:
        """Begin with a table from another hypervisor, by which no page is in memory.

        What is there is from before: firmware that the VM has loaded at its start, for the machine that it
        is about to be replaced by. The memory is registered already, so nothing comes into it meanwhile.

        :raise ClientGone: the client has exited.
        """
        self.space.memory.release(0, self.space.table.pages)
        eventloop.add_reader(self._loop, self.space.memory.fileno(), self.faults.on_events)

    def recover(self) -> None:
        """Go on where a pager that was killed has left off; see `farpage.pager.recovery`.

        The volume is being opened under an epoch above every one that the dead pager used. A client that is
        frozen stays so.

        :raise ClientGone: the client has exited.
        """
        space = self.space
        present = np.zeros(space.table.pages, np.bool_)
        for first, count in space.memory.present_runs():
            present[first : first + count] = True
        decided = recover(space.table.states, present)
        for first, count in runs_of(decided.surplus.tolist()):
            space.memory.release(first, count)
        space.table.restate(decided.states)
        for first, count in runs_of(decided.in_memory.tolist()):
            space.replacement.added(first, count)
        if not self.freeze.frozen:
            eventloop.add_reader(self._loop, space.memory.fileno(), self.faults.on_events)
        # The dead pager took events with it: who waits for their answers shall ask again.
        space.memory.wake(0, space.table.pages)
        self._doubts.begin(decided.doubtful)
        self.eviction.wake()

    def set_limit(self, limit_pages: int) -> None:
        """Change the limit; page-outs begin at once when it is lower."""
        self.space.set_limit(Limit(limit_pages))
        self.eviction.wake()
        self.faults.admit()

    def start_scrub(self, rate_bytes: int, on_ended: Callable[[], None] = lambda: None) -> bool:
        """Read every stored page from every replica, in the background, and repair what is wrong.

        Returns False when one is running already, which goes on.
        """
        if self.scrub and self.scrub.running:
            return False
        self.scrub = Scrub(self.space, self.faults, rate_bytes, on_ended)
        return True

    def stop_scrub(self) -> None:
        """End the scrub that runs, if any."""
        if self.scrub:
            self.scrub.stop()

    async def page_out(self, client: str) -> None:
        """Freeze the client and bring every page of it to the volume; on return the table says so, for good.

        When it cannot be done the client goes on as before.

        :raise ClientGone: when the client exits meanwhile.
        :raise NotPagedOut: there is no way to do that at the moment.
        """
        self.stop_scrub()
        self.freeze.begin()
        done = False
        try:
            done = await self.freeze.page_out(client)
        finally:
            if not done and not self.space.closed:
                self.freeze.end()
        if not done:
            raise ClientGone("the client exited while it was paged out")

    async def detach(self) -> None:
        """Bring every page back into memory, stop reporting faults and close the volume.

        Waits out whatever a volume waits out. Afterwards the memory is as if it had never been paged.

        :raise ClientGone: when the client exits meanwhile.
        :raise VolumeFenced: another owner has the volume; the client stays paged then, and its accesses wait.
        :raise CannotPoison: it has lost pages, which would be zeros then; the client stays paged.
        """
        self.stop_scrub()
        self.eviction.stop()
        self.faults.stop()
        self.space.tier.clear()
        # Nothing is written again, and nobody reads the volume after this.
        self._doubts.settle()
        try:
            await self._bring_in_all()
            while self._still_moving():
                await self._settle()
                await self._bring_in_all()
            await self._mark_lost()
        except (VolumeFenced, CannotPoison):
            self.faults.resume()
            self.eviction.resume()
            raise
        try:
            self.space.memory.unregister()
        except OSError as error:
            raise ClientGone("the client exited while it was detached") from error
        self.abandon()
        # What waits for room on a full device is in memory, and wanted there.
        await (self.space.volume.abandon() if self.space.full else self.space.volume.close())

    def _still_moving(self) -> bool:
        counts = self.space.table.counts
        coming = counts[READING] or counts[ON_DEVICE]
        return bool(coming or (not self.space.full and (counts[WRITING] or counts[REWRITTEN])))

    async def _bring_in_all(self) -> None:
        table = self.space.table
        for page in table.where(ON_DEVICE).tolist():
            count = table.run(page, DETACH_WINDOW_PAGES, ON_DEVICE)
            if not count:
                continue  # came in with the window before, or with a fault
            self.faults.fetch(page, count)
            while table.counts[READING] > DETACH_READS * DETACH_WINDOW_PAGES:
                await self._settle()
        self.space.volume.push()

    async def _mark_lost(self) -> None:
        """See that every page that was given up fails accesses from now on, also those never asked for."""
        for page in self.space.table.where(POISONED).tolist():
            while not self.faults.mark_lost(page):
                await self._settle()

    async def _settle(self) -> None:
        """Wait for the volume to answer something."""
        self.faults.admit()
        await asyncio.sleep(0.001)
        if self.space.closed:
            raise ClientGone("the client exited while it was detached")
        if reason := self.space.volume.ownership.fenced:
            raise VolumeFenced(reason)

    def abandon(self) -> None:
        """Touch the client's memory no more."""
        if not self.space.closed:
            self.space.closed = True
            self.faults.close()
            self.eviction.stop()
            self.outage.cancel()
            self.stop_scrub()
            self._doubts.cancel()
            eventloop.remove_reader(self._loop, self.space.memory.fileno())
            # These refer to each other in circles; the table's memory must not wait for the collector.
            self.space.table = PageTable(0)
            self.space.tier.clear()
            self.space.repair_mark = memoryview(bytearray(8)).cast("Q")
            self.space.replacement = new_replacement(0)
