"""A detachment that something comes in the way of."""

from __future__ import annotations

import asyncio
from unittest.mock import create_autospec

import pytest

from farpage.pager.buffers import BufferPool
from farpage.pager.client import PagedClient, VolumeFenced
from farpage.pager.lane import ShortWay
from farpage.pager.memory import CannotPoison
from farpage.pager.states import ON_DEVICE, POISONED
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


class OldKernelsMemory(ModelMemory):
    """Memory of a client on a kernel that has no UFFDIO_POISON."""

    def poison(self, page: int) -> int:
        raise CannotPoison


async def test_a_client_with_lost_pages_stays_paged_where_accesses_to_them_cannot_fail() -> None:
    memory, volume = OldKernelsMemory(), ModelVolume(64 * PAGE_BYTES)
    paged = await paged_out(memory, volume)
    alarms: dict[str, str] = {}
    paged.space.alarm = alarms.__setitem__
    lost = int(paged.space.table.where(ON_DEVICE)[0])
    volume.spoil(lost)
    with pytest.raises(CannotPoison):
        await paged.detach()
    assert (paged.space.closed, paged.faults.stopped) == (False, False)
    assert paged.space.table.state[lost] == POISONED
    assert "wait for good, as this kernel cannot make them fail" in alarms["poisoned"]
    paged.abandon()
    memory.close()


async def test_what_the_short_way_reads_is_asked_for_again_when_it_ends_or_the_client_is_frozen() -> None:
    memory, volume = ModelMemory(), ModelVolume(64 * PAGE_BYTES)
    paged = await paged_out(memory, volume)
    short = create_autospec(
        ShortWay, instance=True, in_flight=0, leaving=0, is_ready=False, wants_buffer=False
    )
    paged.space.short = short
    paged.freeze.begin()
    short.ask_all.assert_called_once_with()
    paged.freeze.end()
    await paged.detach()
    assert short.ask_all.call_count == 2
    memory.close()
