"""Page-out: how much is done at a time, and in which order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from farpage.pager.eviction import SLICE_RUNS
from farpage.pager.limit import Limit
from farpage.pager.states import READING
from tests.support.paging import ModelClient, content_of
from tests.support.simulated_loop import run_simulated

PAGES = 4096


@pytest.fixture
async def client() -> AsyncIterator[ModelClient]:
    """Every other page of 1024 is in memory, all of them dirty and below the limit."""
    client = ModelClient(PAGES, 1024)
    client.volume.hold = True
    for page in range(1022, -1, -2):  # falling, so that none is filled ahead of it
        client.write(page)
    yield client
    client.volume.release_all()
    client.close()


async def test_faults_are_looked_at_after_few_scattered_pages(client: ModelClient) -> None:
    released: list[int] = []
    client.memory.before = lambda name, first, count: released.append(first) if name == "protect" else None
    client.space.limit = Limit(256)
    client.eviction.wake()
    await asyncio.sleep(0)
    assert len(released) == SLICE_RUNS
    assert released == sorted(released)


async def test_pages_that_were_chosen_go_back_into_line_when_paging_out_stops(client: ModelClient) -> None:
    client.space.limit = Limit(256)
    client.eviction.wake()
    await asyncio.sleep(0)
    client.eviction.stop()
    await client.settle()
    client.volume.hold = False
    client.volume.release_all()
    client.eviction.resume()
    for _ in range(10):
        await client.settle()
    assert client.table.resident <= client.space.limit.high
    assert len(client.space.replacement) == client.table.resident


def fails_once(client: ModelClient, step: str, page: int) -> list[str]:
    """Have something that is done to the client's memory fail; returns what turns of the loop ended with."""
    problems: list[str] = []
    asyncio.get_running_loop().set_exception_handler(
        lambda _loop, context: problems.append(str(context["exception"]))
    )

    def before(name: str, first: int, _count: int) -> None:
        if (name, first) == (step, page) and not problems:
            raise OSError(f"{step} failed")

    client.memory.before = before
    return problems


async def test_victims_whose_content_cannot_be_read_go_back_into_the_order(client: ModelClient) -> None:
    problems = fails_once(client, "read_out", 906)  # in the midst of a slice
    sent: list[int] = []
    client.volume.push = lambda: sent.append(len(client.volume.held))  # type: ignore[method-assign]
    client.space.limit = Limit(256)
    client.eviction.wake()
    await asyncio.sleep(0)
    assert problems == ["read_out failed"]
    assert sent == [5]
    assert client.states(*range(896, 928, 2)) == ["writing"] * 5 + ["dirty"] * 11
    client.eviction.stop()
    assert len(client.space.replacement) == 512 - 5
    client.volume.hold = False
    client.volume.release_all()
    client.eviction.resume()
    client.eviction.drain(on=True)
    for _ in range(10):
        await client.settle()
    assert client.table.resident == 0


@pytest.mark.parametrize("full", [False, True])
async def test_clean_victims_that_cannot_be_given_back_go_back_into_the_order(full: bool) -> None:
    client = ModelClient(PAGES, 1024)
    await client.fill(256)
    await client.page_out(1024)
    for page in range(0, 256, 2):
        client.read(page)
    await client.settle()
    client.write(0)
    problems = fails_once(client, "release", 10)
    client.space.full = full
    client.eviction.drain(on=True)
    await asyncio.sleep(0)
    assert problems == ["release failed"]
    client.eviction.stop()
    assert client.states(0, 8, 10, 12) == ["dirty", "on_device", "clean", "clean"]
    assert len(client.space.replacement) == client.table.resident > 0
    client.close()


async def test_a_fault_that_is_answered_at_the_second_try_makes_pages_leave_too() -> None:
    client = ModelClient(PAGES, 256)
    client.faults.on_pressure = client.eviction.wake
    limit = client.space.limit
    for page in range(2 * limit.high - 2, -1, -2):  # falling, so that none is filled ahead of it
        client.write(page)
    await client.settle()
    assert client.table.resident == limit.high
    client.memory.busy.add("zero_in")
    client.write(PAGES - 1)
    client.memory.busy.clear()
    async with asyncio.timeout(60):
        while client.table.resident > limit.low:
            await asyncio.sleep(0.001)
    assert client.states(PAGES - 1) == ["dirty"]
    client.close()


@pytest.mark.parametrize(("pause_seconds", "left_free"), [(0.1, 2 * 32), (0.0001, 2 * 128)])
def test_a_client_is_kept_below_its_limit_by_what_it_takes_in_a_while(
    pause_seconds: float, left_free: int
) -> None:
    async def main() -> None:
        client = ModelClient(1 << 14, 2048)
        client.faults.on_pressure = client.eviction.wake
        for page in range(PAGES):
            client.write(page * 3)  # apart, so that none is filled ahead of it
            await asyncio.sleep(pause_seconds)
        assert client.space.limit.pages - client.space.limit.low == left_free
        assert client.table.resident <= client.space.limit.high + 1
        client.close()

    run_simulated(main)


async def test_however_many_accesses_wait_half_of_the_limit_is_for_pages_that_have_come() -> None:
    client = ModelClient(1024, 1023)
    client.faults.on_pressure = client.eviction.wake
    await client.fill(1024)
    await client.page_out(256)
    client.volume.hold = True
    waiting = [page for page in range(0, 1024, 2) if client.read(page) is None]
    await client.settle()
    assert len(waiting) > 256
    assert client.table.counts[READING] == 128
    client.volume.hold = False
    client.volume.release_all()
    await client.settle()
    assert client.read(waiting[-1]) == content_of(waiting[-1])
    client.close()
