"""Accesses that are not answered at once, or whose page is not what the kernel said it was by then."""

from __future__ import annotations

import asyncio

from farpage.pager.states import READING
from farpage.pager.table import PAGE_BYTES
from tests.support.paging import ModelClient, content_of

PAGE = 3


async def test_a_page_that_a_balloon_takes_while_it_is_mapped_is_zeros_at_the_next_try() -> None:
    client = ModelClient(256, 128)
    client.write(PAGE, 7)
    assert client.read(PAGE) == content_of(PAGE, 7)
    client.memory.unmap(PAGE)

    def balloon(name: str, first: int, _count: int) -> None:
        if name == "map_in":
            client.memory.remove(first)

    client.memory.before = balloon
    assert client.read(PAGE) == bytes(PAGE_BYTES)
    client.close()


async def test_accesses_that_wait_for_room_go_on_when_pages_have_come_in_at_the_second_try() -> None:
    client = ModelClient(1024, 1023)
    await client.fill(1024)
    await client.page_out(256)
    client.volume.hold = True
    waiting = [page for page in range(0, 300, 2) if client.read(page) is None]
    assert client.table.counts[READING] == client.space.limit.reading < len(waiting)
    client.memory.busy.add("copy_in")
    client.volume.hold = False
    client.volume.release_all()
    await client.settle()
    client.memory.busy.clear()
    async with asyncio.timeout(60):
        while client.states(waiting[-1]) != ["clean"]:
            await asyncio.sleep(0.001)
    assert client.read(waiting[-1]) == content_of(waiting[-1])
    client.close()
