"""Accesses whose page is not what the kernel said it was by the time they are answered."""

from __future__ import annotations

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
