"""A detachment that something comes in the way of."""

from __future__ import annotations

import asyncio

import pytest

from farpage.pager.buffers import BufferPool
from farpage.pager.client import PagedClient, VolumeFenced
from farpage.pager.states import ON_DEVICE
from farpage.pager.table import PAGE_BYTES, PageTable
from tests.support.paging import ModelMemory, ModelVolume, content_of


async def paged_out(memory: ModelMemory, volume: ModelVolume) -> PagedClient:
    """Return a client of 64 pages, most of them on the volume."""
    for page in range(64):
        memory.content[page] = content_of(page)
    paged = PagedClient(
        memory,
        PageTable(64),
        volume,
        16,
        BufferPool(preallocated=1),
        alarm=lambda kind, message: None,
        on_gone=lambda: None,
    )
    paged.start()
    async with asyncio.timeout(10):
        while not paged.space.table.counts[ON_DEVICE]:
            await asyncio.sleep(0)
    return paged


async def test_it_ends_and_the_client_stays_paged_when_another_owner_takes_the_volume() -> None:
    memory, volume = ModelMemory(), ModelVolume(64 * PAGE_BYTES)
    paged = await paged_out(memory, volume)
    volume.hold = True
    detaching = asyncio.get_running_loop().create_task(paged.detach())
    async with asyncio.timeout(10):
        while not volume.held:
            await asyncio.sleep(0)
    assert not detaching.done()
    volume.ownership.fence("another owner has the volume")
    with pytest.raises(VolumeFenced, match="another owner has the volume"):
        await detaching
    assert not paged.space.closed
    assert not paged.faults.stopped
    paged.abandon()
    memory.close()


async def test_it_lets_go_only_when_accesses_to_a_lost_page_fail() -> None:
    memory, volume = ModelMemory(), ModelVolume(64 * PAGE_BYTES)
    paged = await paged_out(memory, volume)
    lost = int(paged.space.table.where(ON_DEVICE)[0])
    volume.spoil(lost)
    memory.busy.add("poison")
    attempts: list[int] = []
    memory.before = lambda name, first, count: attempts.append(first) if name == "poison" else None
    detaching = asyncio.get_running_loop().create_task(paged.detach())
    async with asyncio.timeout(10):
        while len(attempts) < 8:
            await asyncio.sleep(0)
    assert not detaching.done()
    memory.busy.clear()
    await detaching
    assert memory.poisoned == {lost}
    memory.close()
