"""At any instant the table says of a page what is safe to go by after the worker was killed then."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest

from farpage.pager.limit import Limit
from farpage.pager.states import CLEAN, DIRTY, WRITING
from farpage.pager.table import PageTable
from tests.support.paging import ModelClient, content_of

PAGES = 256
LIMIT = 100
OLDEST = 0
"""The first page written is the first to leave."""


@pytest.fixture
async def client() -> AsyncIterator[ModelClient]:
    model = ModelClient(PAGES, LIMIT)
    yield model
    model.close()


@pytest.fixture
def seen(client: ModelClient) -> Iterator[list[tuple[str, str]]]:
    """What is done to the oldest page, with its state in the table at that moment."""
    steps: list[tuple[str, str]] = []

    def before(name: str, first: int, count: int) -> None:
        if first <= OLDEST < first + count:
            steps.extend((name, state) for state in client.states(OLDEST))

    client.memory.before = before
    yield steps


async def paged_out(client: ModelClient) -> None:
    """Write pages until the oldest has left memory, or waits for the volume to take it."""
    for page in range(LIMIT):
        assert client.write(page)
    await client.evict()


async def clean(client: ModelClient) -> None:
    await paged_out(client)
    assert client.read(OLDEST) == content_of(OLDEST)
    assert client.states(OLDEST) == ["clean"]


async def writing(client: ModelClient) -> None:
    client.volume.hold = True
    await paged_out(client)
    assert client.states(OLDEST) == ["writing"]


async def test_a_clean_page_is_called_dirty_before_it_can_be_written_to(
    client: ModelClient, seen: list[tuple[str, str]]
) -> None:
    await clean(client)
    seen.clear()
    assert client.write(OLDEST, 2) == content_of(OLDEST, 2)
    assert seen == [("unprotect", "dirty")]


async def test_a_page_on_its_way_out_is_called_rewritten_before_it_can_be_written_to(
    client: ModelClient, seen: list[tuple[str, str]]
) -> None:
    await writing(client)
    seen.clear()
    assert client.write(OLDEST, 2) == content_of(OLDEST, 2)
    assert seen == [("unprotect", "rewritten")]


async def test_a_clean_page_is_called_dirty_before_it_is_mapped_for_a_write(
    client: ModelClient, seen: list[tuple[str, str]]
) -> None:
    await clean(client)
    client.memory.unmap(OLDEST)
    seen.clear()
    assert client.write(OLDEST, 2) == content_of(OLDEST, 2)
    assert seen == [("map_in", "dirty")]


async def test_a_page_on_its_way_out_is_called_rewritten_before_it_is_mapped_for_a_write(
    client: ModelClient, seen: list[tuple[str, str]]
) -> None:
    await writing(client)
    client.memory.unmap(OLDEST)
    seen.clear()
    assert client.write(OLDEST, 2) == content_of(OLDEST, 2)
    assert seen == [("map_in", "rewritten")]


async def test_a_clean_page_that_the_client_removed_is_called_dirty_before_it_is_filled(
    client: ModelClient, seen: list[tuple[str, str]]
) -> None:
    await clean(client)
    client.memory.remove(OLDEST)
    seen.clear()
    assert client.read(OLDEST) == bytes(4096)
    assert seen == [("zero_in", "dirty")]
    assert client.states(OLDEST) == ["dirty"]


async def test_a_page_is_on_the_device_only_after_it_has_left_memory(
    client: ModelClient, seen: list[tuple[str, str]]
) -> None:
    await paged_out(client)
    assert ("release", "clean") in seen
    assert client.states(OLDEST) == ["on_device"]
    assert client.read(OLDEST)
    seen.clear()
    client.space.limit = Limit(64)  # no page may stay
    await client.evict()
    assert seen == [("release", "clean")]
    assert client.states(OLDEST) == ["on_device"]


async def test_a_page_is_zero_only_after_it_has_left_memory(
    client: ModelClient, seen: list[tuple[str, str]]
) -> None:
    for page in range(LIMIT):
        assert client.read(page) == bytes(4096)
    await client.evict()
    assert ("release", "dirty") in seen
    assert client.states(OLDEST) == ["zero"]


async def test_the_checksum_of_a_page_is_known_before_it_is_on_its_way_out(
    client: ModelClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[int] = []
    move = PageTable.move

    def noted(table: PageTable, first: int, count: int, old: int, new: int) -> None:
        if new == WRITING:
            moved.extend(table.checksums[first : first + count].tolist())
        move(table, first, count, old, new)

    monkeypatch.setattr(PageTable, "move", noted)
    await paged_out(client)
    assert moved
    assert 0 not in moved


async def test_a_write_that_has_to_be_let_through_later_leaves_the_page_dirty_meanwhile(
    client: ModelClient, seen: list[tuple[str, str]]
) -> None:
    await clean(client)
    client.memory.busy.add("unprotect")
    assert client.write(OLDEST, 2) is None
    assert client.states(OLDEST) == ["dirty"]
    client.memory.busy.clear()
    seen.clear()
    assert client.write(OLDEST, 2) == content_of(OLDEST, 2)
    assert seen == [("unprotect", "dirty")]


@pytest.mark.parametrize("state", [CLEAN, WRITING, DIRTY])
async def test_a_stale_event_changes_nothing(client: ModelClient, state: int) -> None:
    await (writing if state == WRITING else clean)(client)
    if state == DIRTY:
        client.write(OLDEST, 2)
    assert client.table.state[OLDEST] == state
    content = client.memory.content.pop(OLDEST)
    client.memory.touch(OLDEST)  # the event
    client.memory.content[OLDEST] = content  # was answered meanwhile
    client.faults.on_events()
    assert client.table.state[OLDEST] == state
