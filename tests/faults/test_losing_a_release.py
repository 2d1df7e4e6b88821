"""A release that is cut short: up to its record in the definition the client stays, after it it is gone.

Each test holds a release between the last page's leaving and the storing of the page table, by stopping the
VIOSes: nothing but clean pages is in memory before, so the pages leave without them.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import pytest_asyncio

from farpage.embedded.set import EmbeddedSet
from farpage.errors import FarpageError
from farpage.hypervisor.model import ClientAdopt, ClientInfo, ClientRelease
from tests.support.paged_set import DEADLINE_SECONDS, RegionProcess, running_set, until_client
from tests.support.processes import kill_and_wait, worker_pid

pytestmark = pytest.mark.asyncio(loop_scope="module")

PAGES = 1024
LIMIT_BYTES = 1 << 20
PAGE_BYTES = 4096


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def embedded() -> AsyncIterator[EmbeddedSet]:
    async with running_set(workers=1, lease_seconds=60.0) as running:
        yield running


class Held:
    """A client whose pages are all out, while its release waits for the VIOSes."""

    def __init__(self, embedded: EmbeddedSet, name: str, process: RegionProcess) -> None:
        self.embedded = embedded
        self.name = name
        self.process = process
        self.asking: asyncio.Task[ClientInfo]

    async def begin(self) -> None:
        """Ask for the release, and wait until every page is out."""
        hypervisor = self.embedded.hypervisor
        self.asking = asyncio.get_running_loop().create_task(
            hypervisor.release(self.name, ClientRelease(force=True))
        )
        whole = PAGES * PAGE_BYTES
        await until_client(
            hypervisor, self.name, lambda info: info.on_device_bytes == whole, "all on the device"
        )

    def signal(self, number: signal.Signals) -> None:
        for vios in self.embedded.vioses:
            self.embedded.supervise_vios(vios, supervised=number == signal.SIGCONT)
            self.embedded.kill_vios(vios, number)

    async def released(self) -> bool:
        """Tell whether a VIOS has the release in its definition."""
        definitions = [await vios.definition() for vios in self.embedded.vioses.values()]
        return any(definition.clients[self.name].released for definition in definitions)

    async def kill_control(self) -> None:
        """Kill the control process; whoever asked it for the release has no answer."""
        self.embedded.supervise_hypervisor(supervised=False)
        self.embedded.kill_hypervisor(signal.SIGKILL)
        await self.embedded.hypervisor_exited()
        with pytest.raises(FarpageError):
            await self.asking

    async def goes_on_elsewhere(self) -> None:
        """Adopt the client, and see that a new process finds all of it, and the old one nothing any more."""
        hypervisor = self.embedded.hypervisor
        await until_client(hypervisor, self.name, lambda info: info.attachment == "none", "let go")
        self.process.send("verify 0 1")
        await hypervisor.adopt(self.name, ClientAdopt())
        again = await RegionProcess.start(self.embedded.layout.root, PAGES, LIMIT_BYTES, self.name, version=1)
        try:
            assert await again.do(f"verify 0 {PAGES}") == "wrong 0"
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(self.process.answer(), 0.1)
            assert await again.do("close") == "done"
        finally:
            await again.stop()
        await hypervisor.delete_client(self.name)


@asynccontextmanager
async def held_release(embedded: EmbeddedSet, name: str) -> AsyncIterator[Held]:
    process = await RegionProcess.start(embedded.layout.root, PAGES, LIMIT_BYTES, name)
    held = Held(embedded, name, process)
    try:
        await process.do(f"write 0 {PAGES}")
        for _ in range(2):
            assert await process.do(f"verify 0 {PAGES}") == "wrong 0"
        held.signal(signal.SIGSTOP)
        await held.begin()
        yield held
    finally:
        held.signal(signal.SIGCONT)
        await process.stop()


async def test_one_whose_hypervisor_is_killed_before_its_record_leaves_the_client_at_work(
    embedded: EmbeddedSet,
) -> None:
    async with held_release(embedded, "kept") as held:
        await held.kill_control()
        held.process.send(f"verify 0 {PAGES}")
        held.signal(signal.SIGCONT)
        await embedded.start_hypervisor()
        assert await held.process.answer() == "wrong 0"
        assert not await held.released()
        assert await held.process.do(f"write 0 {PAGES}") == "done"
        assert await held.process.do(f"verify 0 {PAGES}") == "wrong 0"
        assert await held.process.do("close") == "done"


async def test_one_whose_hypervisor_is_killed_after_its_record_is_finished_by_the_next_one(
    embedded: EmbeddedSet,
) -> None:
    async with held_release(embedded, "gone") as held:
        worker = await worker_pid(embedded, "gone")
        os.kill(worker, signal.SIGSTOP)  # it is not told to let go
        held.signal(signal.SIGCONT)
        async with asyncio.timeout(DEADLINE_SECONDS):
            while not await held.released():
                await asyncio.sleep(0.01)
        await held.kill_control()
        os.kill(worker, signal.SIGCONT)
        await embedded.start_hypervisor()
        await held.goes_on_elsewhere()


async def test_one_whose_worker_is_killed_goes_on_in_another_one(embedded: EmbeddedSet) -> None:
    async with held_release(embedded, "moved") as held:
        await kill_and_wait(await worker_pid(embedded, "moved"))
        held.signal(signal.SIGCONT)
        assert (await held.asking).attachment == "none"
        await held.goes_on_elsewhere()
