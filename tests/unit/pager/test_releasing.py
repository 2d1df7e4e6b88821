"""A client that is frozen and paged out whole, and one that begins with such a table."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import pytest

from farpage.pager.buffers import BufferPool
from farpage.pager.client import PagedClient
from farpage.pager.memory import ClientGone
from farpage.pager.releasing import NotPagedOut
from farpage.pager.states import DIRTY, ON_DEVICE, POISONED, READING, ZERO
from farpage.pager.table import PAGE_BYTES, PageTable
from tests.support.paging import ModelMemory, ModelVolume, content_of

PAGES = 64


class Client:
    """A client whose pages all hold something, but the last, which is zeros."""

    def __init__(self, limit_pages: int = PAGES) -> None:
        self.memory, self.volume = ModelMemory(), ModelVolume(PAGES * PAGE_BYTES)
        for page in range(PAGES - 1):
            self.memory.content[page] = content_of(page)
            self.memory.mapped.add(page)
        self.memory.content[PAGES - 1] = bytes(PAGE_BYTES)
        self.paged = PagedClient(
            self.memory,
            PageTable(PAGES),
            self.volume,
            limit_pages,
            BufferPool(preallocated=1),
            alarm=lambda kind, message: None,
            on_gone=self._gone,
        )

    def _gone(self) -> None:
        self.paged.abandon()

    @property
    def counts(self) -> list[int]:
        return self.paged.space.table.counts.tolist()

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0)


@contextmanager
def started(limit_pages: int = PAGES) -> Iterator[Client]:
    client = Client(limit_pages)
    client.paged.start()
    yield client
    client.paged.abandon()
    client.memory.close()


async def test_everything_is_paged_out_whatever_the_limit() -> None:
    with started() as client:
        await client.paged.page_out("vm")
        assert (client.counts[ON_DEVICE], client.counts[ZERO]) == (PAGES - 1, 1)
        assert client.memory.content == {}
        for page in range(PAGES - 1):
            assert client.volume.content[page * PAGE_BYTES :][:PAGE_BYTES] == content_of(page)


async def test_no_access_is_answered_from_the_beginning_of_that_on() -> None:
    with started() as client:
        client.volume.hold = True
        releasing = asyncio.get_running_loop().create_task(client.paged.page_out("vm"))
        await client.until(lambda: bool(client.volume.held))
        # On its way out: a write would be let through, and the page stay, if the client were not frozen.
        assert client.memory.touch(3, content_of(3, version=2)) is None
        client.volume.hold = False
        client.volume.release_all()
        await releasing
        assert client.counts[ON_DEVICE] == PAGES - 1
        assert client.memory.touch(5) is None
        await asyncio.sleep(0.01)
        assert client.counts[ON_DEVICE] == PAGES - 1
        # Thawed, it goes on: what waited asks again.
        client.paged.freeze.end()
        client.memory.touch(5)
        client.paged.faults.on_events()
        await client.until(lambda: client.memory.touch(5) == content_of(5))


async def test_what_is_on_its_way_in_is_waited_for_and_paged_out_again() -> None:
    with started(limit_pages=16) as client:
        await client.until(lambda: client.counts[ON_DEVICE] > 0)
        page = int(client.paged.space.table.where(ON_DEVICE)[0])
        client.volume.hold = True
        assert client.memory.touch(page) is None
        client.paged.faults.on_events()
        assert client.counts[READING] > 0
        releasing = asyncio.get_running_loop().create_task(client.paged.page_out("vm"))
        await asyncio.sleep(0.01)
        assert not releasing.done()
        client.volume.hold = False
        client.volume.release_all()
        await releasing
        assert (client.counts[ON_DEVICE], client.counts[ZERO]) == (PAGES - 1, 1)


@pytest.mark.parametrize("problem", ["full", "fenced"])
async def test_one_that_cannot_be_paged_out_goes_on_as_before(problem: str) -> None:
    with started() as client:
        client.volume.hold = True
        releasing = asyncio.get_running_loop().create_task(client.paged.page_out("vm"))
        await client.until(lambda: bool(client.volume.held))
        if problem == "full":
            client.volume.on_full(True)
        else:
            client.volume.ownership.fence("another owner has it")
        with pytest.raises(NotPagedOut, match="no room" if problem == "full" else "another owner has it"):
            await releasing
        assert not client.paged.freeze.frozen
        client.volume.hold = False
        client.volume.release_all()

        def written() -> bool:
            if client.memory.touch(0, content_of(0, version=2)) is not None:
                return True
            client.paged.faults.on_events()
            return False

        await client.until(written)


async def test_one_whose_process_ends_meanwhile_is_gone() -> None:
    with started() as client:
        client.volume.hold = True
        releasing = asyncio.get_running_loop().create_task(client.paged.page_out("vm"))
        await client.until(lambda: bool(client.volume.held))
        client.paged.abandon()
        with pytest.raises(ClientGone):
            await releasing


async def test_one_that_begins_with_a_table_has_nothing_of_what_its_memory_held() -> None:
    client = Client()
    table = client.paged.space.table
    states = np.full(PAGES, ON_DEVICE, np.uint8)
    states[1], states[2] = ZERO, POISONED
    table.restate(states)
    client.paged.start_handed_over()
    assert client.memory.content == {}
    for page, found in ((1, bytes(PAGE_BYTES)), (2, None)):
        client.memory.touch(page)
        client.paged.faults.on_events()
        if found is None:
            assert page in client.memory.poisoned
        else:
            assert client.memory.touch(page) == found
    client.paged.abandon()
    client.memory.close()


async def test_one_that_is_recovered_while_it_is_frozen_stays_so() -> None:
    client = Client()
    client.paged.freeze.begin()
    client.paged.space.table.restate(np.full(PAGES, DIRTY, np.uint8))
    client.paged.recover()
    assert client.paged.freeze.frozen
    await client.paged.page_out("vm")
    assert (client.counts[ON_DEVICE], client.counts[ZERO]) == (PAGES - 1, 1)
    client.paged.abandon()
    client.memory.close()


async def test_one_that_is_thawed_meanwhile_is_not_taken_for_paged_out() -> None:
    with started() as client:
        client.volume.hold = True
        releasing = asyncio.get_running_loop().create_task(client.paged.page_out("vm"))
        await client.until(lambda: bool(client.volume.held))
        client.paged.freeze.end()
        client.volume.hold = False
        client.volume.release_all()
        with pytest.raises(NotPagedOut, match="let go on meanwhile"):
            await releasing
        assert not client.paged.freeze.frozen
