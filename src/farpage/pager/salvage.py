"""Pages that came back from the volume with other content than was paged out: found elsewhere, or lost.

Every replica in sync is read. One that matches the table's checksum is used, and those that do not are put
right with it, before the page is let in: a page on its way into memory is not paged out, so no other command
for it is in flight. When none matches, each is read once more, over another path where there is one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from farpage.pager.checksum import page_checksum, page_checksums
from farpage.pager.space import Space
from farpage.pager.states import CLEAN, STORED
from farpage.pager.table import PAGE_BYTES, runs_of

NAMED_PAGES: Final = 8
"""Most pages that an alarm names."""


@dataclass
class Salvaged:
    """What came of some pages: the content of those found, and which are lost.

    `wrong_pages` and `repaired_pages` count a page once for each replica.
    """

    found: dict[int, bytes] = field(default_factory=dict)
    lost: list[int] = field(default_factory=list)
    wrong_pages: int = 0
    repaired_pages: int = 0


@dataclass
class _Search:
    """Pages looked for, what was found, and which replicas have something else."""

    pages: list[int]
    expected: dict[int, int]
    found: dict[int, bytes] = field(default_factory=dict)
    wrong: dict[str, set[int]] = field(default_factory=dict)

    @property
    def missing(self) -> list[int]:
        return [page for page in self.pages if page not in self.found]


class Salvage:
    """Finds right content for pages, and puts replicas right; for one batch of pages at a time."""

    def __init__(self, space: Space) -> None:
        self._space = space
        # Page-ins and a scrub may meet at the same page, which must not be repaired twice at a time.
        self._one_at_a_time = asyncio.Lock()

    async def search(self, pages: Sequence[int]) -> Salvaged:
        """Find the content of pages, rising, whose checksum did not match, and repair the replicas.

        Pages that are not stored on the volume, or that change meanwhile, are left out, all of them when the
        client ends. A page that is clean in memory may be found there.
        """
        async with self._one_at_a_time:
            space = self._space
            if space.closed:
                return Salvaged()
            stored = [page for page in pages if self.is_stored(page)]
            checksums = space.table.checksums[stored].tolist()
            search = _Search(stored, dict(zip(stored, checksums, strict=True)))
            for ask in (self._ask_every_replica, self._ask_over_other_paths):
                await ask(search)
                if space.closed:
                    return Salvaged()
                self._leave_out_changed(search)
                self._look_in_memory(search)
                if not search.missing:
                    break
            repaired = await self._repair(search)
            if space.closed:
                return Salvaged()
            self._tell(search, repaired)
            wrong = sum(len(pages) for pages in search.wrong.values())
            return Salvaged(search.found, search.missing, wrong, sum(repaired.values()))

    async def _ask_every_replica(self, search: _Search) -> None:
        """Read every replica in sync, also one that came to be while another was waited for in vain."""
        volume = self._space.volume
        asked: set[str] = set()
        while new := [device for device in volume.replicas if device not in asked]:
            for device in new:
                await self._read(search, device, search.pages, False)
            asked.update(new)
            asked.intersection_update(volume.replicas)  # one that was lost may come back
            if self._space.closed:
                return

    async def _ask_over_other_paths(self, search: _Search) -> None:
        for device in self._space.volume.replicas:
            await self._read(search, device, search.missing, True)

    def _leave_out_changed(self, search: _Search) -> None:
        search.pages = [page for page in search.pages if self.still_stored(page, search.expected[page])]
        for pages in search.wrong.values():
            pages.intersection_update(search.pages)
        for page in search.found.keys() - set(search.pages):
            del search.found[page]

    def _look_in_memory(self, search: _Search) -> None:
        """Take what no replica has from memory: a clean page is protected there, so it does not change.

        One that is out may be in the RAM tier.
        """
        space = self._space
        for page in search.missing:
            if kept := space.tier.look(page, search.expected[page]):
                search.found[page] = kept
            if space.table.state[page] == CLEAN:
                content = bytearray(PAGE_BYTES)
                space.memory.read_out(page, memoryview(content))
                if page_checksum(memoryview(content)) == search.expected[page]:
                    search.found[page] = bytes(content)

    async def _read(self, search: _Search, device: str, pages: list[int], other_path: bool) -> None:
        """Compare what one replica holds of the pages; ends early for one that is no longer in sync."""
        for first, count in runs_of(pages):
            content = await self.read_replica(device, first, count, other_path=other_path)
            if content is None:
                continue
            for index, checksum in enumerate(page_checksums(memoryview(content))):
                page = first + index
                if checksum == search.expected[page]:
                    search.found.setdefault(page, content[index * PAGE_BYTES : (index + 1) * PAGE_BYTES])
                    if other_path:  # the path was at fault, not the device
                        search.wrong.get(device, set()).discard(page)
                else:
                    search.wrong.setdefault(device, set()).add(page)

    async def read_replica(
        self, device: str, first: int, count: int, *, other_path: bool = False
    ) -> bytes | None:
        """Read what one replica holds of a run; None when it is not in sync, or has no other path."""
        answer: asyncio.Future[bytes | None] = asyncio.get_running_loop().create_future()

        def done(error: int, payload: memoryview | None) -> None:
            if not answer.done():
                answer.set_result(None if error or payload is None else bytes(payload))

        volume = self._space.volume
        volume.read_replica(device, first * PAGE_BYTES, count * PAGE_BYTES, done, other_path=other_path)
        volume.push()
        return await answer

    async def _repair(self, search: _Search) -> dict[str, int]:
        """Write what was found to the replicas that have something else; returns the pages by device."""
        repaired: dict[str, int] = {}
        for device, wrong in search.wrong.items():
            for page in sorted(wrong & search.found.keys()):
                if await self._rewrite(device, page, search.found[page], search.expected[page]):
                    repaired[device] = repaired.get(device, 0) + 1
        return repaired

    async def _rewrite(self, device: str, page: int, content: bytes, checksum: int) -> bool:
        space = self._space
        # The client may have written to the page meanwhile, and may be writing it out: that is its repair.
        if space.closed or not self.still_stored(page, checksum):
            return False
        if space.unwritable_page is not None:
            return False  # the mark is taken by a repair of a killed pager; what is wrong is found again
        answer: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def done(error: int) -> None:
            if not answer.done():
                answer.set_result(error)

        # First: should this pager be killed, the next one must know that the repair may yet arrive.
        space.repair_mark[0] = page + 1
        space.volume.rewrite_replica(device, page * PAGE_BYTES, memoryview(content), done)
        space.volume.push()
        error = await answer
        space.repair_mark[0] = 0
        return error == 0

    def is_stored(self, page: int) -> bool:
        """Tell whether the volume is to hold the page's content, and nothing is changing that."""
        return self._space.table.state[page] in STORED

    def still_stored(self, page: int, checksum: int) -> bool:
        """Tell whether it is to hold content with this checksum."""
        return self.is_stored(page) and int(self._space.table.checksums[page]) == checksum

    def _tell(self, search: _Search, repaired: dict[str, int]) -> None:
        space = self._space
        names = {replica.device: replica.name for replica in space.volume.replica_status()}
        at_fault = [device for device, wrong in search.wrong.items() if wrong]
        for device in at_fault:
            count = len(search.wrong[device])
            space.counters.found_wrong(names.get(device, device), count, repaired.get(device, 0))
        devices = ", ".join(sorted(names.get(device, device) for device in at_fault))
        if right := [page for page in search.pages if page in search.found]:
            what = f"not what was paged out, on {devices}; repaired from what is right elsewhere"
            if not at_fault:
                what = "came with other content than was paged out, but right when read again"
            space.alarm("checksum", f"{_named(right)}: {what}")
        if lost := search.missing:
            space.alarm(
                "checksum",
                f"{_named(lost)}: not what was paged out, on {devices or 'any replica'}, and nowhere",
            )


def _named(pages: Sequence[int]) -> str:
    if len(pages) == 1:
        return f"page {pages[0]}"
    more = f" and {len(pages) - NAMED_PAGES} more" if len(pages) > NAMED_PAGES else ""
    return f"pages {', '.join(map(str, pages[:NAMED_PAGES]))}{more}"
