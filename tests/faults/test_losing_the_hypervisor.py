"""What a client sees when the hypervisor's control process is killed, alone or with its data workers.

A wait at most; every byte is compared.
"""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from pathlib import Path

import pytest

from farpage.hypervisor.model import ClientAttach
from tests.support.hammer import hammering
from tests.support.losses import alarms, kill_all, kill_control, until_client_is_gone
from tests.support.paged_set import DEADLINE_SECONDS, PagedSet, running_set
from tests.support.processes import (
    kill_and_wait,
    until_no_worker,
    worker_pid,
    workers_running,
)
from tests.support.scrape import Scrape

pytestmark = pytest.mark.asyncio(loop_scope="module")

MIB = 1 << 20
PAGES = 2048


async def test_clients_go_on_without_a_control_process_and_are_adopted(paged: PagedSet) -> None:
    embedded = paged.embedded
    worker = await worker_pid(embedded, "client")
    workers = len((await embedded.hypervisor.info()).workers)
    for turn in range(3):
        await kill_control(embedded)
        await paged.write_all()
        await paged.verify_all()
        await embedded.start_hypervisor()
        assert await worker_pid(embedded, "client") == worker, turn
        assert len((await embedded.hypervisor.info()).workers) == workers
        info = await paged.info()
        assert (info.attachment, info.limit_bytes) == ("region", 4 * MIB)
        await paged.verify_all()
    assert (await Scrape.of(embedded.document.hypervisor.control)).value("farpage_clients_adopted_total") == 1
    assert await paged.client.do("close") == "done"
    await until_client_is_gone(embedded, "client")


async def test_a_killed_control_process_and_its_workers_are_recovered(
    paged: PagedSet, hammer_program: Path
) -> None:
    embedded = paged.embedded
    async with hammering(hammer_program, PAGES, threads=2) as hammer:
        await embedded.hypervisor.attach("vm", ClientAttach(pid=hammer.pid, limit_bytes=MIB))
        await paged.write_all()
        for _ in range(2):
            await kill_all(embedded)
            paged.client.send(f"verify 0 {paged.pages}")
            await embedded.start_hypervisor()
            assert await paged.client.answer() == "wrong 0"
            assert (await hammer.check()).wrong == 0
            assert (await alarms(embedded)).count("worker_recovered") == 2
            await paged.write_all()
        await embedded.hypervisor.detach("vm")
        assert (await hammer.quit()).wrong == 0
    await embedded.hypervisor.delete_client("vm")
    await paged.verify_all()
    assert await paged.client.do("close") == "done"
    await until_client_is_gone(embedded, "client")


async def test_the_spare_worker_goes_on_with_clients_when_both_are_killed(
    paged: PagedSet, hammer_program: Path
) -> None:
    embedded = paged.embedded
    async with hammering(hammer_program, PAGES, threads=2) as hammer:
        await embedded.hypervisor.attach("vm", ClientAttach(pid=hammer.pid, limit_bytes=MIB))
        await paged.write_all()
        working = [worker.pid for worker in (await embedded.hypervisor.info()).workers]
        await kill_control(embedded)
        for pid in working:
            await kill_and_wait(pid)
        # There is no control process.
        await paged.verify_all()
        await paged.write_all()
        assert (await hammer.check()).wrong == 0
        (heir,) = workers_running(embedded)
        await embedded.start_hypervisor()
        assert {await worker_pid(embedded, client) for client in ("client", "vm")} == {heir}
        assert (await alarms(embedded)).count("worker_recovered") == 2
        assert len((await embedded.hypervisor.info()).workers) == len(working)
        await embedded.hypervisor.detach("vm")
        assert (await hammer.quit()).wrong == 0
    await embedded.hypervisor.delete_client("vm")
    await paged.verify_all()


async def test_both_killed_with_page_outs_in_flight_lose_none(paged: PagedSet) -> None:
    embedded = paged.embedded
    await paged.write_all()
    active = await paged.active()
    paged.signal(active, signal.SIGSTOP)
    limiting = asyncio.get_running_loop().create_task(paged.set_limit(MIB))
    await paged.until_sent(active)
    await limiting
    await kill_all(embedded)
    paged.signal(active, signal.SIGCONT)
    await embedded.start_hypervisor()
    await paged.verify_all()
    info = await paged.until(lambda info: info.resident_bytes <= MIB, "within the limit")
    assert info.limit_bytes == MIB
    await paged.verify_all()


async def test_both_killed_without_any_vios_wait_for_one(paged: PagedSet) -> None:
    embedded = paged.embedded
    await paged.write_all()
    for vios in embedded.vioses:
        paged.signal(vios, signal.SIGKILL)
    await kill_all(embedded)
    paged.client.send(f"verify 0 {paged.pages}")
    await embedded.start_hypervisor()
    for vios in embedded.vioses:
        await paged.restart(vios)
    assert await paged.client.answer() == "wrong 0"
    await paged.until(lambda info: info.attachment == "region", "known again")


async def test_what_happened_without_a_control_process_is_made_up_for(paged: PagedSet) -> None:
    embedded = paged.embedded
    await paged.write_all()
    active = await paged.active()
    before = (await paged.info()).epoch
    await kill_control(embedded)
    paged.signal(active, signal.SIGKILL)
    await paged.verify_all()
    await embedded.start_hypervisor()
    info = await paged.info()
    assert info.epoch > before
    async with asyncio.timeout(DEADLINE_SECONDS):
        while (await embedded.hypervisor.definition()).clients["client"].epoch < info.epoch:
            await asyncio.sleep(0.05)
    assert "path_failed" in await alarms(embedded)
    await paged.restart(active)


async def test_a_client_that_ends_without_a_control_process_takes_its_worker_with_it(paged: PagedSet) -> None:
    embedded = paged.embedded
    await kill_control(embedded)
    assert workers_running(embedded)
    await paged.client.stop()
    await until_no_worker(embedded)
    clients = embedded.layout.hypervisor_dir / "run" / "clients"
    assert [path.suffix for path in clients.iterdir()] == [".json"]
    await embedded.start_hypervisor()
    await until_client_is_gone(embedded, "client")
    assert list(clients.iterdir()) == []


async def test_a_region_that_is_closed_without_a_control_process_is_forgotten(paged: PagedSet) -> None:
    embedded = paged.embedded
    await paged.write_all()
    await kill_control(embedded)
    assert await paged.client.do("close") == "done"
    await embedded.start_hypervisor()
    await until_client_is_gone(embedded, "client")


async def test_a_control_process_stopped_for_long_takes_no_worker_for_hung(paged: PagedSet) -> None:
    embedded = paged.embedded
    worker = await worker_pid(embedded, "client")
    before = (await alarms(embedded)).count("worker_lost")
    embedded.kill_hypervisor(signal.SIGSTOP)
    began = time.monotonic()
    while time.monotonic() < began + 3:
        await paged.verify_all()
    embedded.kill_hypervisor(signal.SIGCONT)
    await paged.until(lambda info: info.attachment == "region", "answered")
    assert await worker_pid(embedded, "client") == worker
    assert (await alarms(embedded)).count("worker_lost") == before


async def test_a_second_control_process_is_kept_out_of_the_run_folder(
    paged: PagedSet, tmp_path: Path
) -> None:
    embedded = paged.embedded
    run_folder = embedded.layout.hypervisor_dir / "run"
    vioses = [f"--vios={name}={vios.control}" for name, vios in embedded.document.vioses.items()]
    second = await asyncio.create_subprocess_exec(
        *(
            sys.executable,
            "-m",
            "farpage",
            "hypervisor",
            "run",
            "second",
            f"--dir={tmp_path}",
            f"--run-dir={run_folder}",
            *vioses,
        ),
        stderr=asyncio.subprocess.PIPE,
    )
    _, words = await second.communicate()
    assert second.returncode == 4
    assert b"runs with run folder" in words
    await paged.verify_all()


async def test_a_set_that_is_killed_whole_leaves_no_process_once_its_clients_are_gone(
    hammer_program: Path,
) -> None:
    async with running_set(workers=1) as embedded, hammering(hammer_program, PAGES) as hammer:
        await embedded.hypervisor.attach("vm", ClientAttach(pid=hammer.pid, limit_bytes=MIB))
        await kill_control(embedded)
        for vios in embedded.vioses:
            embedded.supervise_vios(vios, supervised=False)
            embedded.kill_vios(vios, signal.SIGKILL)
        hammer.process.kill()
        await until_no_worker(embedded)
        assert list((embedded.layout.hypervisor_dir / "run" / "workers").iterdir()) == []
