"""A client that one hypervisor releases and another one adopts."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from farpage.api.remote import RemoteError
from farpage.attach.region import Region, RegionRefused
from farpage.embedded.control import HypervisorControl
from farpage.embedded.set import EmbeddedSet
from farpage.hypervisor.model import ClientAdopt, ClientAttach, ClientInfo, ClientRelease
from tests.support.hammer import hammering
from tests.support.paged_set import DEADLINE_SECONDS, RegionProcess, running_set, until_client
from tests.support.scrape import Scrape
from tests.support.second_hypervisor import Other, second_hypervisor

pytestmark = pytest.mark.asyncio(loop_scope="module")

PAGES = 1024
PAGE_BYTES = 4096
LIMIT_BYTES = 1 << 20
FORCE = ClientRelease(force=True)


@dataclass
class Two:
    """Two hypervisors on the same two VIOSes."""

    embedded: EmbeddedSet
    other: Other

    @property
    def first(self) -> HypervisorControl:
        return self.embedded.hypervisor

    @property
    def second(self) -> HypervisorControl:
        return self.other.control

    async def region(self, name: str, version: int = 0) -> RegionProcess:
        """Start a process with a region at the first hypervisor."""
        return await RegionProcess.start(self.embedded.layout.root, PAGES, LIMIT_BYTES, name, version)

    async def second_region(self, name: str, version: int = 0) -> RegionProcess:
        """Start one at the second."""
        return await RegionProcess.start(self.other.state, PAGES, LIMIT_BYTES, name, version)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def two() -> AsyncIterator[Two]:
    async with running_set(workers=1) as embedded, second_hypervisor(embedded) as other:
        yield Two(embedded, other)


async def refused(request: object) -> RemoteError:
    with pytest.raises(RemoteError) as caught:
        await request  # type: ignore[misc]
    return caught.value


async def refused_region(state: Path, name: str, pages: int) -> str:
    with pytest.raises(RegionRefused) as caught:
        await asyncio.to_thread(Region, pages * PAGE_BYTES, name=name, state=state)
    return str(caught.value.error_code)


def released_by(info: ClientInfo) -> tuple[str, str] | None:
    return (info.released.hypervisor, info.released.adopter) if info.released else None


async def test_a_region_goes_to_another_hypervisor_without_one_page_read_back(two: Two) -> None:
    first = await two.region("moving")
    await first.do(f"write 0 {PAGES}")
    before = (await two.first.client("moving")).counters.page_in_pages
    released = await two.first.release("moving", FORCE)
    assert (released.attachment, released_by(released)) == ("none", ("hypervisor", ""))
    adopted = await two.second.adopt("moving", ClientAdopt())
    assert released_by(adopted) == ("hypervisor", "other")
    assert adopted.epoch > released.epoch
    second = await two.second_region("moving", version=1)
    try:
        info = await two.second.client("moving")
        assert (info.on_device_bytes, info.resident_bytes, before) == (PAGES * PAGE_BYTES, 0, before)
        assert info.counters.page_in_pages == 0
        assert info.released is None
        for state, steps in ((two.embedded.document, (1, 0, 0)), (two.other.document, (0, 1, 1))):
            scrape = await Scrape.of(state.hypervisor.control)
            for step, count in zip(("released", "adopted", "started"), steps, strict=True):
                assert scrape.value("farpage_handovers_total", step=step) == count
        assert await second.do(f"verify 0 {PAGES}") == "wrong 0"
        assert await second.do(f"write 0 {PAGES}") == "done"
        assert await second.do(f"verify 0 {PAGES}") == "wrong 0"
        # The first process waits at what it touches, until it lets its region go.
        first.send("verify 0 1")
        assert (await two.second.client("moving")).fenced == ""
    finally:
        await second.do("close")
        await first.stop()
    await two.second.delete_client("moving")


async def test_a_client_that_is_released_is_nobody_s_until_it_is_adopted(two: Two) -> None:
    process = await two.region("idle")
    running = await refused(two.first.release("idle", ClientRelease()))
    assert (running.code, "kill -STOP" in running.advice) == ("client_runs", True)
    assert (await refused(two.second.adopt("idle", ClientAdopt()))).code == "client_not_released"
    process.process.send_signal(signal.SIGSTOP)
    await two.first.release("idle", ClientRelease())
    await process.stop()
    await until_client(two.second, "idle", lambda info: info.released is not None, "known as released")
    for hypervisor in (two.first, two.second):
        for request in (
            hypervisor.release("idle", FORCE),
            hypervisor.delete_client("idle"),
            hypervisor.attach("idle", ClientAttach(pid=os.getpid())),
        ):
            error = await refused(request)
            assert (error.code, "farpage client adopt idle" in error.advice) in (
                ("client_released", True),
                ("no_shared_memory", False),
            )
        assert (await refused(hypervisor.detach("idle"))).code == "client_not_attached"
    assert await refused_region(two.embedded.layout.root, "idle", PAGES) == "client_released"
    # Of two that want it at the same moment one gets it, and by force the other one does.
    claims = await asyncio.gather(
        two.first.adopt("idle", ClientAdopt()),
        two.second.adopt("idle", ClientAdopt()),
        return_exceptions=True,
    )
    assert [getattr(claim, "code", "taken") for claim in claims].count("taken") == 1
    await two.second.adopt("idle", ClientAdopt(force=True))
    assert released_by(await two.second.client("idle")) == ("hypervisor", "other")
    assert (await refused(two.first.delete_client("idle"))).code in ("client_released", "client_elsewhere")
    assert "adopted by other" in await farpage(two.other.state, "client", "list")
    await two.second.delete_client("idle")
    assert await stored_handovers(two.embedded) == 0


async def test_memory_of_another_size_leaves_an_adopted_client_to_the_next_one(two: Two) -> None:
    first = await two.region("sized")
    await first.do(f"write 0 {PAGES}")
    await two.first.release("sized", FORCE)
    await first.stop()
    await two.second.adopt("sized", ClientAdopt())
    assert await stored_handovers(two.embedded) == 2
    assert await refused_region(two.other.state, "sized", PAGES // 2) == "handover_mismatch"
    assert released_by(await two.second.client("sized")) == ("hypervisor", "other")
    second = await two.second_region("sized", version=1)
    assert await second.do(f"verify 0 {PAGES}") == "wrong 0"
    assert await stored_handovers(two.embedded) == 0
    assert await second.do("close") == "done"
    await two.second.delete_client("sized")


async def test_a_destination_that_fails_with_the_vioses_leaves_an_adopted_client_to_the_next_one(
    two: Two,
) -> None:
    name = "failed"
    first = await two.region(name)
    await first.do(f"write 0 {PAGES}")
    await two.first.release(name, FORCE)
    await first.stop()
    await two.second.adopt(name, ClientAdopt())
    claimed_by = (await two.second.definition()).clients[name].owner
    worker = (await two.second.info()).workers[0].pid
    os.kill(worker, signal.SIGSTOP)
    failing = asyncio.create_task(refused_region(two.other.state, name, PAGES))
    async with asyncio.timeout(DEADLINE_SECONDS):
        # Its claim has ended the release, and its worker is about to be told.
        while (await two.second.definition()).clients[name].owner == claimed_by:
            await asyncio.sleep(0.01)
    for vios in two.embedded.vioses:
        two.embedded.supervise_vios(vios, supervised=False)
        two.embedded.kill_vios(vios, signal.SIGKILL)
    os.kill(worker, signal.SIGCONT)
    assert await failing == "no_path"
    await two.other.restart()
    for vios in two.embedded.vioses:
        await two.embedded.vios_exited(vios)
        await two.embedded.start_vios(vios)
        two.embedded.supervise_vios(vios, supervised=True)
    await until_client(
        two.second, name, lambda info: released_by(info) == ("hypervisor", "other"), "released again"
    )
    await two.first.refresh_devices()  # it may not have heard of the VIOSes' return yet
    second = await two.second_region(name, version=1)
    assert await second.do(f"verify 0 {PAGES}") == "wrong 0"
    assert await second.do("close") == "done"
    await two.second.delete_client(name)


async def test_a_client_that_began_with_a_release_is_not_released_when_its_control_process_was_killed(
    two: Two, hammer_program: Path
) -> None:
    name = "begun"
    async with hammering(hammer_program, PAGES) as first:
        await two.first.attach(name, ClientAttach(pid=first.pid, limit_bytes=LIMIT_BYTES))
        await two.first.release(name, FORCE)
    await two.second.adopt(name, ClientAdopt())
    worker = (await two.second.info()).workers[0].pid
    async with hammering(hammer_program, PAGES) as second:
        attaching = asyncio.create_task(two.second.attach(name, ClientAttach(pid=second.pid)))
        await until_it_pages(worker)
        await two.other.kill()
        await asyncio.gather(attaching, return_exceptions=True)
        await two.other.start()
        await until_client(two.second, name, lambda info: info.attachment == "process", "attached")
        await two.other.kill()
    await two.other.start()
    # Its pages may have been changed since.
    info = await until_client(two.second, name, lambda info: info.attachment == "none", "let go")
    assert released_by(info) is None
    await two.second.delete_client(name)


async def until_it_pages(worker: int) -> None:
    """Wait until a worker was given some client's memory."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not has_memory(worker):
            await asyncio.sleep(0.001)


def has_memory(worker: int) -> bool:
    for link in Path(f"/proc/{worker}/fd").iterdir():
        with suppress(OSError):  # closed meanwhile
            if "userfaultfd" in str(link.readlink()):
                return True
    return False


async def test_a_release_whose_page_table_nobody_can_store_leaves_the_client_at_work(two: Two) -> None:
    process = await two.region("staying")
    await process.do(f"write 0 {PAGES}")
    folders = handover_folders(two.embedded)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
        folder.write_bytes(b"no folder")
    try:
        error = await refused(two.first.release("staying", FORCE))
        assert (error.code, "cannot be stored" in error.cause) == ("no_vios", True)
        info = await two.first.client("staying")
        assert (info.attachment, info.released) == ("region", None)
        assert await process.do(f"verify 0 {PAGES}") == "wrong 0"
        assert await process.do(f"write 0 {PAGES}") == "done"
    finally:
        for folder in folders:
            folder.unlink()
    assert await process.do("close") == "done"


def handover_folders(embedded: EmbeddedSet) -> list[Path]:
    return [embedded.layout.vios_dir(vios) / "handovers" for vios in embedded.vioses]


async def stored_handovers(embedded: EmbeddedSet) -> int:
    return sum(len(list(folder.iterdir())) for folder in handover_folders(embedded) if folder.exists())


async def farpage(state: Path, *arguments: str) -> str:
    command = [sys.executable, "-m", "farpage", *arguments, "--state", str(state)]
    process = await asyncio.create_subprocess_exec(*command, stdout=asyncio.subprocess.PIPE)
    assert process.stdout is not None
    found = (await process.stdout.read()).decode()
    assert await process.wait() == 0
    return found
