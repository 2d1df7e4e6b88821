"""A file that is mapped MAP_SHARED under a memory cgroup's limit, as a contender of `bench.paging`."""

from __future__ import annotations

import tempfile
from pathlib import Path

import pytest

from bench._hostswap import why_no_limit
from bench._pagers import MappedFile, Work, measure
from bench._toucher import MemoryKind, Pattern, Phase, build

MEMORY_BYTES, LIMIT_BYTES = 64 << 20, 16 << 20
PAGES = MEMORY_BYTES // 4096


@pytest.mark.skipif(bool(why_no_limit()), reason=why_no_limit())
@pytest.mark.parametrize("kind", [MemoryKind.FILE, MemoryKind.FILE_RANDOM])
async def test_what_the_limit_keeps_out_of_memory_is_read_from_the_disk(kind: MemoryKind) -> None:
    with tempfile.TemporaryDirectory(dir="/var/tmp") as name:  # a tmpfs has no disk to read
        work = Work(
            folder=Path(name),
            program=build(Path(name)),
            memory_bytes=MEMORY_BYTES,
            limit_bytes=LIMIT_BYTES,
            seconds=1,
            phases=(Phase(Pattern.POPULATE, write_percent=100), Phase(Pattern.SEQUENTIAL)),
        )
        _, swept = await measure(MappedFile(kind), work, seed=1)
    assert swept.report.all.count == PAGES
    assert swept.page_ins >= (MEMORY_BYTES - LIMIT_BYTES) // 4096
