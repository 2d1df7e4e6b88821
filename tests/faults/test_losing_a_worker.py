"""What a client sees when the data worker that pages it is killed or hangs: a wait; each byte is compared."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from contextlib import suppress
from pathlib import Path

import pytest

from farpage.attach.process import userfaultfds
from farpage.embedded.set import EmbeddedSet
from farpage.errors import FarpageError
from farpage.hypervisor.model import ClientAttach, ScrubStart
from farpage.pager.progress import ScrubState
from tests.support.commands import condition
from tests.support.hammer import hammering
from tests.support.paged_set import DEADLINE_SECONDS, PagedSet, until_client
from tests.support.processes import control_connections, descriptors_of, kill_and_wait, worker_pid
from tests.support.scrape import Scrape

pytestmark = pytest.mark.asyncio(loop_scope="module")

MIB = 1 << 20
SMALL_BYTES = MIB
SETTLED_SECONDS = 1.0


async def recoveries(embedded: EmbeddedSet) -> int:
    """Count the clients that have got another worker so far."""
    return [alarm.kind for alarm in await embedded.hypervisor.alarms()].count("worker_recovered")


async def until_recovered(embedded: EmbeddedSet, before: int, more: int = 1) -> None:
    """Wait until some more have got one than before."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while await recoveries(embedded) < before + more:
            await asyncio.sleep(0.05)


async def test_a_worker_killed_while_its_client_works_is_replaced(paged: PagedSet) -> None:
    await paged.write_all()
    before = await paged.embedded.hypervisor.alarms()
    recovered = await recoveries(paged.embedded)
    lost = await worker_pid(paged.embedded, "client")
    paged.client.send(f"verify 0 {paged.pages}")
    os.kill(lost, signal.SIGKILL)
    assert await paged.client.answer() == "wrong 0"
    await until_recovered(paged.embedded, recovered)
    assert await worker_pid(paged.embedded, "client") != lost
    await paged.write_all()
    await paged.verify_all()
    kinds = [alarm.kind for alarm in (await paged.embedded.hypervisor.alarms())[len(before) :]]
    assert kinds.index("worker_lost") < kinds.index("worker_recovered")


async def test_one_worker_after_the_other_is_killed(paged: PagedSet) -> None:
    before = await Scrape.of(paged.embedded.document.hypervisor.control)
    recovered = await recoveries(paged.embedded)
    for turn in range(1, 5):
        paged.client.send(f"write 0 {paged.pages}")
        await kill_and_wait(await worker_pid(paged.embedded, "client"))
        assert await paged.client.answer() == "done"
        await until_recovered(paged.embedded, recovered, turn)
        await paged.verify_all()
    after = await Scrape.of(paged.embedded.document.hypervisor.control)
    more = {
        name: after.value(name) - before.value(name)
        for name in ("farpage_workers_lost_total", "farpage_client_recoveries_count")
    }
    assert more == {"farpage_workers_lost_total": 4, "farpage_client_recoveries_count": 4}
    # How long a recovery takes is measured by hand: see docs/reliability.md.
    seconds = after.value("farpage_client_recoveries_sum") - before.value("farpage_client_recoveries_sum")
    assert 0 < seconds < 4 * DEADLINE_SECONDS


async def test_a_worker_that_hangs_is_killed_and_replaced(paged: PagedSet) -> None:
    await paged.write_all()
    before = await paged.embedded.hypervisor.alarms()
    recovered = await recoveries(paged.embedded)
    hung = await worker_pid(paged.embedded, "client")
    os.kill(hung, signal.SIGSTOP)
    await paged.verify_all()
    await until_recovered(paged.embedded, recovered)
    alarms = (await paged.embedded.hypervisor.alarms())[len(before) :]
    (alarm,) = [alarm for alarm in alarms if alarm.kind == "worker_lost"]
    assert "did not answer" in alarm.message
    with pytest.raises(ProcessLookupError):
        os.kill(hung, 0)


async def test_a_client_of_a_hung_worker_can_be_shown(paged: PagedSet) -> None:
    recovered = await recoveries(paged.embedded)
    hung = await worker_pid(paged.embedded, "client")
    os.kill(hung, signal.SIGSTOP)
    async with asyncio.timeout(DEADLINE_SECONDS):
        assert (await paged.info()).attachment == "region"
        await Scrape.of(paged.embedded.document.hypervisor.control)
    await until_recovered(paged.embedded, recovered)


async def test_a_worker_killed_with_page_outs_in_flight_loses_none(paged: PagedSet) -> None:
    await paged.write_all()
    active = await paged.active()
    paged.signal(active, signal.SIGSTOP)
    limiting = asyncio.get_running_loop().create_task(paged.set_limit(SMALL_BYTES))
    await paged.until_sent(active)
    await kill_and_wait(await worker_pid(paged.embedded, "client"))
    await limiting
    await paged.verify_all()
    # The hung VIOS may still carry out what the dead worker sent it: those pages have to wait for it.
    paged.signal(active, signal.SIGCONT)
    await paged.until(
        lambda info: info.resident_bytes <= SMALL_BYTES and len(info.paths) == 2, "within the limit"
    )
    await paged.write_all()
    await paged.verify_all()


async def test_a_worker_killed_during_a_failover_finds_the_other_path(paged: PagedSet) -> None:
    await paged.write_all()
    active = await paged.active()
    paged.client.send(f"write 0 {paged.pages}")
    paged.signal(active, signal.SIGKILL)
    await kill_and_wait(await worker_pid(paged.embedded, "client"))
    assert await paged.client.answer() == "done"
    await paged.verify_all()
    await paged.restart(active)
    await paged.until_state(active, "standby")
    await paged.verify_all()


async def test_pages_taken_by_a_balloon_before_the_worker_is_killed_are_zeros_or_as_they_were(
    paged: PagedSet,
) -> None:
    """A page that was in memory alone is zeros; one that the device has may come back as it was."""
    await paged.write_all()
    await paged.client.do("verify 0 512")  # clean ones, beside those written to and those paged out
    recovered = await recoveries(paged.embedded)
    lost = await worker_pid(paged.embedded, "client")
    assert await paged.client.do("write 1024 64") == "done"
    await paged.info()  # the worker has noted by now that the last of them is in memory
    os.kill(lost, signal.SIGSTOP)
    assert await paged.client.do(f"punch 0 {paged.pages}") == "done"
    await kill_and_wait(lost)
    words = (await paged.client.do(f"punched 0 {paged.pages}")).split()
    zeros, old, other = (int(word) for word in words[1::2])
    assert other == 0
    assert zeros > 0
    assert old > 0
    await until_recovered(paged.embedded, recovered)
    await paged.verify_all()
    await paged.write_all()
    await paged.verify_all()


async def test_a_worker_killed_without_any_vios_waits_for_one(paged: PagedSet) -> None:
    await paged.write_all()
    recovered = await recoveries(paged.embedded)
    for vios in paged.embedded.vioses:
        paged.signal(vios, signal.SIGKILL)
    await kill_and_wait(await worker_pid(paged.embedded, "client"))
    paged.client.send(f"verify 0 {paged.pages}")
    await until_recovered(paged.embedded, recovered)
    await paged.until(lambda info: info.stalled_faults > 0, "an access waits")
    for vios in paged.embedded.vioses:
        await paged.restart(vios)
    assert await paged.client.answer() == "wrong 0"


async def test_a_request_that_its_worker_did_not_survive_is_carried_out_by_the_next(
    paged: PagedSet, hammer_program: Path
) -> None:
    hypervisor = paged.embedded.hypervisor
    async with hammering(hammer_program, 2048, threads=2) as hammer:
        await hypervisor.attach("vm", ClientAttach(pid=hammer.pid, limit_bytes=MIB))
        await until_client(hypervisor, "vm", lambda info: info.on_device_bytes > 0, "paged out")
        lost = await worker_pid(paged.embedded, "vm")
        os.kill(lost, signal.SIGSTOP)
        detaching = asyncio.get_running_loop().create_task(hypervisor.detach("vm"))
        await asyncio.sleep(0.05)
        os.kill(lost, signal.SIGKILL)
        await detaching
        assert (await hypervisor.client("vm")).attachment == "none"
        assert (await hammer.quit()).wrong == 0
    await hypervisor.delete_client("vm")


async def test_a_scrub_is_begun_anew_by_the_next_worker(paged: PagedSet) -> None:
    await paged.write_all()
    hypervisor = paged.embedded.hypervisor
    recovered = await recoveries(paged.embedded)
    await hypervisor.start_scrub("client", ScrubStart(rate_bytes=256 << 10))
    await paged.until(lambda info: info.scrub is not None and info.scrub.compared_pages > 0, "scrubbed")
    await kill_and_wait(await worker_pid(paged.embedded, "client"))
    info = await paged.info()
    assert info.scrub is not None
    assert info.scrub.state is ScrubState.RUNNING
    await until_recovered(paged.embedded, recovered)
    await paged.until(lambda info: info.scrub is not None and info.scrub.compared_pages > 0, "scrubbed again")
    await hypervisor.stop_scrub("client")
    await kill_and_wait(await worker_pid(paged.embedded, "client"))
    await until_recovered(paged.embedded, recovered, 2)
    assert (await paged.info()).scrub is None
    await paged.verify_all()


def lasting_descriptors_of(pid: int) -> list[str]:
    return descriptors_of(pid, leave_out=control_connections())


async def settled_descriptors(pid: int) -> list[str]:
    """Return what a hypervisor has open once that stays: a spare worker takes its time to start."""
    found, since = lasting_descriptors_of(pid), time.monotonic()
    while time.monotonic() < since + SETTLED_SECONDS:
        await asyncio.sleep(0.05)
        if (now := lasting_descriptors_of(pid)) != found:
            found, since = now, time.monotonic()
    return found


async def until_descriptors(pid: int, wanted: list[str]) -> None:
    with suppress(TimeoutError):
        await condition(lambda: lasting_descriptors_of(pid) == wanted, 60)
    assert lasting_descriptors_of(pid) == wanted


async def test_nothing_is_left_open_after_workers_were_replaced(
    paged: PagedSet, hammer_program: Path
) -> None:
    hypervisor = paged.embedded.hypervisor
    pid = paged.embedded.hypervisor_pid
    assert pid is not None
    recovered = await recoveries(paged.embedded)
    async with hammering(hammer_program, 2048, threads=2) as hammer:
        hammers = descriptors_of(hammer.pid)
        before: list[str] = []
        for turn in range(1, 4):
            await hypervisor.attach("vm", ClientAttach(pid=hammer.pid, limit_bytes=MIB))
            await kill_and_wait(await worker_pid(paged.embedded, "vm"))
            await until_recovered(paged.embedded, recovered, 2 * turn)
            assert (await hammer.check()).wrong == 0
            await hypervisor.detach("vm")
            assert descriptors_of(hammer.pid) == hammers
            before = before or await settled_descriptors(pid)
            await until_descriptors(pid, before)
        assert (await hammer.quit()).wrong == 0
    await hypervisor.delete_client("vm")


async def test_a_worker_killed_while_it_attaches_leaves_the_process_as_it_was(
    paged: PagedSet, hammer_program: Path
) -> None:
    hypervisor = paged.embedded.hypervisor
    async with hammering(hammer_program, 2048) as hammer:
        before = descriptors_of(hammer.pid)
        recovered = await recoveries(paged.embedded)
        for vios in paged.embedded.vioses:
            paged.embedded.kill_vios(vios, signal.SIGSTOP)
        attaching = asyncio.get_running_loop().create_task(
            hypervisor.attach("vm", ClientAttach(pid=hammer.pid, limit_bytes=MIB))
        )
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not userfaultfds(hammer.pid):
                await asyncio.sleep(0.005)
        await kill_and_wait(await worker_pid(paged.embedded, "client"))
        for vios in paged.embedded.vioses:
            paged.embedded.kill_vios(vios, signal.SIGCONT)
        # Killed before it was told, or before it answered: attached by the next one, or not at all.
        with suppress(FarpageError):
            await attaching
            await hypervisor.detach("vm")
        await until_recovered(paged.embedded, recovered)
        assert descriptors_of(hammer.pid) == before
        await hypervisor.attach("vm", ClientAttach(pid=hammer.pid, limit_bytes=MIB))
        assert (await hammer.check()).wrong == 0
        await hypervisor.detach("vm")
        assert (await hammer.quit()).wrong == 0
    await paged.verify_all()
    await hypervisor.delete_client("vm")
