"""The process that `bench.paging` has paged."""

from __future__ import annotations

import os
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from bench._toucher import MemoryKind, Pattern, Phase, Toucher, ToucherFailed, build, waits_of

PAGE_BYTES = 4096
MEMORY_BYTES = 4 << 20
PAGES = MEMORY_BYTES // PAGE_BYTES
POPULATE = Phase(Pattern.POPULATE, write_percent=100)
SWEEP = Phase(Pattern.SEQUENTIAL)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("touch"))


@pytest.fixture
async def toucher(program: Path, tmp_path: Path) -> AsyncIterator[Toucher]:
    async with await Toucher.start(program, MemoryKind.SHARED, MEMORY_BYTES, 1, tmp_path) as started:
        yield started


def _memory(toucher: Toucher) -> int:
    """Open the memory as something that pages it would."""
    folder = Path(f"/proc/{toucher.pid}/fd")
    found = next(link for link in folder.iterdir() if "touched" in str(link.readlink()))
    return os.open(found, os.O_RDWR)


async def test_a_sweep_touches_every_page_once_and_finds_what_was_written(toucher: Toucher) -> None:
    populated = await toucher.run(POPULATE, 1)
    assert (populated.waited.count, populated.present.count) == (PAGES, 0)
    for threads in (1, 3):
        swept = await toucher.run(Phase(Pattern.SEQUENTIAL, threads=threads), 1)
        assert (swept.waited.count, swept.present.count, swept.wrong_pages) == (0, PAGES, 0)


@pytest.mark.parametrize("kind", list(MemoryKind))
async def test_every_kind_of_memory_is_populated_and_holds_what_was_written(
    program: Path, tmp_path: Path, kind: MemoryKind
) -> None:
    async with await Toucher.start(program, kind, MEMORY_BYTES, 1, tmp_path) as toucher:
        populated = await toucher.run(POPULATE, 1)
        swept = await toucher.run(SWEEP, 1)
    assert populated.waited.count + populated.present.count == PAGES
    assert (swept.present.count, swept.wrong_pages) == (PAGES, 0)


async def test_populating_in_random_order_touches_every_page_once(toucher: Toucher) -> None:
    populated = await toucher.run(Phase(Pattern.POPULATE, write_percent=100, scattered=True), 1)
    assert (populated.waited.count, populated.present.count) == (PAGES, 0)
    assert (await toucher.run(SWEEP, 1)).wrong_pages == 0


async def test_random_writes_leave_every_page_with_its_own_last_version(toucher: Toucher) -> None:
    await toucher.run(POPULATE, 1)
    mixed = await toucher.run(Phase(Pattern.RANDOM, write_percent=50, threads=4), 0.05)
    assert mixed.all.count > 0
    assert mixed.wrong_pages == 0
    assert (await toucher.run(SWEEP, 1)).wrong_pages == 0


@pytest.mark.parametrize("harm", ["a bit of its middle", "another page's content", "zeros"])
async def test_a_wrong_page_is_found(toucher: Toucher, harm: str) -> None:
    await toucher.run(POPULATE, 1)
    memory = _memory(toucher)
    try:
        page = os.pread(memory, PAGE_BYTES, 7 * PAGE_BYTES)
        content = {
            "a bit of its middle": page[:2000] + bytes([page[2000] ^ 1]) + page[2001:],
            "another page's content": os.pread(memory, PAGE_BYTES, 8 * PAGE_BYTES),
            "zeros": bytes(PAGE_BYTES),
        }[harm]
        os.pwrite(memory, content, 7 * PAGE_BYTES)
    finally:
        os.close(memory)
    assert (await toucher.run(SWEEP, 1)).wrong_pages == 1


async def test_a_touch_of_a_page_that_is_not_in_memory_counts_as_a_wait(toucher: Toucher) -> None:
    await toucher.run(POPULATE, 1)
    memory = _memory(toucher)
    try:
        os.truncate(memory, PAGES // 2 * PAGE_BYTES)
        os.truncate(memory, MEMORY_BYTES)
    finally:
        os.close(memory)
    swept = await toucher.run(SWEEP, 1)
    assert swept.waited.count == PAGES // 2


async def test_a_trace_has_the_waits_of_all_phases_that_follow_with_their_times(
    toucher: Toucher, tmp_path: Path
) -> None:
    began_ns = time.monotonic_ns()
    await toucher.trace(tmp_path / "trace")
    populated = await toucher.run(POPULATE, 1)
    await toucher.run(SWEEP, 1)  # in which nothing waits
    waits = waits_of(tmp_path / "trace")
    assert len(waits) == PAGES
    ends, took = waits[:, 0], waits[:, 1]
    assert (ends[1:] >= ends[:-1]).all()
    assert began_ns < ends[0] < ends[-1] < time.monotonic_ns()
    assert took.max() / 1e3 == pytest.approx(populated.waited.longest_us, abs=0.01)


async def test_its_end_is_reported_with_its_last_words(program: Path, tmp_path: Path) -> None:
    with pytest.raises(ToucherFailed, match="usage: touch"):
        await Toucher.start(program, MemoryKind.SHARED, 0, 1, tmp_path)
