"""Attachments and detachments that the hypervisor's processes do not live to finish: completed or undone.

The tests share one set, which each leaves as it was.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from farpage.api.remote import RemoteError
from farpage.attach.process import userfaultfds
from farpage.attach.retake import retake
from farpage.definition.model import PAGE_BYTES
from farpage.embedded.set import EmbeddedSet
from farpage.errors import FarpageError
from farpage.hypervisor.attaching import intent
from farpage.hypervisor.model import ClientAttach
from farpage.kernel.inject import call_in_process
from farpage.kernel.libc import syscall_numbers
from farpage.kernel.userfaultfd import CREATE_FLAGS
from farpage.pager.attachmentrecord import clients_folder, read_record, record_path, save_record
from tests.support.commands import condition
from tests.support.hammer import hammering
from tests.support.losses import alarms, heal, kill_all, kill_control, until_client_is_gone, vioses_stopped
from tests.support.paged_set import DEADLINE_SECONDS, RegionProcess, running_set, until_client
from tests.support.processes import descriptors_of, kill_and_wait, until_no_worker, worker_pid

pytestmark = pytest.mark.asyncio(loop_scope="module")

MIB = 1 << 20
PAGES = 2048


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_set() -> AsyncIterator[EmbeddedSet]:
    # With direct reads a worker could bring pages back whose VIOS are stopped.
    async with running_set(workers=1, direct_reads=False) as started:
        yield started


@pytest_asyncio.fixture(loop_scope="module")
async def embedded(shared_set: EmbeddedSet) -> EmbeddedSet:
    await heal(shared_set)
    return shared_set


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
            async with asyncio.timeout(DEADLINE_SECONDS):
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
        async with asyncio.timeout(DEADLINE_SECONDS):
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


async def lose_worker_that_has_detached(embedded: EmbeddedSet) -> None:
    """End the client's worker as if that were right after it has detached the memory."""
    worker = await worker_pid(embedded, "vm")
    os.kill(worker, signal.SIGSTOP)
    record = read_record(clients_folder(embedded.layout.hypervisor_dir / "run"), "vm")
    assert record is not None
    assert record.memory is not None
    memory = retake(record.memory)
    assert memory is not None
    memory.unregister()
    memory.close_descriptors()
    await kill_and_wait(worker)


async def test_a_process_that_its_worker_had_detached_is_not_paged_by_the_next_one(
    embedded: EmbeddedSet, hammer_program: Path
) -> None:
    async with hammering(hammer_program, PAGES) as hammer:
        before = descriptors_of(hammer.pid)
        whole = PAGES * PAGE_BYTES
        await embedded.hypervisor.attach("vm", ClientAttach(pid=hammer.pid, limit_bytes=whole))
        await lose_worker_that_has_detached(embedded)
        await until_client(embedded.hypervisor, "vm", lambda info: info.attachment == "none", "let go of")
        await condition(lambda: descriptors_of(hammer.pid) == before, DEADLINE_SECONDS)
        assert (await hammer.quit()).wrong == 0


async def test_a_detachment_whose_worker_ended_before_it_could_say_so_succeeds(
    embedded: EmbeddedSet, hammer_program: Path
) -> None:
    async with hammering(hammer_program, PAGES) as hammer:
        before = descriptors_of(hammer.pid)
        await embedded.hypervisor.attach("vm", ClientAttach(pid=hammer.pid, limit_bytes=PAGES * PAGE_BYTES))
        os.kill(await worker_pid(embedded, "vm"), signal.SIGSTOP)
        detaching = asyncio.get_running_loop().create_task(embedded.hypervisor.detach("vm"))
        await asyncio.sleep(0.05)
        await lose_worker_that_has_detached(embedded)
        assert (await detaching).attachment == "none"
        assert descriptors_of(hammer.pid) == before
        assert (await hammer.quit()).wrong == 0


async def test_a_userfaultfd_that_nobody_knew_of_is_closed(
    embedded: EmbeddedSet, hammer_program: Path
) -> None:
    """The control process dies right after one was made in the process, before it stored which."""
    async with hammering(hammer_program, PAGES) as hammer:
        before = descriptors_of(hammer.pid)
        await kill_all(embedded)
        clients = clients_folder(embedded.layout.hypervisor_dir / "run")
        record = intent("vm", hammer.pid)
        assert record is not None
        save_record(clients, record)
        made = await asyncio.to_thread(
            call_in_process, hammer.pid, syscall_numbers().userfaultfd, CREATE_FLAGS
        )
        assert userfaultfds(hammer.pid) == (made.result,)
        await embedded.start_hypervisor()
        assert descriptors_of(hammer.pid) == before
        assert not record_path(clients, "vm").exists()
        assert (await hammer.quit()).wrong == 0


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
        async with asyncio.timeout(DEADLINE_SECONDS):
            while list((embedded.layout.hypervisor_dir / "run" / "clients").iterdir()):
                await asyncio.sleep(0.05)
    async with hammering(hammer_program, PAGES) as hammer:
        await embedded.hypervisor.attach("vm", ClientAttach(pid=hammer.pid, limit_bytes=MIB))
        await embedded.hypervisor.detach("vm")
        assert (await hammer.quit()).wrong == 0
