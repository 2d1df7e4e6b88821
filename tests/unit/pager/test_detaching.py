"""A detachment whose volume another owner takes meanwhile."""

from __future__ import annotations

import asyncio

import pytest

from farpage.pager.buffers import BufferPool
from farpage.pager.client import PagedClient, VolumeFenced
from farpage.pager.table import ON_DEVICE, PAGE_BYTES, PageTable
from tests.support.paging import ModelMemory, ModelVolume, content_of


async def test_it_ends_and_the_client_stays_paged() -> None:
    memory, volume = ModelMemory(), ModelVolume(64 * PAGE_BYTES)
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
    table = paged.space.table
    async with asyncio.timeout(10):
        while not table.counts[ON_DEVICE]:
            await asyncio.sleep(0)
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
