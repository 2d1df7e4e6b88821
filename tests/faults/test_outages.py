"""What clients see when a volume cannot be reached, or has no room: a wait or poison, never other bytes."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from farpage.api.remote import RemoteError
from farpage.embedded.set import EmbeddedSet
from farpage.hypervisor.model import ClientAttach, ClientInfo, PoolSet, ReadWay
from tests.integration.attach.scripted import Scripted
from tests.support.hammer import hammering
from tests.support.losses import heal
from tests.support.paged_set import PagedSet, paged_region, running_set, until_client
from tests.support.qemu_stand_in import QemuStandIn
from tests.support.scrape import Scrape

MIB = 1 << 20
PAGES = 4096
"""16 MiB."""
LIMIT_BYTES = 4 * MIB

REGION = """
import os
import numpy as np
from farpage import Region
region = Region({size}, name="client", limit_bytes={limit}, state={state!r})
content = np.frombuffer(region, np.uint8).reshape(-1, 4096)
content[:, 0] = 1 + np.arange(len(content)) % 250
pipe = os.pipe()
def read(page):
    try:
        os.write(pipe[1], content[page])
    except OSError as error:
        return error.strerror
    return os.read(pipe[0], 4096)[0]
def spoiled():
    return [page for page in range(len(content)) if read(page) not in (1 + page % 250, "Bad address")]
"""


async def kinds(embedded: EmbeddedSet, client: str = "client") -> list[str]:
    return [alarm.kind for alarm in await embedded.hypervisor.alarms() if alarm.client == client]


@pytest.mark.asyncio(loop_scope="module")
async def test_an_outage_of_every_path_is_told_with_its_end(paged: PagedSet) -> None:
    await paged.write_all()
    for vios in paged.embedded.vioses:
        paged.signal(vios, signal.SIGKILL)
    paged.client.send(f"verify 0 {paged.pages}")
    info = await paged.until(lambda info: info.without_path_seconds is not None, "without a path")
    info = await paged.until(lambda info: info.stalled_faults > 0, "an access waits")
    scrape = await Scrape.of(paged.embedded.document.hypervisor.control)
    assert scrape.value("farpage_client_without_path", client="client") == 1
    for vios in paged.embedded.vioses:
        await paged.restart(vios)
    assert await paged.client.answer() == "wrong 0"
    info = await paged.info()
    assert (info.without_path_seconds, info.counters.poisoned_pages) == (None, 0)
    alarms = await kinds(paged.embedded)
    assert alarms.index("no_path") < alarms.index("path_back")


@pytest.mark.asyncio(loop_scope="module")
async def test_page_ins_go_on_while_every_vios_is_away(paged: PagedSet) -> None:
    await paged.write_all()
    await paged.verify_all()  # now what is in memory is clean, and needs nobody to be paged out
    assert {path.reads for path in (await paged.info()).paths} == {ReadWay.DIRECT}
    for vios in paged.embedded.vioses:
        paged.signal(vios, signal.SIGKILL)
    await paged.until(lambda info: info.without_path_seconds is not None, "without a path")
    before = sum(path.direct_reads for path in (await paged.info()).paths)
    await paged.verify_all()
    after = (await paged.info()).paths
    assert sum(path.direct_reads for path in after) > before
    scrape = await Scrape.of(paged.embedded.document.hypervisor.control)
    read = max(after, key=lambda path: path.direct_reads)
    assert (
        scrape.value("farpage_path_direct_reads_total", client="client", vios=read.vios) == read.direct_reads
    )


@pytest.mark.asyncio(loop_scope="module")
async def test_a_guest_is_paused_by_qmp_while_no_path_works(
    shared_set: EmbeddedSet, hammer_program: Path
) -> None:
    await heal(shared_set)
    embedded = shared_set
    with tempfile.TemporaryDirectory(prefix="fpqmp-", dir="/tmp") as folder:
        socket = str(Path(folder) / "qmp")
        async with hammering(hammer_program, 1024) as hammer:
            wanted = ClientAttach(pid=hammer.pid, limit_bytes=MIB, qmp=socket)
            with pytest.raises(RemoteError) as refused:
                await embedded.hypervisor.attach("guest", wanted)
            assert (refused.value.code, socket in str(refused.value)) == ("qmp_failed", True)
            async with QemuStandIn(socket) as qemu:
                await embedded.hypervisor.attach("guest", wanted)
                for vios in embedded.vioses:
                    embedded.supervise_vios(vios, supervised=False)
                    embedded.kill_vios(vios, signal.SIGKILL)
                info = await until_client(
                    embedded.hypervisor, "guest", lambda info: info.guest_paused, "paused"
                )
                assert (info.qmp, info.without_path_seconds is not None) == (socket, True)
                assert qemu.status == "paused"
                for vios in embedded.vioses:
                    await embedded.vios_exited(vios)
                    await embedded.start_vios(vios)
                await until_client(
                    embedded.hypervisor, "guest", lambda info: not info.guest_paused, "running"
                )
                assert qemu.status == "running"
                alarms = await kinds(embedded, "guest")
                assert alarms.index("guest_paused") < alarms.index("guest_resumed")
                await embedded.hypervisor.detach("guest")
                assert (await hammer.quit()).wrong == 0


async def test_with_a_timeout_accesses_that_wait_for_a_path_fail_and_no_others() -> None:
    async with (
        # Without a RAM tier, which may keep the very page that is to be read.
        running_set(
            workers=1, no_path_timeout_seconds=0.3, direct_reads=False, ram_tier_percent=0
        ) as embedded,
        Scripted() as process,
    ):
        state = str(embedded.layout.root)
        await process.run(REGION.format(size=PAGES * 4096, limit=LIMIT_BYTES, state=state))

        def paged_out(info: ClientInfo) -> bool:
            return info.on_device_bytes > 8 * MIB

        await until_client(embedded.hypervisor, "client", paged_out, "paged out")
        for vios in embedded.vioses:
            embedded.supervise_vios(vios, supervised=False)
            embedded.kill_vios(vios, signal.SIGKILL)
        assert await process.run("read(0)") == "Bad address"
        info = await embedded.hypervisor.client("client")
        assert info.counters.poisoned_pages == 1
        alarms = await kinds(embedded)
        assert alarms.index("no_path") < alarms.index("poisoned")
        for vios in embedded.vioses:
            await embedded.vios_exited(vios)
            await embedded.start_vios(vios)
        assert await process.run("[read(0), read(1), spoiled()]") == ["Bad address", 2, []]


@pytest.fixture(scope="module")
def small_device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Mount a file system of 32 MiB; needs root."""
    path = tmp_path_factory.mktemp("device")
    mount = ["mount", "-t", "tmpfs", "-o", f"size={32 * MIB}", "farpage-test", str(path)]
    subprocess.run(mount, check=True)
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def small_set(small_device: Path) -> AsyncIterator[EmbeddedSet]:
    async with running_set(workers=1, devices=(f"dir:{small_device}",)) as started:
        yield started


@pytest_asyncio.fixture(loop_scope="module")
async def small(small_set: EmbeddedSet) -> AsyncIterator[PagedSet]:
    """A client on the small device."""
    await heal(small_set)
    async with paged_region(small_set, PAGES, LIMIT_BYTES) as paged:
        yield paged


@pytest.mark.asyncio(loop_scope="module")
async def test_on_a_full_device_pages_stay_in_memory_until_there_is_room(
    small: PagedSet, small_device: Path
) -> None:
    embedded = small.embedded
    await embedded.hypervisor.set_pool(PoolSet(size_bytes=64 * MIB))
    ballast = small_device / "ballast"
    ballast.write_bytes(bytes(26 * MIB))
    writing = asyncio.create_task(small.write_all())
    await small.until_alarm("device_full")
    # The pool has room: the client goes on without paging.
    await writing
    info = await small.until(lambda info: info.resident_bytes > LIMIT_BYTES + 4 * MIB, "above its limit")
    assert (info.device_full, info.limit_bytes) == (True, LIMIT_BYTES)
    await small.verify_all()
    scrape = await Scrape.of(embedded.document.hypervisor.control)
    assert scrape.value("farpage_client_device_full", client="client") == 1
    assert scrape.value("farpage_client_limit_bytes", client="client") > LIMIT_BYTES

    ballast.unlink()
    await small.until(lambda info: not info.device_full, "room")
    await small.until(lambda info: info.resident_bytes <= LIMIT_BYTES, "within its limit")
    await small.verify_all()
    alarms = await kinds(embedded)
    assert alarms.index("device_full") < alarms.index("device_room")
    assert "poisoned" not in alarms


@pytest.mark.asyncio(loop_scope="module")
async def test_on_a_full_device_and_in_a_full_pool_accesses_wait_for_room(
    small: PagedSet, small_device: Path
) -> None:
    await small.embedded.hypervisor.set_pool(PoolSet(size_bytes=LIMIT_BYTES))
    ballast = small_device / "ballast"
    ballast.write_bytes(bytes(26 * MIB))
    small.client.send(f"write 0 {PAGES}")
    await small.until(lambda info: info.device_full, "full")
    info = await small.until(lambda info: info.stalled_faults > 0, "an access waits")
    assert info.resident_bytes < LIMIT_BYTES + MIB
    ballast.unlink()
    assert await small.client.answer() == "done"
    await small.verify_all()
