from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from farpage.embedded.set import EmbeddedSet
from tests.support.hammer import compile_hammer
from tests.support.losses import heal
from tests.support.paged_set import PagedSet, paged_region, running_set

PAGES = 4096
LIMIT_BYTES = 4 << 20


@pytest.fixture(scope="session")
def hammer_program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compile_hammer(tmp_path_factory.mktemp("hammer"))


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_set() -> AsyncIterator[EmbeddedSet]:
    """A set of two VIOS on a common device for a module, made whole again before each test.

    Leases are long: only what a test does fences a VIOS.
    """
    async with running_set(workers=1, lease_seconds=60.0) as started:
        yield started


@pytest_asyncio.fixture(loop_scope="module")
async def paged(shared_set: EmbeddedSet) -> AsyncIterator[PagedSet]:
    """A client of 16 MiB that may keep a quarter in memory."""
    await heal(shared_set)
    async with paged_region(shared_set, PAGES, LIMIT_BYTES) as with_client:
        yield with_client
