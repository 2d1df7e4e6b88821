"""Who uses a volume in a scenario: a plain user of its commands, or a pager with a guest."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol, cast

from farpage.handover import Handover
from farpage.hypervisor.tables import lay_out, table_of
from farpage.pager.buffers import BufferPool
from farpage.pager.client import PagedClient
from farpage.pager.limit import Limit
from farpage.pager.statefile import StateFile
from farpage.pager.states import CLEAN, ENTRY_BYTES, ON_DEVICE, READING, STATE_NAMES
from farpage.pager.table import PAGE_BYTES, PageTable
from farpage.pager.tier import ENTRY_BYTES as TIER_ENTRY_BYTES
from farpage.volume.paged import PagedVolume
from tests.simulation.checker import History
from tests.simulation.guest import Guest
from tests.simulation.memory import SimulatedMemory
from tests.simulation.stamps import content_of, version_of
from tests.simulation.world import Process, World

BUFFERS = BufferPool(8)
"""Used again by run after run: page-outs fill what they take."""

Store = Callable[[int], list[bytes]]
"""What each device in sync holds of a page."""


class User(Protocol):
    """What a scenario needs of its user."""

    pages: int
    history: History

    def start(self, process: Process, volume: PagedVolume) -> None:
        """Begin, within the process."""

    def use(self, volume: PagedVolume) -> None:
        """Use another volume from now on, which goes on with the commands of the one before."""

    def stop(self) -> None:
        """Begin nothing new."""

    @property
    def idle(self) -> bool:
        """Whether nothing waits."""

    def read_all(self) -> None:
        """Read every page for the last time."""

    def wrong_in_store(self, stored: Store) -> list[str]:
        """Compare what the devices hold with what they have to hold, once all is quiet."""


class VolumeUser:
    """Writes and reads pages of a volume as the pager does: never two commands for one page in flight."""

    pages = 24

    def __init__(self, world: World, history: History, client: int = 1) -> None:
        """`client` tells its contents from those of another user of the same volume."""
        self.history = history
        self._world = world
        self._number = client
        self._chance = world.random("user" if client == 1 else f"user {client}")
        self._versions = [0] * self.pages
        self._busy: dict[int, bool] = {}
        """Pages with a command in flight, and whether that is a write."""
        self._doubtful: set[int] = set()
        """Pages that the worker before was writing when it was killed: written anew before they are read."""
        self._stopped = False
        self._process: Process
        self._volume: PagedVolume

    def start(self, process: Process, volume: PagedVolume) -> None:
        self._doubtful.update(page for page, writes in self._busy.items() if writes)
        self._busy.clear()
        self._process = process
        self._volume = volume
        process.loop.call_soon(self._step)

    def use(self, volume: PagedVolume) -> None:
        self._volume = volume

    def stop(self) -> None:
        self._stopped = True

    @property
    def idle(self) -> bool:
        return not self._busy and not self._doubtful

    def _step(self) -> None:
        """Begin a few commands, and come again."""
        if self._doubtful and self._older_writes_are_gone():
            for page in sorted(self._doubtful):
                self._write(page)
            self._doubtful.clear()
        if self._stopped:
            if self._doubtful:
                self._process.loop.call_later(0.1, self._step)
            return
        for _ in range(self._chance.choice((1, 1, 2, 6))):
            page = self._chance.randrange(self.pages)
            if page in self._busy or page in self._doubtful:
                continue
            if self._chance.random() < 0.6 or self._is_foreign(page):
                self._write(page)
            else:
                self._read(page, "a read")
        self._volume.push()
        pause = self._chance.choice((0.001, 0.02, 0.1, 0.3))
        self._process.loop.call_later(pause, self._step)

    def _older_writes_are_gone(self) -> bool:
        """Tell whether no server can still carry out a write of the worker before."""
        return self._volume.predecessors_gone

    def _write(self, page: int) -> None:
        self._versions[page] += 1
        version = self._versions[page]
        self._busy[page] = True
        write = self.history.begin_write(page, version)
        content = memoryview(content_of(page, version, self._number))

        def done(error: int) -> None:
            self._busy.pop(page, None)
            if error:
                self._world.violated(f"a write of page {page} ended with errno {error}")
            self.history.end_write(write)

        self._volume.write(page * PAGE_BYTES, content, done)

    def _read(self, page: int, by: str) -> None:
        self._busy[page] = False
        began = self.history.instant()
        checked = False

        def done(error: int, payload: memoryview | None) -> None:
            nonlocal checked
            if error or payload is None:
                self._busy.pop(page, None)
                self._world.violated(f"a read of page {page} ended with errno {error}")
                return
            version = version_of(page, payload, self._number)
            if version is None and not checked:
                # It is another owner's, who has the volume by now. A pager knows by the checksum, and asks a
                # server, who knows the owner.
                checked = True
                self._volume.read_replica(self._volume.replicas[0], page * PAGE_BYTES, PAGE_BYTES, done)
                self._volume.push()
                return
            self._busy.pop(page, None)
            self.history.read(page, version, began, by)

        self._volume.read(page * PAGE_BYTES, PAGE_BYTES, done)

    def _is_foreign(self, page: int) -> bool:
        """Tell whether the page may hold what another user of the volume has left there: it is not read."""
        return self._number > 1 and self._versions[page] == 0

    def read_all(self) -> None:
        for page in range(self.pages):
            if not self._is_foreign(page):
                self._read(page, "the last read")
        self._volume.push()

    def wrong_in_store(self, stored: Store) -> list[str]:
        return [
            f"page {page}: a device in sync holds another version than {version}"
            for page, version in enumerate(self._versions)
            if not self._is_foreign(page)
            and any(version_of(page, content, self._number) != version for content in stored(page))
        ]


class TightLimit(Limit):
    """A limit of a few pages, below what the pager's own marks allow."""

    def __init__(self, pages: int, chance: random.Random) -> None:
        super().__init__(pages, max(pages // 8, 1))
        self.reading = max(pages // 2, 1)  # type: ignore[misc]
        self.most = pages + chance.choice((0, 1, 4))  # type: ignore[misc]
        self.in_flight = chance.choice((1, max(pages // 8, 1)))  # type: ignore[misc]


@dataclass
class _State:
    """What handing over needs of a state file."""

    pages: int
    table_storage: memoryview
    foreign: bool = False


class PagerUser:
    """A guest over the real pager."""

    pages = 40

    def __init__(self, world: World, history: History, client: int = 1) -> None:
        """`client` tells its contents from those of another user of the same volume."""
        self.history = history
        self._world = world
        self._number = client
        self._chance = world.random("pager" if client == 1 else f"pager {client}")
        self.memory = SimulatedMemory(world, self.pages)
        self.guest = Guest(world, self.memory, history, client)
        self._storage = memoryview(bytearray(self.pages * ENTRY_BYTES))
        self._repair_mark = memoryview(bytearray(8)).cast("Q")
        self._limit = TightLimit(self._chance.randrange(12, 28), self._chance)
        # Often none, as what it answers tests no device; a page's content takes hardly any room.
        self._tier_bytes = world.random("tier").choice((0, 0, 5, self.pages)) * TIER_ENTRY_BYTES
        self._detaching: asyncio.Task[None] | None = None
        self._releasing: asyncio.Task[None] | None = None
        self._process: Process
        self._client: PagedClient
        self._started = False
        self.frozen = False
        """A worker that takes over answers no access before it is told to."""

    def start(self, process: Process, volume: PagedVolume) -> None:
        self._process = process
        self._releasing = None
        self.memory.worker = process
        self._client = client = PagedClient(
            self.memory,
            PageTable(self.pages, self._storage),
            volume,
            self.pages - 1,
            BUFFERS,
            alarm=lambda kind, message: self._world.note(f"alarm {kind}: {message}"),
            on_gone=lambda: self._world.violated("the pager believes that its client is gone"),
            repair_mark=self._repair_mark,
        )
        client.space.limit = self._limit
        client.space.tier.resize(self._tier_bytes)
        if self._started:
            if self.frozen:
                client.freeze.begin()
            client.recover()
            return
        self._started = True
        self._begin(client)

    def _begin(self, client: PagedClient) -> None:
        """Have the first worker serve the guest."""
        client.start()
        self.guest.start(self._chance.choice((1, 2, 3)))

    def use(self, volume: PagedVolume) -> None:
        self._client.space.volume = volume

    async def page_out(self) -> None:
        """Have the worker at hand freeze the guest and page everything out.

        :raise FarpageError: it cannot now; the guest goes on.
        """
        if self._releasing is None:
            self._releasing = self._process.loop.create_task(self._client.page_out("vm1"))
        # As in a worker, a control process that was started anew joins what an older one has begun.
        try:
            await asyncio.shield(self._releasing)
        finally:
            if self._releasing is not None and self._releasing.done():
                self._releasing = None

    async def thaw(self) -> None:
        """Have the worker at hand answer accesses again."""
        self._client.freeze.end()
        if self._releasing is not None:
            await asyncio.wait([self._releasing])
            self._releasing = None

    def let_go(self) -> None:
        """Have the worker at hand touch the memory no more, which stays registered."""
        self._client.abandon()

    def table(self, epoch: int, attempt: int) -> bytes:
        """Return the table of a guest that is paged out, as it is handed over."""
        return table_of("vm1", epoch, attempt, cast(StateFile, _State(self.pages, self._storage)))

    def stop(self) -> None:
        self.guest.stopped = True

    @property
    def idle(self) -> bool:
        return self.guest.idle and (self._detaching is None or self._detaching.done())

    def read_all(self) -> None:
        """Read everything, either through the pager or after a detachment."""
        if self._chance.random() < 0.5:
            self._detaching = self._process.loop.create_task(self._client.detach())
            self._detaching.add_done_callback(lambda _: self._guest_reads_all())
        else:
            self._guest_reads_all()

    def _guest_reads_all(self) -> None:
        for page in range(self.pages):
            self.guest.read(page, "the last read")

    def wrong_in_store(self, stored: Store) -> list[str]:
        table, tier = self._client.space.table, self._client.space.tier
        problems = []
        for page in range(table.pages):
            state = table.state[page]
            if page in tier and state != ON_DEVICE:
                problems.append(f"page {page} is in the RAM tier, and {STATE_NAMES[state]}")
            if state in (ON_DEVICE, CLEAN, READING) and page not in self.guest.may_be_lost:
                contents = stored(page)
                versions = {version_of(page, content, self._number) for content in contents}
                present = self.memory.content.get(page)
                if len(versions) != 1 or None in versions:
                    problems.append(f"page {page} is paged out, but the devices in sync hold {versions}")
                elif state == CLEAN and present is not None and present != contents[0]:
                    problems.append(f"page {page} is clean, but the device holds another version")
        return problems


class HandedUser(PagerUser):
    """The guest of another hypervisor's pager, over one that begins with what that has handed over."""

    def __init__(self, before: PagerUser, found: Handover) -> None:
        """`before` has paged the guest out, and never comes back."""
        super().__init__(before._world, before.history)
        self.guest = before.guest
        lay_out(found, cast(StateFile, _State(self.pages, self._storage)))

    def _begin(self, client: PagedClient) -> None:
        client.start_handed_over()
        self.guest.move_to(self.memory)
