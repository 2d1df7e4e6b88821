"""A VIOS that hangs neither dies nor answers: its lease fences it. Real processes, every byte compared."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from farpage.embedded.set import EmbeddedSet
from tests.faults.conftest import LIMIT_BYTES, PAGES
from tests.faults.test_losing_a_vios import SMALL_BYTES, hang_during_page_out
from tests.support.losses import heal
from tests.support.paged_set import PagedSet, paged_region, running_set

pytestmark = pytest.mark.asyncio(loop_scope="module")

LEASE_SECONDS = 1.0


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def leasing() -> AsyncIterator[EmbeddedSet]:
    """A set whose VIOS give short leases."""
    async with running_set(workers=1, lease_seconds=LEASE_SECONDS, path_timeout_seconds=0.5) as started:
        yield started


@pytest_asyncio.fixture(loop_scope="module")
async def leased(leasing: EmbeddedSet) -> AsyncIterator[PagedSet]:
    """A client of 16 MiB that may keep a quarter in memory."""
    await heal(leasing)
    async with paged_region(leasing, PAGES, LIMIT_BYTES) as with_client:
        yield with_client


def held(paged: PagedSet, vios: str) -> asyncio.Task[None]:
    """Wait until nothing is held back any more for a VIOS."""

    async def wait() -> None:
        await paged.until(
            lambda info: all(path.vios != vios or path.held == 0 for path in info.paths), "released"
        )

    return asyncio.get_running_loop().create_task(wait())


async def test_page_outs_of_a_hung_vios_are_repeated_when_its_lease_is_over(leased: PagedSet) -> None:
    loop = asyncio.get_running_loop()
    active = await leased.active()
    stopped = loop.time()
    limiting = await hang_during_page_out(leased, active)
    info = await leased.until_state(active, "failed")
    assert info.failovers[0].quarantined_pages > 0
    await limiting
    await held(leased, active)
    # How much later it may be on a busy machine nobody knows; that it is not sooner is what matters.
    assert loop.time() - stopped >= LEASE_SECONDS * 3 / 4
    await leased.until(lambda info: info.resident_bytes <= SMALL_BYTES, "within the limit")
    await leased.verify_all()


async def test_a_hung_vios_that_wakes_up_after_its_lease_writes_nothing(leased: PagedSet) -> None:
    active = await leased.active()
    await (await hang_during_page_out(leased, active))
    await leased.until_state(active, "failed")
    await held(leased, active)
    await leased.write_all()
    await leased.until(lambda info: info.resident_bytes <= SMALL_BYTES, "within the limit")
    leased.signal(active, signal.SIGCONT)
    await leased.until_state(active, "standby")
    await leased.verify_all()


async def test_a_worker_that_was_stopped_for_longer_than_its_leases_goes_on(leased: PagedSet) -> None:
    await leased.write_all()
    (worker,) = (await leased.embedded.hypervisor.info()).workers
    os.kill(worker.pid, signal.SIGSTOP)
    try:
        leased.client.send(f"write 0 {leased.pages}")
        for vios in leased.embedded.vioses.values():
            while (await vios.health()).leases:
                await asyncio.sleep(0.05)
    finally:
        os.kill(worker.pid, signal.SIGCONT)
    assert await leased.client.answer() == "done"
    await leased.verify_all()
    info = await leased.until(lambda info: any(path.state == "standby" for path in info.paths), "redundant")
    assert info.fenced == ""
