"""Windows of pages that are read ahead of a client, and the page of each that it must ask for."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.support.paging import ModelClient, content_of

PAGES = 1024


@pytest.fixture
async def client() -> AsyncIterator[ModelClient]:
    """A client whose pages are all on the volume."""
    model = ModelClient(PAGES, PAGES - 1)
    await model.fill(PAGES)
    await model.page_out(PAGES - 1)
    assert model.table.resident == 0
    yield model
    model.close()


def touched(client: ModelClient, pages: range) -> int:
    """Read pages in their order; returns how many of them were not in memory when they were asked for."""
    faults = client.space.counters.faults
    for page in pages:
        assert client.read(page) == content_of(page)
    return client.space.counters.faults - faults


@pytest.mark.parametrize("pages", [range(PAGES), range(PAGES - 1, -1, -1), range(3, PAGES, 7)])
async def test_a_reader_asks_for_few_of_its_pages(client: ModelClient, pages: range) -> None:
    assert touched(client, pages) <= 24
    counters = client.space.counters
    assert counters.page_in_pages <= len(pages) + 65
    assert counters.read_ahead_wasted_pages == 0


async def test_a_marker_is_at_hand_but_not_in_memory(client: ModelClient) -> None:
    touched(client, range(8))
    (marker,) = client.faults._streams.markers
    assert client.states(marker - 1, marker, marker + 1) == ["clean", "on_device", "clean"]
    client.volume.hold = True
    assert client.read(marker) == content_of(marker)
    assert client.space.counters.tier_hit_pages == 0
    assert client.states(marker + 10) == ["reading"]


async def test_a_marker_that_is_asked_for_while_it_is_read_comes_with_its_window(client: ModelClient) -> None:
    touched(client, range(8))
    (marker,) = client.faults._streams.markers
    client.volume.hold = True
    assert client.read(marker) == content_of(marker)
    (marker,) = client.faults._streams.markers
    assert client.states(marker) == ["reading"]
    assert client.read(marker) is None
    (following,) = client.faults._streams.markers
    assert following > marker
    assert client.states(following) == ["reading"]
    client.volume.hold = False
    client.volume.release_all()
    await client.settle()
    assert client.read(marker) == content_of(marker)
    assert client.states(marker, following) == ["clean", "on_device"]


async def test_a_marker_that_was_written_meanwhile_is_not_given_as_it_was(client: ModelClient) -> None:
    touched(client, range(8))
    (marker,) = client.faults._streams.markers
    assert client.write(marker, 2)
    client.eviction.drain(on=True)
    await client.settle()
    assert client.states(marker) == ["on_device"]
    assert client.read(marker) == content_of(marker, 2)


async def test_what_a_writer_is_given_ahead_it_may_write_to(client: ModelClient) -> None:
    for page in range(64):
        assert client.write(page, 2)
    faults = client.space.counters.faults
    assert client.write(64, 2)
    assert client.space.counters.faults - faults <= 1
    assert client.states(0, 63) == ["dirty", "dirty"]
