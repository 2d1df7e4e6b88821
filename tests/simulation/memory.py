"""A client's memory in the simulation: the model that the pager's tests use, with threads that wait in it.

Its pages, marks and events are the kernel's, so they outlive a worker that is killed.
"""

from __future__ import annotations

from collections.abc import Callable

from farpage.pager.table import PAGE_BYTES
from tests.simulation.world import Process, World
from tests.support.paging import ModelMemory

DESCRIPTOR = 100
WAKE_SECONDS = 0.00002


class SimulatedMemory(ModelMemory):
    """Memory whose events go to a worker, and whose accesses wait until the pager wakes them."""

    def __init__(self, world: World, pages: int) -> None:
        self.content = {}
        self.mapped = set()
        self.protected = set()
        self.poisoned = set()
        self.before = lambda name, first, count: None
        self.busy = set()
        self.pages = pages  # type: ignore[misc]
        self.worker: Process | None = None
        self.registered = True
        self._world = world
        self._chance = world.random("memory")
        self._faults = []
        self._waiting: dict[int, list[Callable[[], None]]] = {}

    # What the client does

    def access(self, page: int, write: bytes | None, again: Callable[[], None]) -> bytes | None:
        """Read a page or write it whole; with None the access waits, and `again` is called when it is woken.

        :raise MemoryError: the page is poisoned.
        """
        if not self.registered and page not in self.poisoned:
            if write is not None:
                self.content[page] = write
            return self.content.get(page, bytes(PAGE_BYTES))
        found = self.touch(page, write)
        if found is None:
            self._waiting.setdefault(page, []).append(again)
            self.tell_worker()
        return found

    def tell_worker(self) -> None:
        """Let the worker know that there are events."""
        if self.worker and self._faults:
            self._world.after(WAKE_SECONDS, self._readable)

    def _readable(self) -> None:
        if self.worker and self._faults:
            self.worker.loop.readable(DESCRIPTOR)

    def _woken(self, first: int, count: int) -> None:
        """Let the accesses that wait in a range try again."""
        if self._waiting:
            for page in range(first, first + count):
                for again in self._waiting.pop(page, ()):
                    self._world.after(WAKE_SECONDS, again)

    # What the pager does

    def fileno(self) -> int:
        return DESCRIPTOR

    def read_faults(self) -> list[tuple[int, int]]:
        faults = super().read_faults()
        self.tell_worker()
        return faults

    def _does(self, name: str, first: int, count: int) -> bool:
        self.before(name, first, count)
        # Now and then the client's mappings are changing: EAGAIN.
        return name in ("wake", "read_out", "release", "unregister") or self._chance.random() > 0.01

    def copy_in(self, first: int, source_address: int, count: int, *, protect: bool) -> int:
        done = super().copy_in(first, source_address, count, protect=protect)
        self._woken(first, done)
        return done

    def zero_in(self, first: int, count: int) -> int:
        done = super().zero_in(first, count)
        self._woken(first, done)
        return done

    def map_in(self, page: int, *, protect: bool) -> int:
        done = super().map_in(page, protect=protect)
        self._woken(page, done)
        return done

    def poison(self, page: int) -> int:
        done = super().poison(page)
        self._woken(page, done)
        return done

    def unprotect(self, first: int, count: int) -> bool:
        done = super().unprotect(first, count)
        if done:
            self._woken(first, count)
        return done

    def wake(self, first: int, count: int) -> None:
        super().wake(first, count)
        self._woken(first, count)

    def unregister(self) -> None:
        """Report nothing more: a page that is missing reads as zeros from now on."""
        super().unregister()
        self.registered = False
        self._woken(0, self.pages)

    def close(self) -> None:
        """Nothing is open."""
