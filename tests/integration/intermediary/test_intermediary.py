"""A whole move on real processes: two VIOS, an intermediate client, the test as the client's hypervisor."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from typing import Final

import pytest
import pytest_asyncio

from farpage.definition import moving
from farpage.definition.model import Definition
from farpage.errors import ExitStatus
from farpage.pager.limit import IN_FLIGHT_MAX
from tests.support.commands import read_bytes, write_bytes
from tests.support.moving import PAGE, Moved, TwoVios, allocated_bytes, two_vios
from tests.support.scrape import Scrape
from tests.support.tools import need, run

PAGES: Final = 2048
SLOW_BYTES: Final = 1 << 20


def _data(pages: int, percent: int) -> list[bool]:
    """Runs of data and holes."""
    chance = random.Random(percent)
    data: list[bool] = []
    while len(data) < pages:
        data += [chance.randrange(100) < percent] * chance.randrange(1, 40)
    return data[:pages]


pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def vioses() -> AsyncIterator[TwoVios]:
    """Both VIOS, for all tests of this file."""
    async with two_vios() as vioses:
        yield vioses


@pytest_asyncio.fixture(loop_scope="module")
async def moved(vioses: TwoVios) -> AsyncIterator[Moved]:
    """A move that is begun: half of the volume is data."""
    moved = Moved(vioses, PAGES)
    try:
        await moved.begin(_data(PAGES, 50))
        yield moved
    finally:
        moved.close()


def _same(moved: Moved, content: bytes | bytearray) -> None:
    assert moved.target_file.read_bytes() == content


async def test_a_move_from_its_beginning_to_its_end(moved: Moved) -> None:
    content = moved.source_file.read_bytes()
    intermediary = moved.intermediary()
    await moved.finish()
    need("qemu-img")
    files = [str(moved.source_file), str(moved.target_file)]
    await run("qemu-img", "compare", "-f", "raw", "-F", "raw", *files)
    need("nbdcopy")
    copied = moved.vioses.folder / "copied"
    await run("nbdcopy", f"nbd+unix:///{moved.client}?socket={moved.first.data.path}", str(copied))
    assert copied.read_bytes() == content
    await moved.forget()
    assert await intermediary.end() == ExitStatus.OK
    _same(moved, content)
    assert not moved.source_file.exists()
    first, second = [await moved.vioses.definition(vios) for vios in (moved.first, moved.second)]
    assert first == second
    assert moved.client not in first.moves
    assert "copied" in intermediary.events()


async def test_holes_are_neither_read_nor_written(moved: Moved) -> None:
    data = sum(_data(PAGES, 50)) * PAGE
    intermediary = moved.intermediary()
    await intermediary.until("copied")
    while not (status := await intermediary.status()).present_bytes:
        await asyncio.sleep(0.05)
    status = await intermediary.status()
    assert (status.read_bytes, status.written_bytes) == (data, data)
    assert status.zeroed_bytes == PAGES * PAGE - data
    assert (status.complete, status.present_bytes, status.total_bytes) == (True, PAGES * PAGE, PAGES * PAGE)
    at_second = await Scrape.of(moved.second.control)
    assert at_second.value("farpage_volume_read_bytes_total", volume=moved.client) == data
    assert allocated_bytes(moved.target_file) <= data + (64 << 10)
    metrics = await Scrape.of(intermediary.control)
    assert metrics.value("farpage_intermediary_written_bytes_total", client=moved.client) == data
    assert metrics.value("farpage_intermediary_problem", client=moved.client) == 0


async def test_the_client_reads_absent_pages_and_its_writes_go_before_copies(moved: Moved) -> None:
    content = bytearray(moved.source_file.read_bytes())
    await moved.adjust(SLOW_BYTES)
    intermediary = moved.intermediary()
    owner = await moved.open()
    chance = random.Random(3)
    for _ in range(200):
        page = chance.randrange(PAGES)
        at = slice(page * PAGE, (page + 1) * PAGE)
        if chance.random() < 0.5:
            content[at] = chance.randbytes(PAGE)
            assert await write_bytes(owner, page * PAGE, bytes(content[at])) == 0
        else:
            assert await read_bytes(owner, page * PAGE, PAGE) == content[at]
    status = await intermediary.status()
    assert status.relayed_writes > 0
    assert status.relayed_reads > 0
    assert status.relayed_connections == 1
    await moved.adjust(None)
    await moved.until(lambda copy: copy.present_pages == PAGES)
    await owner.close()
    _same(moved, bytes(content))
    assert moved.source_file.read_bytes() == content


@pytest.mark.parametrize("victim", ["intermediary", "first", "second"])
async def test_whoever_is_killed_in_the_middle_the_move_goes_on(moved: Moved, victim: str) -> None:
    content = moved.source_file.read_bytes()
    await moved.adjust(SLOW_BYTES)
    intermediary = moved.intermediary()
    await moved.until(lambda copy: copy.present_pages > PAGES // 8)
    if victim == "intermediary":
        intermediary.kill()
        intermediary = moved.intermediary()
    else:
        vios = moved.first if victim == "first" else moved.second
        vios.kill()
        vios.start()
    await moved.adjust(None)
    await moved.finish()
    await moved.forget()
    assert await intermediary.end() == ExitStatus.OK
    _same(moved, content)


async def test_commands_of_the_client_wait_for_the_next_intermediate_client(moved: Moved) -> None:
    content = moved.source_file.read_bytes()
    await moved.adjust(None, paused=True)
    first = moved.intermediary()
    owner = await moved.open()
    page = _data(PAGES, 50).index(True)
    assert await read_bytes(owner, page * PAGE, PAGE) == content[page * PAGE : (page + 1) * PAGE]
    first.kill()
    last = PAGES - 1 - _data(PAGES, 50)[::-1].index(True)
    reading = asyncio.ensure_future(read_bytes(owner, last * PAGE, PAGE))
    await moved.until(lambda copy: copy.waiting_commands == 1)
    assert await read_bytes(owner, page * PAGE, PAGE) == content[page * PAGE : (page + 1) * PAGE]
    # As many page-outs as a pager sends do not keep what is present from being read.
    writing = [asyncio.ensure_future(write_bytes(owner, 0, content[:PAGE])) for _ in range(IN_FLIGHT_MAX)]
    await moved.until(lambda copy: copy.waiting_commands > 1)
    assert await read_bytes(owner, page * PAGE, PAGE) == content[page * PAGE : (page + 1) * PAGE]
    moved.intermediary()
    assert await reading == content[last * PAGE : (last + 1) * PAGE]
    assert set(await asyncio.gather(*writing)) == {0}
    await owner.close()


async def test_it_ends_between_two_commands_of_a_client_that_writes(moved: Moved) -> None:
    content = bytearray(moved.source_file.read_bytes())
    intermediary = moved.intermediary()
    owner = await moved.open()
    chance, over, written = random.Random(5), asyncio.Event(), 0

    async def write(pages: range) -> None:
        nonlocal written
        while not over.is_set():
            page, new = chance.choice(pages), chance.randbytes(PAGE)
            assert await write_bytes(owner, page * PAGE, new) == 0
            content[page * PAGE : (page + 1) * PAGE] = new
            written += 1

    writing = [asyncio.ensure_future(write(range(first, PAGES, 8))) for first in range(8)]
    await moved.finish()
    before = written
    while written < before + 100:
        await asyncio.sleep(0.01)
    over.set()
    await asyncio.gather(*writing)
    await moved.forget()
    assert await intermediary.end() == ExitStatus.OK
    await owner.close()
    _same(moved, content)


async def test_paused_it_relays_and_copies_nothing_until_it_may(moved: Moved) -> None:
    await moved.adjust(None, paused=True)
    intermediary = moved.intermediary()
    await intermediary.until("orders")
    assert (await intermediary.status()).state == "paused"
    await moved.until(lambda copy: copy.intermediary is not None)
    assert (await moved.copy_status()).filled_pages == 0
    await moved.adjust(None)
    await moved.until(lambda copy: copy.present_pages == PAGES)


async def test_a_cancelled_move_ends_it_and_leaves_the_source(moved: Moved) -> None:
    content = moved.source_file.read_bytes()
    await moved.adjust(SLOW_BYTES)
    intermediary = moved.intermediary()
    await moved.until(lambda copy: copy.present_pages > 0)

    def cancel(definition: Definition) -> Definition:
        return moving.cancel(definition, moved.client, moved.claim)

    await moved.change(cancel)
    assert await intermediary.end() == ExitStatus.OK
    assert moved.source_file.read_bytes() == content
    assert await moved.vioses.definition(moved.second) == await moved.vioses.definition(moved.first)
