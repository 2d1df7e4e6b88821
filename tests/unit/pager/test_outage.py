from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from farpage.pager.limit import Limit
from farpage.pager.outage import Outage
from farpage.pager.states import DIRTY
from tests.support.paging import ModelClient, content_of
from tests.support.simulated_loop import run_simulated

PAGES = 256
LIMIT = 100
PAGE = 3


class OutClient(ModelClient):
    """A client with outages."""

    def __init__(self, no_path_timeout_seconds: float | None = None) -> None:
        super().__init__(PAGES, LIMIT)
        self.told = 0
        self.outage = Outage(self.space, self.faults, self.eviction, no_path_timeout_seconds, self._tell)

    def _tell(self) -> None:
        self.told += 1

    @property
    def alarmed(self) -> list[str]:
        return [kind for kind, _ in self.alarms]


@pytest.fixture
async def client() -> AsyncIterator[OutClient]:
    model = OutClient()
    await model.fill(LIMIT)
    yield model
    model.close()


def simulated(timeout_seconds: float | None, test: Callable[[OutClient], Awaitable[None]]) -> None:
    async def main() -> None:
        model = OutClient(timeout_seconds)
        await model.fill(LIMIT)
        model.volume.hold = True
        await test(model)
        model.outage.cancel()
        model.close()

    run_simulated(main)


def test_accesses_wait_for_a_path_for_as_long_as_it_takes() -> None:
    async def test(client: OutClient) -> None:
        client.outage.no_path(True)
        client.read(PAGE)
        await asyncio.sleep(3600)
        assert client.outage.without_path_seconds == pytest.approx(3600)
        assert client.states(PAGE) == ["reading"]
        client.volume.release_all()
        client.outage.no_path(False)
        assert client.read(PAGE) == content_of(PAGE)
        assert client.alarmed == ["path_back"]
        assert client.told == 2

    simulated(None, test)


def test_an_access_that_has_waited_for_the_timeout_without_a_path_is_poisoned() -> None:
    async def test(client: OutClient) -> None:
        client.outage.no_path(True)
        await asyncio.sleep(1)
        client.read(PAGE)
        await asyncio.sleep(1)
        client.read(PAGE + 20)
        await asyncio.sleep(9.5)
        assert client.states(PAGE, PAGE + 20) == ["poisoned", "reading"]
        assert client.memory.poisoned == {PAGE}
        assert client.space.counters.poisoned_pages == 1
        assert client.alarmed == ["poisoned"]
        await asyncio.sleep(3)
        assert client.states(PAGE + 20) == ["poisoned"]

    simulated(10.0, test)


def test_an_access_that_waits_for_a_slow_answer_is_not_poisoned() -> None:
    async def test(client: OutClient) -> None:
        client.read(PAGE)
        await asyncio.sleep(100)
        assert client.states(PAGE) == ["reading"]
        client.outage.no_path(True)  # and only now no path is left
        await asyncio.sleep(9)
        assert client.states(PAGE) == ["reading"]
        client.outage.no_path(False)
        await asyncio.sleep(100)
        assert client.states(PAGE) == ["reading"]

    simulated(10.0, test)


def test_the_late_answer_to_a_page_that_was_given_up_changes_nothing() -> None:
    async def test(client: OutClient) -> None:
        client.read(1)
        client.volume.release_all()
        client.outage.no_path(True)
        client.read(2)  # brings its neighbour along, which nobody waits for
        assert client.states(2, 3) == ["reading", "reading"]
        await asyncio.sleep(12)
        assert client.states(2, 3) == ["poisoned", "reading"]
        client.outage.no_path(False)
        client.volume.release_all()
        assert client.states(2, 3) == ["poisoned", "clean"]
        assert client.read(3) == content_of(3)
        with pytest.raises(MemoryError):
            client.read(2)
        counts = client.table.counts
        assert sum(counts) == PAGES
        assert min(counts) >= 0

    simulated(10.0, test)


def test_the_late_answer_is_an_error_when_the_volume_was_closed_meanwhile() -> None:
    async def test(client: OutClient) -> None:
        client.outage.no_path(True)
        client.read(2)
        await asyncio.sleep(12)
        client.volume.errors["read"] = 108
        client.volume.release_all()
        assert client.states(2) == ["poisoned"]

    simulated(10.0, test)


def test_an_access_that_waits_for_room_is_poisoned_too() -> None:
    async def test(client: OutClient) -> None:
        client.space.limit = Limit(34)  # less than what is in memory
        client.outage.no_path(True)
        client.read(PAGE)
        client.read(PAGES - 1)  # a first touch
        assert client.faults.stalled >= 2  # each is tried again meanwhile
        assert client.states(PAGE, PAGES - 1) == ["on_device", "zero"]
        await asyncio.sleep(12)
        assert client.states(PAGE, PAGES - 1) == ["poisoned", "poisoned"]
        assert client.faults.stalled == 0

    simulated(10.0, test)


async def test_while_the_device_is_full_only_clean_pages_leave(client: OutClient) -> None:
    for page in range(8):
        client.read(page)
        await client.settle()
        assert client.read(page) == content_of(page)
    assert client.states(*range(8)) == ["clean"] * 8
    client.volume.hold = True
    client.outage.full(True)
    assert client.alarmed == ["device_full"]
    dirty = client.table.counts[DIRTY]
    client.space.limit = Limit(64)
    for _ in range(5):
        await client.evict()
    assert client.states(*range(8)) == ["on_device"] * 8
    assert client.table.counts[DIRTY] == dirty
    assert client.volume.held == [], "nothing was written"

    client.volume.hold = False
    client.outage.full(False)
    await client.evict()
    assert client.table.counts[DIRTY] < dirty
    assert client.alarmed == ["device_full", "device_room"]
    assert client.told == 2


async def test_pages_that_a_full_device_refused_are_in_memory_and_can_be_written(client: OutClient) -> None:
    client.volume.hold = True
    for new in range(LIMIT, LIMIT + 40):
        assert client.write(new)
    await client.evict()
    (page,) = [page for page in range(LIMIT) if client.states(page) == ["writing"]][:1]
    client.outage.full(True)
    assert client.write(page, 2) == content_of(page, 2)
    assert client.states(page) == ["rewritten"]
    client.volume.hold = False
    client.volume.release_all()
    client.outage.full(False)
    await client.evict()
    assert client.read(page) == content_of(page, 2)


async def test_while_the_intermediate_client_of_a_move_is_away_stored_pages_come_in_and_clean_ones_leave(
    client: OutClient,
) -> None:
    client.read(PAGE)
    await client.settle()
    client.volume.relayed = client.volume.hold = True
    client.outage.no_path(True)
    client.space.limit = Limit(64)
    dirty = client.table.counts[DIRTY]
    for _ in range(5):
        await client.evict()
    assert (client.states(PAGE), client.table.counts[DIRTY]) == (["on_device"], dirty)
    assert client.volume.held == [], "nothing was written"

    client.volume.hold = False
    client.space.limit = Limit(PAGES)
    assert client.read(PAGE) is None or client.read(PAGE) == content_of(PAGE)
    client.space.limit = Limit(64)
    client.outage.no_path(False)
    await client.evict()
    assert client.table.counts[DIRTY] < dirty


async def test_without_any_path_page_outs_are_tried_as_ever(client: OutClient) -> None:
    client.outage.no_path(True)
    assert not client.space.page_outs_wait
