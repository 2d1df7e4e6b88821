"""What a client sees when VIOS die, hang and come back: nothing but a wait. Every byte is compared."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio

from farpage.embedded.set import EmbeddedSet
from tests.support.paged_set import PagedSet, running_set

pytestmark = pytest.mark.asyncio(loop_scope="module")

SMALL_BYTES = 1 << 20


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_set() -> AsyncIterator[EmbeddedSet]:
    """A set as for the other modules, but page-ins are served, so that they notice the loss of a VIOS."""
    async with running_set(workers=1, lease_seconds=60.0, direct_reads=False) as started:
        yield started


async def test_a_vios_killed_during_page_in_is_replaced_at_once(paged: PagedSet) -> None:
    await paged.write_all()
    active = await paged.active()
    paged.signal(active, signal.SIGSTOP)
    paged.client.send(f"verify 0 {paged.pages}")
    await paged.until_sent(active)
    paged.signal(active, signal.SIGKILL)
    assert await paged.client.answer() == "wrong 0"
    info = await paged.until_state(active, "failed")
    assert info.failovers[0].from_vios == active
    assert info.failovers[0].replayed_commands >= 1


async def test_a_vios_hung_during_page_in_is_replaced_after_the_path_timeout(paged: PagedSet) -> None:
    await paged.write_all()
    active = await paged.active()
    paged.signal(active, signal.SIGSTOP)
    await paged.verify_all()
    info = await paged.until_state(active, "failed")
    assert "no answer" in info.failovers[0].reason
    paged.signal(active, signal.SIGCONT)
    await paged.until_state(active, "standby")


async def hang_during_page_out(paged: PagedSet, vios: str) -> asyncio.Task[None]:
    """Stop a VIOS with dirty pages on their way to it; returns the change of the limit that sends them."""
    await paged.write_all()
    paged.signal(vios, signal.SIGSTOP)
    limiting = asyncio.get_running_loop().create_task(paged.set_limit(SMALL_BYTES))
    await paged.until_sent(vios)
    return limiting


async def test_page_outs_of_a_killed_vios_are_repeated_on_the_other(paged: PagedSet) -> None:
    active = await paged.active()
    limiting = await hang_during_page_out(paged, active)
    paged.signal(active, signal.SIGKILL)
    await limiting
    info = await paged.until_state(active, "failed")
    assert info.failovers[0].quarantined_pages > 0
    await paged.until(lambda info: info.resident_bytes <= SMALL_BYTES, "within the limit")
    await paged.verify_all()


async def test_page_outs_of_a_hung_vios_stay_in_memory_until_it_is_fenced(paged: PagedSet) -> None:
    active = await paged.active()
    limiting = await hang_during_page_out(paged, active)
    info = await paged.until_state(active, "failed")
    await limiting
    quarantined_bytes = info.failovers[0].quarantined_pages * 4096
    assert quarantined_bytes > 0
    await paged.write_all()  # newer content than what the hung server still has to write
    await paged.verify_all()
    assert (await paged.info()).resident_bytes >= quarantined_bytes
    paged.signal(active, signal.SIGCONT)
    await paged.until_state(active, "standby")
    await paged.until(lambda info: info.resident_bytes <= SMALL_BYTES, "within the limit")
    await paged.verify_all()


async def test_with_both_vios_down_accesses_wait_until_one_is_back(paged: PagedSet) -> None:
    await paged.write_all()
    for vios in paged.embedded.vioses:
        paged.signal(vios, signal.SIGKILL)
    paged.client.send(f"verify 0 {paged.pages}")
    await paged.until(lambda info: info.stalled_faults > 0, "an access waits")
    await paged.until_alarm("no_path")
    await paged.restart("vios2")
    assert await paged.client.answer() == "wrong 0"
    await paged.until_state("vios2", "active")


async def test_vios_restarted_one_after_the_other_lose_nothing(paged: PagedSet) -> None:
    await paged.write_all()
    for _ in range(2):
        active = await paged.active()
        paged.client.send(f"write 0 {paged.pages}")
        paged.signal(active, signal.SIGKILL)
        assert await paged.client.answer() == "done"
        await paged.restart(active)
        await paged.until_state(active, "standby")
        await paged.verify_all()
    info = await paged.info()
    assert len(info.failovers) == 2
    assert info.epoch > 2


async def test_a_vios_that_comes_back_has_the_definition_of_the_others(paged: PagedSet) -> None:
    active = await paged.active()
    paged.signal(active, signal.SIGKILL)
    await paged.write_all()
    await paged.verify_all()
    await paged.restart(active)
    await paged.until_state(active, "standby")
    known = await paged.embedded.hypervisor.definition()
    assert known.clients["client"].epoch == (await paged.info()).epoch
    await paged.until_stored(known)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_losing_the_standby_vios_is_not_noticed_by_the_client(
    paged: PagedSet, number: signal.Signals
) -> None:
    active = await paged.active()
    standby = next(vios for vios in paged.embedded.vioses if vios != active)
    await paged.until_state(standby, "standby")
    paged.signal(standby, number)
    await paged.write_all()
    await paged.verify_all()
    info = await paged.until_state(standby, "failed")
    assert info.failovers == ()
