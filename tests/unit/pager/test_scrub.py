from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from farpage.pager.limit import Limit
from farpage.pager.scrub import Scrub
from farpage.pager.states import CLEAN, ON_DEVICE
from farpage.pager.table import PAGE_BYTES
from tests.support.paging import ModelClient, content_of
from tests.support.simulated_loop import run_simulated

PAGES = 256
LIMIT = 100
PAGE = 3
"""One of those that are paged out."""
FAST = 1 << 40


def scrubbing(test: Callable[[ModelClient], Awaitable[None]], devices: int = 2) -> None:
    """Run a test on a client with pages of all kinds, in simulated time."""

    async def main() -> None:
        client = ModelClient(PAGES, LIMIT, tuple(f"disk{n}" for n in range(1, devices + 1)))
        await client.fill(LIMIT)
        await test(client)
        client.close()

    run_simulated(main)


async def to_its_end(client: ModelClient, rate_bytes: int = FAST) -> Scrub:
    scrub = Scrub(client.space, client.faults, rate_bytes)
    while scrub.running:
        await asyncio.sleep(0.001)
    assert scrub.progress.state == "finished"
    assert scrub.progress.pages_done == scrub.progress.pages_total == PAGES
    return scrub


def on(client: ModelClient, device: str, page: int) -> bytes:
    return bytes(client.volume.on[device][page * PAGE_BYTES : (page + 1) * PAGE_BYTES])


def test_every_stored_page_of_every_replica_is_compared() -> None:
    async def test(client: ModelClient) -> None:
        stored = client.table.counts[ON_DEVICE]
        scrub = await to_its_end(client)
        assert stored > LIMIT // 2
        assert scrub.progress.compared_pages == 2 * stored
        assert (scrub.progress.wrong_pages, scrub.progress.lost_pages) == (0, 0)
        assert client.space.counters.scrubbed_pages == 2 * stored
        assert client.alarms == []

    scrubbing(test)


def test_a_bad_replica_is_repaired_from_a_good_one() -> None:
    async def test(client: ModelClient) -> None:
        client.volume.spoil(PAGE, "disk2")
        client.volume.spoil(PAGE + 1, "disk1")
        scrub = await to_its_end(client)
        progress = scrub.progress
        assert (progress.wrong_pages, progress.repaired_pages, progress.lost_pages) == (2, 2, 0)
        assert on(client, "disk2", PAGE) == content_of(PAGE)
        assert on(client, "disk1", PAGE + 1) == content_of(PAGE + 1)
        assert client.states(PAGE, PAGE + 1) == ["on_device", "on_device"]
        again = await to_its_end(client)
        assert again.progress.wrong_pages == 0

    scrubbing(test)


def test_a_page_that_is_clean_in_memory_is_repaired_from_there() -> None:
    async def test(client: ModelClient) -> None:
        client.read(PAGE)
        await client.settle()
        assert client.table.state[PAGE] == CLEAN
        client.volume.spoil(PAGE)
        scrub = await to_its_end(client)
        assert (scrub.progress.repaired_pages, scrub.progress.lost_pages) == (1, 0)
        assert on(client, "disk1", PAGE) == content_of(PAGE)

    scrubbing(test, devices=1)


def test_a_page_that_is_right_nowhere_is_told_of_and_stays_where_it_is() -> None:
    async def test(client: ModelClient) -> None:
        client.volume.spoil(PAGE, "disk1")
        client.volume.spoil(PAGE, "disk2")
        scrub = await to_its_end(client)
        assert (scrub.progress.wrong_pages, scrub.progress.lost_pages) == (2, 1)
        assert client.states(PAGE) == ["on_device"]
        assert client.memory.poisoned == set()
        assert [kind for kind, _ in client.alarms] == ["checksum"]

    scrubbing(test)


async def held(client: ModelClient, count: int) -> None:
    """Wait until the volume holds commands back."""
    while len(client.volume.held) < count:
        await asyncio.sleep(0.001)


def test_a_page_that_is_paged_out_anew_while_it_is_compared_is_not_repaired_with_old_content() -> None:
    async def test(client: ModelClient) -> None:
        client.volume.hold = True
        scrub = Scrub(client.space, client.faults, FAST)
        await held(client, 2)
        reads = [client.volume.held.pop(0) for _ in range(2)]
        # While the old content is on its way to the scrub, the page comes in, is written to and leaves again.
        client.volume.hold = False
        client.read(PAGE)
        await client.settle()
        assert client.write(PAGE, 2) == content_of(PAGE, 2)
        old = {device: on(client, device, PAGE) for device in client.volume.on}
        client.space.limit = Limit(64)
        await client.evict()
        assert client.states(PAGE) == ["on_device"]
        new = {device: bytes(content) for device, content in client.volume.on.items()}
        for device, content in old.items():  # what the reads found
            client.volume.on[device][PAGE * PAGE_BYTES : (PAGE + 1) * PAGE_BYTES] = content
        for read in reads:
            read()
        for device, content in new.items():
            client.volume.on[device][:] = content
        while scrub.running:
            await asyncio.sleep(0.001)
        assert client.volume.rewritten == []
        assert (scrub.progress.wrong_pages, client.alarms) == (0, [])
        assert on(client, "disk1", PAGE) == content_of(PAGE, 2)

    scrubbing(test)


def test_a_page_written_to_while_its_repair_is_prepared_is_left_alone() -> None:
    async def test(client: ModelClient) -> None:
        client.read(PAGE)
        await client.settle()
        client.volume.spoil(PAGE, "disk1")
        client.volume.hold = True
        scrub = Scrub(client.space, client.faults, FAST)
        await held(client, 2)
        client.volume.release()
        client.volume.release()
        await held(client, 1)  # the search has begun
        assert client.write(PAGE, 2) == content_of(PAGE, 2)
        client.volume.hold = False
        client.volume.release_all()
        while scrub.running:
            await asyncio.sleep(0.001)
        assert client.volume.rewritten == []
        assert client.states(PAGE) == ["dirty"]
        assert client.alarms == []

    scrubbing(test)


def test_it_keeps_to_its_rate() -> None:
    async def test(client: ModelClient) -> None:
        loop = asyncio.get_running_loop()
        began = loop.time()
        stored = client.table.counts[ON_DEVICE]
        scrub = await to_its_end(client, rate_bytes=16 * PAGE_BYTES)
        # The last window's pause is not waited for.
        assert loop.time() - began > (stored - 64) / 16 - 0.1
        assert scrub.progress.ended_seconds is not None

    scrubbing(test)


def test_it_gives_way_to_accesses_that_wait() -> None:
    async def test(client: ModelClient) -> None:
        client.volume.hold = True
        client.read(PAGE)
        scrub = Scrub(client.space, client.faults, FAST)
        await asyncio.sleep(0.1)
        assert len(client.volume.held) == 1, "the access alone"
        client.volume.hold = False
        client.volume.release_all()
        while scrub.running:
            await asyncio.sleep(0.001)
        assert scrub.progress.state == "finished"

    scrubbing(test)


def test_it_can_be_stopped() -> None:
    async def test(client: ModelClient) -> None:
        scrub = Scrub(client.space, client.faults, rate_bytes=PAGE_BYTES)
        await asyncio.sleep(1)
        scrub.stop()
        assert scrub.progress.state == "stopped"
        compared = scrub.progress.compared_pages
        await asyncio.sleep(1000)
        assert scrub.progress.compared_pages == compared
        assert scrub.progress.pages_done < PAGES

    scrubbing(test)


def test_it_ends_with_its_client() -> None:
    async def test(client: ModelClient) -> None:
        client.volume.hold = True
        scrub = Scrub(client.space, client.faults, FAST)
        await held(client, 2)
        client.space.closed = True
        client.volume.release_all()
        await client.settle()
        assert scrub.progress.state == "stopped"

    scrubbing(test)


def test_a_replica_that_goes_out_of_sync_meanwhile_is_left_out() -> None:
    async def test(client: ModelClient) -> None:
        client.volume.spoil(PAGE, "disk2")
        client.volume.hold = True
        scrub = Scrub(client.space, client.faults, FAST)
        await held(client, 2)
        client.volume.stale.add("disk2")
        client.volume.hold = False
        client.volume.release_all()
        while scrub.running:
            await asyncio.sleep(0.001)
        assert (scrub.progress.wrong_pages, client.volume.rewritten) == (0, [])

    scrubbing(test)
