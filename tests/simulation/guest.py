"""A guest whose memory is paged: threads that write and read versions of pages, and remember each."""

from __future__ import annotations

from tests.simulation.checker import History
from tests.simulation.memory import SimulatedMemory
from tests.simulation.stamps import content_of, version_of
from tests.simulation.world import World

PAUSES_SECONDS = (0.001, 0.02, 0.15, 0.5)


class Guest:
    """A guest's threads. An access happens at one instant, so a read returns the very last write."""

    def __init__(self, world: World, memory: SimulatedMemory, history: History, client: int = 1) -> None:
        self._world = world
        self._client = client
        self._memory = memory
        self._history = history
        self._chance = world.random("guest" if client == 1 else f"guest {client}")
        self._versions = [0] * memory.pages
        self._working_set = self._chance.sample(range(memory.pages), memory.pages // 2)
        self.may_be_lost: set[int] = set()
        """Pages whose only stored content was spoilt: poison is right for them."""
        self.lost: set[int] = set()
        self.stopped = False
        self.paused = False
        """Begins no access for now, as a VM that stands."""
        self.most_waiting = 1 << 30
        """It has no more threads than that to wait with."""
        self.waiting = 0
        """Accesses under way."""

    def start(self, threads: int) -> None:
        """Start threads."""
        for _ in range(threads):
            self._next()

    def move_to(self, memory: SimulatedMemory) -> None:
        """Go on with other memory; accesses that wait are made there."""
        before, self._memory = self._memory, memory
        before.wake(0, before.pages)
        self.paused = False

    @property
    def idle(self) -> bool:
        """Whether no access is under way."""
        return self.waiting == 0

    def _next(self) -> None:
        if self.stopped:
            return
        if self.paused or self.waiting > self.most_waiting:
            self._world.after(PAUSES_SECONDS[-1], self._next)
            return
        chance = self._chance
        if chance.random() < 0.9:
            page = chance.choice(self._working_set)
        else:
            page = chance.randrange(self._memory.pages)
        kind = chance.random()
        for follower in range(page, min(page + chance.choice((1, 1, 1, 6)), self._memory.pages)):
            if kind < 0.45:
                self.write(follower)
            elif kind < 0.5:
                self.write(follower, zeros=True)
            elif kind < 0.98:
                self.read(follower)
            elif kind < 0.99:
                self._memory.unmap(follower)
            else:
                self._balloon(follower)
        self._world.after(chance.choice(PAUSES_SECONDS) * (0.5 + chance.random()), self._next)

    def _balloon(self, page: int) -> None:
        """Give a page back to the host and write to it before it is read again, as a guest does."""
        if page in self.lost:
            return
        self._memory.remove(page)
        self._history.begin_write(page, 0)
        self.write(page)

    def write(self, page: int, *, zeros: bool = False) -> None:
        """Write a page as soon as the pager lets the access through."""
        if page in self.lost:
            return
        self.waiting += 1
        self._try_write(page, zeros)

    def _try_write(self, page: int, zeros: bool) -> None:
        version = 0 if zeros else self._versions[page] + 1
        try:
            found = self._memory.access(
                page, content_of(page, version, self._client), lambda: self._try_write(page, zeros)
            )
        except MemoryError:
            self._poisoned(page)
            return
        if found is not None:
            self.waiting -= 1
            self._versions[page] = max(self._versions[page], version)
            self._history.end_write(self._history.begin_write(page, version))

    def read(self, page: int, by: str = "the guest") -> None:
        """Read a page as soon as the pager lets the access through."""
        if page in self.lost:
            return
        self.waiting += 1
        self._try_read(page, by)

    def _try_read(self, page: int, by: str) -> None:
        try:
            found = self._memory.access(page, None, lambda: self._try_read(page, by))
        except MemoryError:
            self._poisoned(page)
            return
        if found is not None:
            self.waiting -= 1
            self._history.read(page, version_of(page, found, self._client), self._history.instant(), by)

    def _poisoned(self, page: int) -> None:
        self.waiting -= 1
        self.lost.add(page)
        if page not in self.may_be_lost:
            self._world.violated(f"page {page} is poisoned although its content is not lost")
