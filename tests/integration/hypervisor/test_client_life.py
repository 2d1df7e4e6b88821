"""Clients from their making to their end, on a running set that the tests share."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from farpage.api.remote import RemoteError
from farpage.definition.model import PAGE_BYTES
from farpage.embedded.set import EmbeddedSet
from farpage.hypervisor.model import Attachment, ClientAttach, ClientCreate, ClientInfo, PoolSet
from farpage.kernel.process import read_descriptors
from tests.integration.attach.scripted import Scripted
from tests.support.hammer import hammering
from tests.support.paged_set import DEADLINE_SECONDS, RegionProcess, running_set, until_client

pytestmark = pytest.mark.asyncio(loop_scope="module")

MIB = 1 << 20
PAGES = 1024


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def embedded() -> AsyncIterator[EmbeddedSet]:
    async with running_set(workers=2) as running:
        yield running


async def volumes(embedded: EmbeddedSet) -> set[str]:
    """Return the volumes that any VIOS lists."""
    return {volume.name for vios in embedded.vioses.values() for volume in await vios.volumes()}


async def until_gone(embedded: EmbeddedSet, *names: str) -> None:
    """Wait until clients and their volumes are gone."""
    async with asyncio.timeout(60):
        while {client.name for client in await embedded.hypervisor.clients()} & set(names):
            await asyncio.sleep(0.05)
        while await volumes(embedded) & set(names):
            await asyncio.sleep(0.05)


async def until_within(embedded: EmbeddedSet, name: str, limit_bytes: int) -> None:
    """Wait until so much of a client has been paged out that it is within a limit."""

    def within(info: ClientInfo) -> bool:
        return info.on_device_bytes > 0 and info.resident_bytes <= limit_bytes

    await until_client(embedded.hypervisor, name, within, f"within {limit_bytes} bytes")


def descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


async def test_a_client_is_made_with_its_volume_and_deleted_with_it(embedded: EmbeddedSet) -> None:
    wanted = ClientCreate(
        name="made", memory_bytes=8 * MIB, limit_bytes=2 * MIB, weight=7, entitlement_bytes=MIB
    )
    info = await embedded.hypervisor.create_client(wanted)
    assert (info.attachment, info.pid, info.worker) == (Attachment.NONE, None, None)
    assert (info.memory_bytes, info.limit_bytes) == (8 * MIB, 2 * MIB)
    assert (info.weight, info.entitlement_bytes) == (7, MIB)
    assert info in await embedded.hypervisor.clients()
    for vios in embedded.vioses.values():
        assert ("made", 8 * MIB) in [(volume.name, volume.size_bytes) for volume in await vios.volumes()]
    await embedded.hypervisor.delete_client("made")
    assert "made" not in [client.name for client in await embedded.hypervisor.clients()]
    assert "made" not in await volumes(embedded)


async def test_a_running_process_is_paged_and_then_left_as_it_was(
    embedded: EmbeddedSet, hammer_program: Path
) -> None:
    hypervisor = embedded.hypervisor
    async with hammering(hammer_program, PAGES) as hammer:
        before = read_descriptors(hammer.pid)
        for limit_bytes in (MIB, 2 * MIB):
            info = await hypervisor.attach("victim", ClientAttach(pid=hammer.pid, limit_bytes=limit_bytes))
            assert (info.attachment, info.pid) == (Attachment.PROCESS, hammer.pid)
            assert (info.memory_bytes, info.limit_bytes) == (PAGES * PAGE_BYTES, limit_bytes)
            await until_within(embedded, "victim", limit_bytes)
            assert (await hammer.check()).wrong == 0
            info = await hypervisor.detach("victim")
            assert (info.attachment, info.resident_bytes, info.paths) == (Attachment.NONE, 0, ())
            assert read_descriptors(hammer.pid) == before
            assert (await hammer.check()).wrong == 0
        assert "victim" in await volumes(embedded)
        await hypervisor.delete_client("victim")
        assert (await hammer.quit()).wrong == 0


async def test_a_client_made_for_more_memory_takes_a_smaller_process(
    embedded: EmbeddedSet, hammer_program: Path
) -> None:
    hypervisor = embedded.hypervisor
    await hypervisor.create_client(ClientCreate(name="roomy", memory_bytes=64 * MIB, limit_bytes=MIB))
    async with hammering(hammer_program, PAGES) as hammer:
        info = await hypervisor.attach("roomy", ClientAttach(pid=hammer.pid, memory="ram"))
        assert info.limit_bytes == MIB
        await until_within(embedded, "roomy", MIB)
        pool = await hypervisor.set_pool(PoolSet(client="roomy", limit_bytes=1 << 40))
        assert [member.limit_bytes for member in pool.members] == [PAGES * PAGE_BYTES]
        await hypervisor.detach("roomy")
        assert (await hammer.quit()).wrong == 0
    await hypervisor.delete_client("roomy")


async def test_a_region_is_a_client_as_long_as_it_is_open(embedded: EmbeddedSet) -> None:
    region = await RegionProcess.start(embedded.layout.root, PAGES, MIB, "region")
    try:
        info = await embedded.hypervisor.client("region")
        assert (info.attachment, info.pid) == (Attachment.REGION, region.process.pid)
        with pytest.raises(RemoteError, match=r"close\(\) on the region"):
            await embedded.hypervisor.delete_client("region")
        assert await region.do(f"write 0 {PAGES}") == "done"
        assert await region.do(f"verify 0 {PAGES}") == "wrong 0"
        assert "region" in await volumes(embedded)
        assert await region.do("close") == "done"
        assert "region" not in [client.name for client in await embedded.hypervisor.clients()]
        assert "region" not in await volumes(embedded)
    finally:
        await region.stop()


async def test_a_region_of_a_client_made_before_leaves_it_there(embedded: EmbeddedSet) -> None:
    await embedded.hypervisor.create_client(ClientCreate(name="kept", memory_bytes=PAGES * PAGE_BYTES))
    region = await RegionProcess.start(embedded.layout.root, PAGES, MIB, "kept")
    try:
        with pytest.raises(RemoteError, match="close"):
            await embedded.hypervisor.detach("kept")
        assert await region.do("close") == "done"
    finally:
        await region.stop()
    assert (await embedded.hypervisor.client("kept")).attachment is Attachment.NONE
    await embedded.hypervisor.delete_client("kept")


async def test_processes_that_are_killed_leave_nothing_behind(
    embedded: EmbeddedSet, hammer_program: Path
) -> None:
    hypervisor = embedded.hypervisor
    names = [f"killed{number}" for number in range(5)]

    async def round_of_regions() -> None:
        state = embedded.layout.root
        regions = await asyncio.gather(*(RegionProcess.start(state, PAGES, MIB, name) for name in names))
        assert await asyncio.gather(*(region.do(f"write 0 {PAGES}") for region in regions)) == ["done"] * 5
        for region in regions:
            await region.stop()
        await until_gone(embedded, *names)

    async def round_of_processes() -> None:
        for name in names:
            async with hammering(hammer_program, PAGES) as hammer:
                await hypervisor.attach(name, ClientAttach(pid=hammer.pid, limit_bytes=MIB))
                await until_within(embedded, name, MIB)
            await until_client(hypervisor, name, lambda info: info.attachment == "none", "let go")
            await hypervisor.delete_client(name)
        assert not await volumes(embedded) & set(names)

    await round_of_regions()
    await round_of_processes()
    pids = [worker.pid for worker in (await hypervisor.info()).workers]
    before = [descriptors(pid) for pid in pids]
    await round_of_regions()
    await round_of_processes()
    async with asyncio.timeout(60):
        while any(descriptors(pid) > most for pid, most in zip(pids, before, strict=True)):
            await asyncio.sleep(0.05)
    assert (await hypervisor.pool()).members == ()


async def test_a_name_is_free_again_when_its_region_was_closed_or_its_process_killed(
    embedded: EmbeddedSet,
) -> None:
    arguments = f"{PAGES * PAGE_BYTES}, name='again', limit_bytes={MIB}, state={str(embedded.layout.root)!r}"
    async with Scripted() as first:
        await first.run("from farpage import Region")
        for _ in range(5):
            await first.run(f"Region({arguments}).close()")
        await first.run(f"region = Region({arguments})")
        first.process.kill()
        await first.process.wait()
    async with Scripted() as second:
        await second.run("from farpage import Region\nfrom farpage.attach.region import RegionRefused")
        # The hypervisor may not have noticed the end yet.
        await second.run(
            "region = None\n"
            "while region is None:\n"
            f"    try: region = Region({arguments})\n"
            "    except RegionRefused as error: assert error.error_code == 'client_attached', error"
        )
        await second.run(f"content = bytes(range(256)) * {PAGES * 16}; region[:] = content")
        await until_within(embedded, "again", MIB)
        assert await second.run("region[:] == content")
        await second.run("region.close()")
    await until_gone(embedded, "again")


async def test_a_hypervisor_ends_that_is_stopped_while_a_region_is_attached() -> None:
    async with running_set(workers=1) as embedded:
        await embedded.hypervisor.create_client(ClientCreate(name="late", memory_bytes=PAGES * PAGE_BYTES))
        worker = (await embedded.hypervisor.info()).workers[0].pid
        os.kill(worker, signal.SIGSTOP)
        starting = asyncio.create_task(RegionProcess.start(embedded.layout.root, PAGES, MIB, "late"))
        record = embedded.layout.hypervisor_dir / "run" / "clients" / "late.json"
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not (record.exists() and b'"order":{' in record.read_bytes()):
                await asyncio.sleep(0.002)
            embedded.supervise_hypervisor(supervised=False)
            embedded.kill_hypervisor(signal.SIGTERM)
            while b"hypervisor_stopping" not in (embedded.layout.hypervisor_dir / "log").read_bytes():
                await asyncio.sleep(0.002)
            os.kill(worker, signal.SIGCONT)
            await embedded.hypervisor_exited()
        (process,) = await asyncio.gather(starting, return_exceptions=True)
        if isinstance(process, RegionProcess):
            await process.stop()
