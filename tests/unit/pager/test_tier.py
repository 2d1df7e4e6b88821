"""The RAM tier: what it keeps and gives, against a model, and in a client's pager."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import AsyncIterator

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from farpage.pager.checksum import page_checksum
from farpage.pager.compression import MOST_BYTES, WORD_BYTES, pack, unpack
from farpage.pager.limit import Limit
from farpage.pager.table import PAGE_BYTES
from farpage.pager.tier import (
    ENTRY_BYTES,
    FAILURES,
    FRUITLESS_EVERY,
    FRUITLESS_SHARE,
    SAMPLE_EVERY,
    TRIAL_ENTRIES,
    RamTier,
)
from tests.support.paging import ModelClient, content_of

HALF = PAGE_BYTES // 2


def halves(seed: int) -> bytes:
    """Return a page that compresses to about a half."""
    return random.Random(seed).randbytes(HALF) + bytes(HALF)


def noise(seed: int) -> bytes:
    return random.Random(seed).randbytes(PAGE_BYTES)


def made(kind: str, seed: int) -> bytes:
    if kind == "w":
        return content_of(seed)
    return halves(seed) if kind == "h" else noise(seed)


def checksum_of(content: bytes) -> int:
    return page_checksum(memoryview(content))


@pytest.mark.parametrize("content", [halves(1), bytes(PAGE_BYTES), b"farpage!" * 512, bytes(4095) + b"x"])
def test_a_page_comes_back_as_it_was(content: bytes) -> None:
    packed = pack(memoryview(content))
    assert packed is not None
    assert len(packed) <= MOST_BYTES
    assert unpack(packed) == content


def test_a_page_of_one_word_is_kept_as_that_word() -> None:
    assert pack(memoryview(b"farpage!" * 512)) == b"farpage!"
    almost = pack(memoryview(b"farpage!" * 511 + b"farpage?"))
    assert almost is not None
    assert len(almost) > WORD_BYTES


def test_a_page_that_does_not_get_small_is_not_kept() -> None:
    assert pack(memoryview(noise(1))) is None


@pytest.mark.parametrize("damaged", [b"", b"\xff" * 20, b"farpage?!"])
def test_what_is_no_packed_page_is_an_error(damaged: bytes) -> None:
    with pytest.raises(ValueError):
        unpack(damaged)


def test_a_page_with_another_checksum_is_not_given() -> None:
    tier = RamTier(1 << 20)
    tier.keep(7, memoryview(halves(1)))
    assert tier.look(7, checksum_of(halves(2))) is None
    assert tier.take(7, checksum_of(halves(2))) is None
    assert 7 not in tier


def test_pages_that_do_not_compress_are_only_sampled_until_some_do() -> None:
    tier = RamTier(1 << 20)
    for page in range(FAILURES):
        assert tier.wanted(1) == 1
        tier.keep(page, memoryview(noise(page)))
    assert [tier.wanted(1) for _ in range(2 * SAMPLE_EVERY)].count(1) <= 3
    tier.keep(99, memoryview(halves(99)))
    assert tier.wanted(64) == 64


def test_pages_of_which_none_comes_back_are_only_sampled_until_some_do() -> None:
    tier = RamTier(100 * (ENTRY_BYTES + WORD_BYTES))
    page = 0
    while page <= TRIAL_ENTRIES + 100:
        tier.keep(page, memoryview(content_of(page)))
        page += 1
    wanted = [tier.wanted(1) for _ in range(4 * FRUITLESS_EVERY)]
    assert wanted.count(1) == 4
    for _ in range(TRIAL_ENTRIES):
        tier.keep(page, memoryview(content_of(page)))
        if page % 4 == 0:
            assert tier.take(page, checksum_of(content_of(page)))
        page += 1
    assert [tier.wanted(1) for _ in range(20)] == [1] * 20


def test_a_tier_takes_everything_again_as_soon_as_some_pages_come_back() -> None:
    tier = RamTier(10 * TRIAL_ENTRIES * (ENTRY_BYTES + WORD_BYTES))
    kept = 12 * TRIAL_ENTRIES
    for page in range(kept):
        tier.keep(page, memoryview(content_of(page)))
    assert [tier.wanted(1) for _ in range(2 * FRUITLESS_EVERY)].count(1) == 2
    for page in range(kept - TRIAL_ENTRIES // FRUITLESS_SHARE, kept):
        assert tier.take(page, checksum_of(content_of(page)))
    assert [tier.wanted(1) for _ in range(20)] == [1] * 20


class TierModel(RuleBasedStateMachine):
    """A tier beside a dictionary that never drops anything."""

    def __init__(self) -> None:
        super().__init__()
        self.most_bytes = 8 * HALF
        self.tier = RamTier(self.most_bytes)
        self.newest: OrderedDict[int, bytes] = OrderedDict()

    @rule(first=st.integers(0, 20), kinds=st.lists(st.sampled_from("hnw"), min_size=1, max_size=4))
    def keep(self, first: int, kinds: list[str]) -> None:
        seeds = range(len(kinds) + len(self.newest), 2 * len(kinds) + len(self.newest))
        run = [made(kind, seed) for kind, seed in zip(kinds, seeds, strict=True)]
        for page, content in enumerate(run, first):
            self.tier.forget(page)
            self.newest.pop(page, None)
            self.newest[page] = content
        self.tier.keep(first, memoryview(b"".join(run)))

    @rule(page=st.integers(0, 24))
    def take(self, page: int) -> None:
        content = self.newest.get(page, bytes(PAGE_BYTES))
        held = page in self.tier
        assert self.tier.take(page, checksum_of(content)) == (content if held else None)
        assert page not in self.tier

    @rule(first=st.integers(0, 24), count=st.integers(1, 5))
    def forget(self, first: int, count: int) -> None:
        self.tier.forget(first, count)
        assert not any(page in self.tier for page in range(first, first + count))

    @rule(pages=st.integers(0, 16))
    def resize(self, pages: int) -> None:
        self.most_bytes = pages * HALF
        self.tier.resize(self.most_bytes)

    @rule()
    def clear(self) -> None:
        self.tier.clear()

    @invariant()
    def holds_only_the_newest_and_within_its_size(self) -> None:
        held = [page for page in self.newest if page in self.tier]
        assert len(held) == len(self.tier)
        for page in held:
            assert self.tier.look(page, checksum_of(self.newest[page])) == self.newest[page]
        assert self.tier.taken_bytes <= self.most_bytes
        assert (self.tier.stored_bytes == 0) == (len(self.tier) == 0)


TestTierModel = TierModel.TestCase


PAGES = 256
LIMIT = 100


@pytest.fixture
async def client() -> AsyncIterator[ModelClient]:
    model = ModelClient(PAGES, LIMIT, ram_tier_percent=10)
    yield model
    model.close()


async def test_a_page_that_left_memory_comes_back_without_the_device(client: ModelClient) -> None:
    await client.fill(LIMIT)
    assert client.states(0) == ["on_device"]
    client.volume.hold = True
    assert client.read(0) == content_of(0)
    assert client.states(0) == ["clean"]
    assert client.space.counters.tier_hit_pages == 1
    assert not client.volume.held
    assert 0 not in client.space.tier


async def test_a_page_that_comes_back_for_a_write_is_dirty(client: ModelClient) -> None:
    await client.fill(LIMIT)
    assert client.write(0, 2)
    assert client.states(0) == ["dirty"]
    assert client.read(0) == content_of(0, 2)


async def test_a_page_that_left_twice_comes_back_with_its_newest_content(client: ModelClient) -> None:
    await client.fill(LIMIT)
    for version in (2, 3):
        assert client.write(0, version)
        client.eviction.drain(on=True)
        await client.settle()
        client.eviction.drain(on=False)
        assert client.states(0) == ["on_device"]
        assert 0 not in client.space.tier  # a drained client's pages are on the volume alone
    assert client.read(0) == content_of(0, 3)


async def test_a_clean_page_that_leaves_goes_to_the_tier(client: ModelClient) -> None:
    await client.fill(LIMIT)
    client.space.tier.clear()
    assert client.read(0) == content_of(0)
    assert client.states(0) == ["clean"]
    client.space.set_limit(Limit(LIMIT // 3))
    await client.evict()
    assert client.states(0) == ["on_device"]
    assert client.space.tier.look(0, checksum_of(content_of(0))) == content_of(0)


async def test_what_the_tier_takes_is_a_part_of_the_limit(client: ModelClient) -> None:
    for page in range(2 * LIMIT):
        assert client.write(page)
        await client.evict()
    tier, table = client.space.tier, client.space.table
    assert tier.taken_pages > 0
    assert tier.taken_bytes <= LIMIT * PAGE_BYTES // 10
    assert table.resident + tier.taken_pages <= LIMIT


async def test_a_full_device_empties_the_tier(client: ModelClient) -> None:
    await client.fill(LIMIT)
    assert len(client.space.tier)
    client.outage.full(True)
    assert not len(client.space.tier)


async def test_a_page_that_every_device_spoilt_is_repaired_from_the_tier(client: ModelClient) -> None:
    await client.fill(LIMIT)
    client.volume.spoil(0)
    found = await client.faults.salvage.search([0])
    assert found.found == {0: content_of(0)}
    assert client.volume.rewritten == [("disk1", 0)]
