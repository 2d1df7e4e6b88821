"""What a client sees when the hypervisor's control process is killed, alone or with its data workers.

A wait at most; every byte is compared.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from farpage.api.remote import RemoteError
from farpage.attach.process import userfaultfds
from farpage.embedded.set import EmbeddedSet
from farpage.errors import FarpageError
from farpage.hypervisor.model import ClientAttach
from farpage.kernel.inject import call_in_process
from farpage.kernel.libc import syscall_numbers
from farpage.kernel.userfaultfd import CREATE_FLAGS
from tests.support.hammer import hammering
from tests.support.paged_set import PagedSet, RegionProcess, running_set, until_client
from tests.support.processes import (
    descriptors_of,
    kill_and_wait,
    until_no_injector,
    until_no_worker,
    worker_pid,
    workers_running,
)
from tests.support.scrape import Scrape

MIB = 1 << 20
PAGES = 2048


@pytest.fixture
async def embedded() -> AsyncIterator[EmbeddedSet]:
    async with running_set(workers=1) as started:
        yield started


async def kill_control(embedded: EmbeddedSet) -> None:
    """Kill the control process alone; it stays dead until it is started."""
    embedded.supervise_hypervisor(supervised=False)
    embedded.kill_hypervisor(signal.SIGKILL)
    await embedded.hypervisor_exited()


async def kill_all(embedded: EmbeddedSet) -> None:
    """Kill the control process and then its workers, which it so cannot replace."""
    await kill_control(embedded)
    for pid in workers_running(embedded):
        await kill_and_wait(pid)


@contextmanager
def vioses_stopped(embedded: EmbeddedSet) -> Iterator[None]:
    """Have no VIOS answer while the context lasts."""
    for vios in embedded.vioses:
        embedded.kill_vios(vios, signal.SIGSTOP)
    try:
        yield
    finally:
        for vios in embedded.vioses:
            embedded.kill_vios(vios, signal.SIGCONT)


async def alarms(embedded: EmbeddedSet) -> list[str]:
    return [alarm.kind for alarm in await embedded.hypervisor.alarms()]


async def test_clients_go_on_without_a_control_process_and_are_adopted(paged: PagedSet) -> None:
    embedded = paged.embedded
    worker = await worker_pid(embedded, "client")
    for turn in range(5):
        await kill_control(embedded)
        await paged.write_all()
        await paged.verify_all()
        await embedded.start_hypervisor()
        assert await worker_pid(embedded, "client") == worker, turn
        info = await paged.info()
        assert (info.attachment, info.limit_bytes) == ("region", 4 * MIB)
        await paged.verify_all()
    assert (await Scrape.of(embedded.document.hypervisor.control)).value("farpage_clients_adopted_total") == 1
    assert await paged.client.do("close") == "done"
    await until_client_is_gone(embedded, "client")


async def until_client_is_gone(embedded: EmbeddedSet, name: str) -> None:
    async with asyncio.timeout(30):
        while name in [client.name for client in await embedded.hypervisor.clients()]:
            await asyncio.sleep(0.02)


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


async def test_both_killed_with_page_outs_in_flight_lose_none(paged: PagedSet) -> None:
    embedded = paged.embedded
    await paged.write_all()
    active = await paged.active()
    paged.signal(active, signal.SIGSTOP)
    limiting = asyncio.get_running_loop().create_task(paged.set_limit(MIB))
    await paged.until(
        lambda info: any(path.vios == active and path.in_flight > 0 for path in info.paths), "in flight"
    )
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
    async with asyncio.timeout(30):
        while (await embedded.hypervisor.definition()).clients["client"].epoch < info.epoch:
            await asyncio.sleep(0.02)
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
    embedded.kill_hypervisor(signal.SIGSTOP)
    began = time.monotonic()
    while time.monotonic() < began + 3:
        await paged.verify_all()
    embedded.kill_hypervisor(signal.SIGCONT)
    await paged.until(lambda info: info.attachment == "region", "answered")
    assert await worker_pid(embedded, "client") == worker
    assert "worker_lost" not in await alarms(embedded)


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


async def test_an_attachment_that_was_cut_short_is_undone(
    embedded: EmbeddedSet, hammer_program: Path
) -> None:
    """The control process dies while the data worker opens the volume, and the worker then too."""
    async with hammering(hammer_program, PAGES) as hammer:
        before = descriptors_of(hammer.pid)
        with vioses_stopped(embedded):
            attaching = asyncio.get_running_loop().create_task(
                embedded.hypervisor.attach("vm", ClientAttach(pid=hammer.pid, limit_bytes=MIB))
            )
            async with asyncio.timeout(30):
                while not userfaultfds(hammer.pid):
                    await asyncio.sleep(0.005)
            await kill_all(embedded)
            with pytest.raises(FarpageError):
                await attaching
        await embedded.start_hypervisor()
        assert descriptors_of(hammer.pid) == before
        await embedded.hypervisor.attach("vm", ClientAttach(pid=hammer.pid, limit_bytes=MIB))
        await embedded.hypervisor.detach("vm")
        assert (await hammer.quit()).wrong == 0


async def test_an_attachment_that_its_worker_has_finished_alone_is_adopted(
    embedded: EmbeddedSet, hammer_program: Path
) -> None:
    async with hammering(hammer_program, PAGES) as hammer:
        (worker,) = [worker.pid for worker in (await embedded.hypervisor.info()).workers]
        os.kill(worker, signal.SIGSTOP)
        attaching = asyncio.get_running_loop().create_task(
            embedded.hypervisor.attach("vm", ClientAttach(pid=hammer.pid, limit_bytes=MIB))
        )
        record = embedded.layout.hypervisor_dir / "run" / "clients" / "vm.json"
        async with asyncio.timeout(30):
            while b'"order":{' not in (record.read_bytes() if record.exists() else b""):
                await asyncio.sleep(0.005)
        await asyncio.sleep(0.05)
        await kill_control(embedded)
        os.kill(worker, signal.SIGCONT)
        with pytest.raises(FarpageError):
            await attaching
        await embedded.start_hypervisor()
        info = await until_client(
            embedded.hypervisor, "vm", lambda info: info.attachment in ("process", "none"), "settled"
        )
        if info.attachment == "process":
            assert await worker_pid(embedded, "vm") == worker
            await embedded.hypervisor.detach("vm")
        assert (await hammer.quit()).wrong == 0


async def cut_detachment_short(
    embedded: EmbeddedSet, pid: int, kill: Callable[[EmbeddedSet], Awaitable[None]]
) -> None:
    """Attach a process, page some of it out, and `kill` whoever detaches it before its pages are back."""
    await embedded.hypervisor.attach("vm", ClientAttach(pid=pid, limit_bytes=MIB))
    await until_client(embedded.hypervisor, "vm", lambda info: info.on_device_bytes > 0, "paged out")
    with vioses_stopped(embedded):
        detaching = asyncio.get_running_loop().create_task(embedded.hypervisor.detach("vm"))
        await asyncio.sleep(0.05)
        await kill(embedded)
        with pytest.raises(FarpageError):
            await detaching


async def test_a_detachment_that_was_cut_short_can_be_repeated(
    embedded: EmbeddedSet, hammer_program: Path
) -> None:
    async with hammering(hammer_program, PAGES, threads=2) as hammer:
        before = descriptors_of(hammer.pid)
        await cut_detachment_short(embedded, hammer.pid, kill_all)
        await embedded.start_hypervisor()
        await until_client(embedded.hypervisor, "vm", lambda info: bool(info.paths), "paged again")
        await embedded.hypervisor.detach("vm")
        assert descriptors_of(hammer.pid) == before
        assert (await hammer.quit()).wrong == 0


async def test_a_detachment_that_its_worker_has_finished_alone_is_completed(
    embedded: EmbeddedSet, hammer_program: Path
) -> None:
    async with hammering(hammer_program, PAGES, threads=2) as hammer:
        before = descriptors_of(hammer.pid)
        await cut_detachment_short(embedded, hammer.pid, kill_control)
        await until_no_worker(embedded)
        assert userfaultfds(hammer.pid)
        await embedded.start_hypervisor()
        assert (await embedded.hypervisor.client("vm")).attachment == "none"
        assert descriptors_of(hammer.pid) == before
        assert (await hammer.quit()).wrong == 0


async def test_a_userfaultfd_that_nobody_knew_of_is_closed(
    embedded: EmbeddedSet, hammer_program: Path
) -> None:
    """The control process dies right after one was made in the process, before it stored which."""
    async with hammering(hammer_program, PAGES) as hammer:
        before = descriptors_of(hammer.pid)
        (worker,) = [worker.pid for worker in (await embedded.hypervisor.info()).workers]
        os.kill(worker, signal.SIGSTOP)
        attaching = asyncio.get_running_loop().create_task(
            embedded.hypervisor.attach("vm", ClientAttach(pid=hammer.pid, limit_bytes=MIB))
        )
        record = embedded.layout.hypervisor_dir / "run" / "clients" / "vm.json"
        async with asyncio.timeout(30):
            while not record.exists():
                await asyncio.sleep(0.001)
        intent = record.read_text()
        await kill_all(embedded)
        with pytest.raises(FarpageError):
            await attaching
        await until_no_injector(hammer.pid)
        if not userfaultfds(hammer.pid):
            outcome = call_in_process(hammer.pid, syscall_numbers().userfaultfd, CREATE_FLAGS)
            assert outcome.result >= 0
        record.write_text(intent)
        await embedded.start_hypervisor()
        assert descriptors_of(hammer.pid) == before
        assert not record.exists()
        assert (await hammer.quit()).wrong == 0


async def test_a_set_that_is_killed_whole_leaves_no_process_once_its_clients_are_gone(
    hammer_program: Path,
) -> None:
    async with running_set(workers=1) as embedded, hammering(hammer_program, PAGES) as hammer:
        await embedded.hypervisor.attach("vm", ClientAttach(pid=hammer.pid, limit_bytes=MIB))
        await kill_control(embedded)
        for vios in embedded.vioses:
            embedded.supervise_vios(vios, supervised=False)
            embedded.kill_vios(vios, signal.SIGKILL)
        async with asyncio.timeout(30):  # the spare, which has no clients, ends with the control process
            while len(workers_running(embedded)) > 1:
                await asyncio.sleep(0.02)
        hammer.process.kill()
        await until_no_worker(embedded)
        assert list((embedded.layout.hypervisor_dir / "run" / "workers").iterdir()) == []


async def test_descriptors_do_not_pile_up_over_restarts(embedded: EmbeddedSet, hammer_program: Path) -> None:
    region = await RegionProcess.start(embedded.layout.root, PAGES, MIB, "region")
    try:
        async with hammering(hammer_program, PAGES) as hammer:
            await embedded.hypervisor.attach("vm", ClientAttach(pid=hammer.pid, limit_bytes=MIB))
            processes = (hammer.pid, region.process.pid)
            before = [descriptors_of(pid) for pid in processes]
            counted: list[int] = []
            for _ in range(3):
                await kill_control(embedded)
                await embedded.start_hypervisor()
                assert (await hammer.check()).wrong == 0
                assert await region.do(f"write 0 {PAGES}") == "done"
                assert [descriptors_of(pid) for pid in processes] == before
                counted.append(len(descriptors_of(await worker_pid(embedded, "vm"))))
            assert max(counted) - min(counted) <= 2
            with pytest.raises(RemoteError):
                await embedded.hypervisor.detach("region")
            await embedded.hypervisor.detach("vm")
            assert (await hammer.quit()).wrong == 0
        assert await region.do("close") == "done"
    finally:
        await region.stop()
    await until_client_is_gone(embedded, "region")


async def test_a_client_whose_state_file_is_lost_waits_until_its_process_ends(
    embedded: EmbeddedSet, hammer_program: Path
) -> None:
    async with hammering(hammer_program, PAGES) as hammer:
        await embedded.hypervisor.attach("vm", ClientAttach(pid=hammer.pid, limit_bytes=MIB))
        await until_client(embedded.hypervisor, "vm", lambda info: info.on_device_bytes > 0, "paged out")
        await kill_all(embedded)
        (embedded.layout.hypervisor_dir / "run" / "clients" / "vm.state").unlink()
        await embedded.start_hypervisor()
        assert "not_recovered" in await alarms(embedded)
        # Its memory reads zeros to nobody, and nobody takes it for another client's.
        with pytest.raises(RemoteError):
            await embedded.hypervisor.attach("vm", ClientAttach(pid=hammer.pid, limit_bytes=MIB))
        hammer.process.kill()
        async with asyncio.timeout(30):
            while list((embedded.layout.hypervisor_dir / "run" / "clients").iterdir()):
                await asyncio.sleep(0.02)
    async with hammering(hammer_program, PAGES) as hammer:
        await embedded.hypervisor.attach("vm", ClientAttach(pid=hammer.pid, limit_bytes=MIB))
        await embedded.hypervisor.detach("vm")
        assert (await hammer.quit()).wrong == 0
