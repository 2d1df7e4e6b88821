"""What a client finds in its pages, whatever the pager did with them meanwhile; on a running set."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import pytest_asyncio

from farpage.definition.model import PAGE_BYTES
from farpage.embedded.set import EmbeddedSet
from farpage.hypervisor.model import Alarm, ClientAttach, ClientInfo, PoolSet
from farpage.pager.compiled import COMPILED, WITHOUT_VARIABLE
from tests.integration.attach.scripted import Scripted
from tests.support.hammer import hammering
from tests.support.paged_set import running_set, until_client
from tests.support.scrape import Scrape

pytestmark = pytest.mark.asyncio(loop_scope="module")

MIB = 1 << 20
PAGES = 2048
LIMIT_BYTES = PAGES * PAGE_BYTES // 4

PRELUDE = """
import mmap, os
import numpy as np
from farpage import Region
region = Region({size}, name={name!r}, limit_bytes={limit}, state={state!r})
content = np.frombuffer(region, np.uint8).reshape(-1, 4096)
rng = np.random.default_rng(7)
def fill(first=0, end={pages}):
    for page in range(first, end):
        content[page] = np.frombuffer(expected(page), np.uint8)
def expected(page):
    return (page * 2654435761 % 2**32 + 1).to_bytes(8, "little") * 512
def wrong(pages=range({pages})):
    return [page for page in pages if content[page].tobytes() != expected(page)]
"""


@dataclass
class Client:
    """A process with a region that is paged, and what its hypervisor says of it."""

    process: Scripted
    embedded: EmbeddedSet
    name: str

    async def info(self) -> ClientInfo:
        return await self.embedded.hypervisor.client(self.name)

    async def until(self, condition: Callable[[ClientInfo], bool], what: str) -> ClientInfo:
        return await until_client(self.embedded.hypervisor, self.name, condition, what)

    async def settled(self) -> ClientInfo:
        """Wait until the client is within its limit and nothing is on its way out."""

        def still(info: ClientInfo) -> bool:
            return info.resident_bytes <= info.limit_bytes and not any(path.in_flight for path in info.paths)

        while True:
            info = await self.until(still, "settled")
            await asyncio.sleep(0.05)
            if (again := await self.info()).counters == info.counters:
                return again

    async def limit(self, limit_bytes: int) -> ClientInfo:
        """Change the limit and wait until it is kept."""
        await self.embedded.hypervisor.set_pool(PoolSet(client=self.name, limit_bytes=limit_bytes))
        return await self.settled()

    async def alarms(self, kind: str) -> list[Alarm]:
        alarms = await self.embedded.hypervisor.alarms()
        return [alarm for alarm in alarms if (alarm.client, alarm.kind) == (self.name, kind)]

    def flip(self, page: int) -> None:
        """Change a page in the volume's file."""
        file = self.embedded.layout.common_device / "volumes" / self.name
        with file.open("r+b", buffering=0) as opened:
            opened.seek(page * PAGE_BYTES + 100)
            byte = opened.read(1)[0]
            opened.seek(page * PAGE_BYTES + 100)
            opened.write(bytes([byte ^ 0xFF]))

    async def vios_commands(self) -> tuple[float, float]:
        """Return the read and write commands for the volume, over all VIOS."""
        scrapes = [await Scrape.of(vios.control) for vios in self.embedded.document.vioses.values()]
        reads, writes = (
            sum(scrape.value(f"farpage_volume_{what}_total", volume=self.name) for scrape in scrapes)
            for what in ("reads", "writes")
        )
        return reads, writes


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(
            "", id="compiled", marks=pytest.mark.skipif(COMPILED is None, reason="the loops were not built")
        ),
        pytest.param("1", id="python"),
    ],
)
def twin(request: pytest.FixtureRequest) -> Iterator[None]:
    """With the pager's compiled loops, and with what does the same without them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(WITHOUT_VARIABLE, request.param)
        yield


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def embedded(twin: None) -> AsyncIterator[EmbeddedSet]:
    async with running_set(workers=1) as running:
        yield running


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def untiered(twin: None) -> AsyncIterator[EmbeddedSet]:
    """A set without RAM tiers: what is spoilt on the device is nowhere else."""
    async with running_set(workers=1, ram_tier_percent=0) as running:
        yield running


@asynccontextmanager
async def paged_client(
    embedded: EmbeddedSet, name: str, limit_bytes: int = LIMIT_BYTES
) -> AsyncIterator[Client]:
    async with Scripted() as process:
        state = str(embedded.layout.root)
        await process.run(
            PRELUDE.format(size=PAGES * PAGE_BYTES, name=name, limit=limit_bytes, state=state, pages=PAGES)
        )
        yield Client(process, embedded, name)


async def test_random_reads_and_writes_find_every_byte(embedded: EmbeddedSet) -> None:
    async with paged_client(embedded, "random") as client:
        await client.process.run("""
copy = np.zeros_like(content)
bad = 0
for turn in range(2_000):
    page, at, length = int(rng.integers(len(content))), int(rng.integers(4096)), int(rng.integers(1, 20_000))
    flat, kept = content.reshape(-1), copy.reshape(-1)
    first = page * 4096 + at
    if turn % 3:
        bad += not np.array_equal(flat[first:first + length], kept[first:first + length])
    else:
        data = rng.integers(0, 256, len(flat[first:first + length]), np.uint8)
        flat[first:first + length] = kept[first:first + length] = data
""")
        assert await client.process.run("bad") == 0
        assert await client.process.run("int((content != copy).any(axis=1).sum())") == 0
        info = await client.settled()
        assert info.counters.page_in_pages > PAGES
        assert info.counters.page_out_pages > PAGES
        assert info.counters.checksum_errors == 0


async def test_never_more_than_the_limit_is_in_memory(embedded: EmbeddedSet) -> None:
    async with paged_client(embedded, "bounded") as client:
        await client.process.send("fill(); bad = wrong()")
        task = asyncio.create_task(client.process.answer())
        most = 0
        while not task.done():
            most = max(most, (await client.info()).resident_bytes)
        await task
        most = max(most, (await client.info()).resident_bytes)
        assert await client.process.run("bad") == []
        assert LIMIT_BYTES // 2 < most <= LIMIT_BYTES * 1.05


async def test_zero_pages_leave_memory_without_a_command(embedded: EmbeddedSet) -> None:
    async with paged_client(embedded, "zeros", PAGES * PAGE_BYTES) as client:
        await client.process.run("content[:, 7] = 1; content[:, 7] = 0")
        before = await client.vios_commands()
        info = await client.limit(2 * MIB)
        assert info.counters.zero_evict_pages >= PAGES - 2 * MIB // PAGE_BYTES
        assert (info.counters.page_out_pages, info.on_device_bytes) == (0, 0)
        assert await client.process.run("int(content.any())") == 0
        info = await client.settled()
        assert (info.counters.page_in_pages, info.counters.page_out_pages) == (0, 0)
        reads, writes = await client.vios_commands()
        assert writes == before[1]
        assert reads - before[0] < 100, "no more than the probes of the paths"


async def test_clean_pages_leave_memory_without_a_command(embedded: EmbeddedSet) -> None:
    async with paged_client(embedded, "clean") as client:
        await client.process.run("fill()")
        assert await client.process.run("wrong()") == []  # now all that is in memory is on the volume too
        before = await client.settled()
        _, writes = await client.vios_commands()
        assert await client.process.run("wrong()") == []
        info = await client.settled()
        assert info.counters.clean_evict_pages - before.counters.clean_evict_pages > PAGES // 2
        assert info.counters.page_out_pages == before.counters.page_out_pages
        assert (await client.vios_commands())[1] == writes


async def test_a_page_written_to_after_it_came_in_is_paged_out_again(embedded: EmbeddedSet) -> None:
    async with paged_client(embedded, "rewritten") as client:
        await client.process.run("fill()\nassert wrong() == []\ncontent[::5, 4000] = 99")
        assert await client.process.run(
            "[int(content[::5, 4000].min()), int((content[::5, 4000] != 99).sum())]"
        ) == [
            99,
            0,
        ]
        await client.process.run("content[::5, 4000] = content[::5, 4000 - 8]")
        assert await client.process.run("wrong()") == []


async def test_a_page_changed_on_the_device_is_lost_alone(untiered: EmbeddedSet) -> None:
    async with paged_client(untiered, "lost", PAGES * PAGE_BYTES) as client:
        await client.process.run("fill()")
        await client.limit(MIB)  # the first pages left first
        client.flip(10)
        # A system call that meets the page fails with EFAULT, where the process itself would get SIGBUS.
        await client.process.run("pipe = os.pipe()\nlost = None")
        await client.process.run(
            "try: os.write(pipe[1], content[10])\nexcept OSError as error: lost = error.strerror"
        )
        assert await client.process.run("lost") == "Bad address"
        assert len(await client.alarms("checksum")) == 1
        assert len(await client.alarms("poisoned")) == 1
        assert "page 10 " in (await client.alarms("poisoned"))[0].message
        info = await client.info()
        assert (info.counters.checksum_errors, info.counters.poisoned_pages) == (1, 1)
        assert await client.process.run(f"wrong([*range(10), *range(11, {PAGES})])") == []
        # And again after everything has been paged out and in.
        assert await client.process.run(f"wrong([*range(10), *range(11, {PAGES})])") == []
        await client.process.send("content[10, 0]")
        assert await client.process.process.wait() == -signal.SIGBUS


async def test_a_page_that_is_right_when_it_is_read_again_is_not_lost(untiered: EmbeddedSet) -> None:
    async with paged_client(untiered, "repaired", PAGES * PAGE_BYTES) as client:
        await client.process.run("fill()")
        await client.limit(MIB)
        client.flip(40)
        # Read-ahead finds the page changed; nobody wants it yet.
        assert await client.process.run("wrong(range(0, 33))") == []
        info = await client.until(lambda info: info.counters.checksum_errors >= 1, "read ahead")
        assert info.counters.poisoned_pages == 0
        client.flip(40)
        assert await client.process.run("wrong()") == []
        assert (await client.info()).counters.poisoned_pages == 0
        assert await client.alarms("poisoned") == []


async def test_holes_that_the_client_punches_read_zeros(embedded: EmbeddedSet) -> None:
    async with paged_client(embedded, "balloon", PAGES * PAGE_BYTES) as client:
        await client.process.run("fill()")
        await client.process.run(
            "import ctypes; libc = ctypes.CDLL(None, use_errno=True)\n"
            "def remove(first, count):\n"
            "    address = ctypes.c_void_p(region.start_address + first * 4096)\n"
            "    assert libc.madvise(address, ctypes.c_size_t(count * 4096), mmap.MADV_REMOVE) == 0"
        )
        await client.process.run("remove(100, 50)")
        assert await client.process.run("int(content[100:150].any())") == 0
        await client.process.run("remove(200, 50); fill(210, 220)")
        assert await client.process.run("wrong(range(210, 220))") == []
        assert await client.process.run("int(content[200:210].any()) + int(content[220:250].any())") == 0
        # What is paged out is not in memory to be removed; other pages do not notice.
        await client.limit(MIB)
        await client.process.run("remove(300, 50)")
        others = f"[*range(100), *range(210, 220), *range(250, 300), *range(350, {PAGES})]"
        assert await client.process.run(f"wrong({others})") == []
        assert await client.process.run("int(content[100:150].any()) + int(content[220:250].any())") == 0
        await client.process.run("fill()")
        assert await client.process.run("wrong()") == []


async def test_a_forked_child_faults_rather_than_reads_zeros(embedded: EmbeddedSet) -> None:
    async with paged_client(embedded, "forked") as client:
        await client.process.run("fill()")
        for page in (5, PAGES - 1):  # paged out, and in memory
            await client.process.run(
                "import resource\n"
                "child = os.fork()\n"
                "if child == 0:\n"
                "    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
                f"    os._exit(int(content[{page}, 0]) and 0)"
            )
            status = await client.process.run("os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])")
            assert status == -signal.SIGSEGV
        assert await client.process.run("wrong()") == []


async def test_threads_that_use_the_same_pages_lose_no_write(
    embedded: EmbeddedSet, hammer_program: Path
) -> None:
    pages = 512
    async with hammering(hammer_program, pages, threads=6, naps=False) as hammer:
        await embedded.hypervisor.attach("hammered", ClientAttach(pid=hammer.pid, limit_bytes=MIB))

        def paged(info: ClientInfo) -> bool:
            return info.counters.page_in_pages > 4000 and info.counters.cancelled_pages > 0

        for _ in range(3):
            await asyncio.sleep(0.1)
            assert (await hammer.check()).wrong == 0
        await until_client(embedded.hypervisor, "hammered", paged, "much paged")
        found = await hammer.check()
        assert found.wrong == 0
        await embedded.hypervisor.detach("hammered")
        assert (await hammer.quit()).wrong == 0
        await embedded.hypervisor.delete_client("hammered")


async def test_a_lost_page_does_not_keep_a_client_from_being_detached(
    embedded: EmbeddedSet, hammer_program: Path
) -> None:
    pages = 1024
    async with hammering(hammer_program, pages) as hammer:
        await embedded.hypervisor.attach("halted", ClientAttach(pid=hammer.pid, limit_bytes=MIB))
        client = Client(Scripted(), embedded, "halted")
        await client.until(lambda info: info.on_device_bytes > 0, "paged out")
        hammer.process.send_signal(signal.SIGSTOP)
        await client.settled()
        for page in range(0, pages, 8):  # many of them are on the device only
            client.flip(page)
        info = await embedded.hypervisor.detach("halted")
        assert info.attachment == "none"
        assert len(await client.alarms("poisoned")) > 1
        # The pages stay lost, which is better than to read zeros.
        hammer.process.send_signal(signal.SIGCONT)
        assert await hammer.process.wait() == -signal.SIGBUS
        await embedded.hypervisor.delete_client("halted")
