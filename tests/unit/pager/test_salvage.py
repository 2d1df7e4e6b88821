from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from farpage.pager.table import PAGE_BYTES
from tests.support.paging import ModelClient, content_of

PAGES = 256
LIMIT = 100
PAGE = 3
"""One of those that are paged out."""


@pytest.fixture
async def single() -> AsyncIterator[ModelClient]:
    model = ModelClient(PAGES, LIMIT)
    await model.fill(LIMIT)
    yield model
    model.close()


@pytest.fixture
async def mirrored() -> AsyncIterator[ModelClient]:
    model = ModelClient(PAGES, LIMIT, ("disk1", "disk2", "disk3"))
    await model.fill(LIMIT)
    assert model.states(PAGE) == ["on_device"]
    yield model
    model.close()


async def read(client: ModelClient, page: int) -> bytes | None:
    client.read(page)
    await client.settle()
    return client.read(page)


async def test_a_page_that_is_wrong_on_one_replica_is_read_from_another_and_repaired(
    mirrored: ModelClient,
) -> None:
    mirrored.volume.spoil(PAGE, "disk1")
    assert await read(mirrored, PAGE) == content_of(PAGE)
    assert mirrored.volume.rewritten == [("disk1", PAGE)]
    at = slice(PAGE * PAGE_BYTES, (PAGE + 1) * PAGE_BYTES)
    assert mirrored.volume.on["disk1"][at] == content_of(PAGE)
    counters = mirrored.space.counters
    assert (counters.checksum_errors, counters.repaired_pages, counters.poisoned_pages) == (1, 1, 0)
    assert counters.wrong_by_device == {"name of disk1": 1}
    assert counters.repaired_by_device == {"name of disk1": 1}
    ((kind, message),) = mirrored.alarms
    assert (kind, f"page {PAGE}" in message, "name of disk1" in message) == ("checksum", True, True)


async def test_every_bad_replica_is_repaired(mirrored: ModelClient) -> None:
    mirrored.volume.spoil(PAGE, "disk1")
    mirrored.volume.spoil(PAGE, "disk3")
    assert await read(mirrored, PAGE) == content_of(PAGE)
    assert sorted(mirrored.volume.rewritten) == [("disk1", PAGE), ("disk3", PAGE)]


async def test_the_page_is_let_in_only_when_it_is_repaired(mirrored: ModelClient) -> None:
    mirrored.volume.spoil(PAGE, "disk1")
    mirrored.read(PAGE)
    mirrored.volume.hold = True
    for _ in mirrored.volume.on:
        await mirrored.settle()
        mirrored.volume.release()
    await mirrored.settle()
    assert len(mirrored.volume.held) == 1, "the repair"
    assert mirrored.states(PAGE) == ["reading"]
    mirrored.volume.release()
    await mirrored.settle()
    assert mirrored.states(PAGE) == ["clean"]
    assert mirrored.volume.rewritten == [("disk1", PAGE)]


async def test_a_replica_that_is_not_in_sync_is_neither_asked_nor_repaired(mirrored: ModelClient) -> None:
    mirrored.volume.stale.add("disk2")
    for device in ("disk1", "disk3"):
        mirrored.volume.spoil(PAGE, device)
    assert await read_fails(mirrored, PAGE)
    assert mirrored.volume.rewritten == []


async def test_a_replica_that_comes_to_be_in_sync_while_another_is_lost_is_asked(
    mirrored: ModelClient,
) -> None:
    volume = mirrored.volume
    volume.stale.update(("disk2", "disk3"))
    volume.spoil(PAGE, "disk1")
    mirrored.read(PAGE)
    volume.hold = True
    await mirrored.settle()
    assert len(volume.held) == 1, "the search asks disk1"
    volume.stale.symmetric_difference_update(("disk1", "disk2"))
    volume.hold = False
    volume.release()
    await mirrored.settle()
    assert mirrored.read(PAGE) == content_of(PAGE)
    assert mirrored.space.counters.poisoned_pages == 0


async def read_fails(client: ModelClient, page: int) -> bool:
    try:
        await read(client, page)
    except MemoryError:
        return True
    return False


async def test_a_page_that_no_replica_has_is_poisoned_alone(mirrored: ModelClient) -> None:
    for device in mirrored.volume.on:
        mirrored.volume.spoil(PAGE, device)
    assert await read_fails(mirrored, PAGE)
    assert mirrored.states(PAGE) == ["poisoned"]
    assert [kind for kind, _ in mirrored.alarms] == ["checksum", "poisoned"]
    assert await read(mirrored, PAGE + 1) == content_of(PAGE + 1)


async def test_the_only_replica_is_read_again(single: ModelClient) -> None:
    single.volume.spoil(PAGE)
    single.read(PAGE)
    single.volume.spoil(PAGE)  # as it was
    await single.settle()
    assert single.read(PAGE) == content_of(PAGE)
    assert single.volume.rewritten == []
    assert single.space.counters.wrong_by_device == {}


async def test_the_only_replica_is_read_over_its_other_path(single: ModelClient) -> None:
    single.volume.spoil(PAGE)
    single.volume.other_path[PAGE] = content_of(PAGE)
    assert await read(single, PAGE) == content_of(PAGE)
    assert single.space.counters.poisoned_pages == 0


async def test_a_page_that_was_read_ahead_and_is_wrong_stays_on_the_device(single: ModelClient) -> None:
    single.volume.spoil(PAGE)
    for page in (PAGE - 2, PAGE - 1):
        assert await read(single, page) == content_of(page)
    assert single.states(PAGE - 1, PAGE) == ["clean", "on_device"]
    assert single.space.counters.checksum_errors == 1
    single.volume.spoil(PAGE)  # right again
    assert await read(single, PAGE) == content_of(PAGE)
    assert single.space.counters.poisoned_pages == 0


async def test_a_page_that_is_wanted_while_it_is_looked_for_is_read_anew(single: ModelClient) -> None:
    volume = single.volume
    volume.spoil(PAGE)
    assert await read(single, PAGE - 2) == content_of(PAGE - 2)
    single.read(PAGE - 1)
    volume.hold = True
    await single.settle()
    assert (len(volume.held), single.states(PAGE)) == (1, ["reading"]), "the search reads the replica"
    volume.release()
    await single.settle()
    volume.spoil(PAGE)  # right again
    assert single.read(PAGE) is None
    volume.hold = False
    volume.release()
    await single.settle()
    assert single.read(PAGE) == content_of(PAGE)
    assert single.space.counters.poisoned_pages == 0


async def test_pages_of_one_answer_are_told_of_once(mirrored: ModelClient) -> None:
    for page in range(4, 8):
        mirrored.volume.spoil(page, "disk1")
    for page in range(1, 8):
        assert await read(mirrored, page) == content_of(page)
    assert len(mirrored.alarms) < 4
    assert mirrored.space.counters.repaired_pages == 4


async def test_a_client_that_ends_meanwhile_is_let_be(mirrored: ModelClient) -> None:
    mirrored.volume.spoil(PAGE, "disk1")
    mirrored.read(PAGE)
    mirrored.space.closed = True
    await mirrored.settle()
    assert mirrored.volume.rewritten == []


async def test_a_lost_page_leaves_its_room_to_an_access_that_waits_for_some(single: ModelClient) -> None:
    single.volume.spoil(PAGE)
    single.read(PAGE)
    assert single.states(PAGE) == ["reading"]
    page = PAGES - 1
    while single.space.room > 0:
        single.write(page)
        page -= 2
    assert single.write(page) is None
    assert single.states(page) == ["zero"]
    await single.settle()
    assert single.states(PAGE, page) == ["poisoned", "dirty"]
