from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from tests.support.hammer import compile_hammer
from tests.support.paged_set import PagedSet, paged_region, running_set

PAGES = 4096
LIMIT_BYTES = 4 << 20


@pytest.fixture(scope="session")
def hammer_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_hammer(tmp_path_factory.mktemp("hammer"))


@pytest.fixture
async def paged() -> AsyncIterator[PagedSet]:
    """A set of two VIOS on a common device, and a client of 16 MiB that may keep a quarter in memory.

    Leases are long: only what a test does fences a VIOS.
    """
    async with (
        running_set(workers=1, lease_seconds=60.0) as embedded,
        paged_region(embedded, PAGES, LIMIT_BYTES) as set_with_client,
    ):
        yield set_with_client
