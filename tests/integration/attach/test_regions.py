from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest

from farpage.attach.listener import AttachListener
from farpage.attach.memory import ClientKind, ClientMemory
from farpage.attach.messages import AttachRequest
from farpage.definition.model import Redundancy
from farpage.errors import InvalidInput
from farpage.kernel.memory import PAGE_SIZE
from farpage.kernel.process import read_descriptors
from tests.integration.attach.scripted import Scripted
from tests.integration.attach.tiny_pager import TinyPager

IMPORTS = "import hashlib, os, numpy as np\nfrom farpage.attach.region import Region\n"


class TinyHypervisor:
    """Pages what is attached, by one tiny pager each."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.requests: list[AttachRequest] = []
        self.pagers: dict[str, TinyPager] = {}
        self.closed: asyncio.Queue[str] = asyncio.Queue()
        self.refusal: Exception | None = None
        self.listener = AttachListener(str(path), self._attach, self._close)

    async def _attach(self, request: AttachRequest, memory: ClientMemory) -> str:
        if self.refusal:
            raise self.refusal
        self.requests.append(request)
        name = request.name or f"region-{memory.pid}"
        pager = self.pagers[name] = TinyPager(memory)
        pager.start()
        return name

    async def _close(self, name: str, memory: ClientMemory) -> None:
        self.pagers.pop(name).stop()
        with suppress(OSError):  # a process that is ending has no memory left
            memory.unregister()
        memory.close_descriptors()
        self.closed.put_nowait(name)

    async def ended(self) -> str:
        return await asyncio.wait_for(self.closed.get(), 60)


@pytest.fixture
async def hypervisor(short_folder: Path) -> AsyncIterator[TinyHypervisor]:
    hypervisor = TinyHypervisor(short_folder / "attach.sock")
    await hypervisor.listener.start()
    yield hypervisor
    await hypervisor.listener.close()
    for pager in hypervisor.pagers.values():
        pager.stop()
        pager.memory.close_descriptors()


@pytest.fixture
async def client(hypervisor: TinyHypervisor) -> AsyncIterator[Scripted]:
    async with Scripted() as scripted:
        await scripted.run(f"{IMPORTS}path = {str(hypervisor.path)!r}")
        yield scripted


async def test_a_region_is_an_array_whose_pages_come_back_after_eviction(
    hypervisor: TinyHypervisor, client: Scripted
) -> None:
    await client.run("region = Region(100 * 4096, name='numbers', hypervisor=path)")
    await client.run("array = np.frombuffer(region, np.uint64); array[:] = np.arange(len(array))")
    pager = hypervisor.pagers["numbers"]
    for page in range(100):
        pager.evict(page)
    assert pager.resident_pages() == []
    assert await client.run("bool((array == np.arange(len(array))).all())")
    assert await client.run("len(region)") == 100 * PAGE_SIZE
    assert await client.run("region[8:16] == (1).to_bytes(8, 'little')")
    assert await client.run("memoryview(region).nbytes") == 100 * PAGE_SIZE


async def test_system_calls_fill_missing_pages_of_a_region(
    hypervisor: TinyHypervisor, client: Scripted
) -> None:
    await client.run("region = Region(4 * 4096, name='buffer', hypervisor=path)")
    await client.run("source = os.memfd_create('source'); os.write(source, b'y' * 16384)")
    assert await client.run("os.preadv(source, [region], 0)") == 4 * PAGE_SIZE
    hypervisor.pagers["buffer"].evict(2)
    assert await client.run("region[:] == b'y' * 16384")


async def test_the_request_says_what_was_asked_for(hypervisor: TinyHypervisor, client: Scripted) -> None:
    await client.run("region = Region(5000, limit_bytes=4096, redundancy='none', hypervisor=path)")
    request = hypervisor.requests[0]
    assert request.size_bytes == 2 * PAGE_SIZE
    assert request.limit_bytes == 4096
    assert request.redundancy is Redundancy.NONE
    assert request.start_address == await client.run("region.start_address")
    assert await client.run("region.name") == f"region-{client.pid}"
    memory = hypervisor.pagers[f"region-{client.pid}"].memory
    assert (memory.kind, memory.pid, memory.remote_uffd) == (
        ClientKind.REGION,
        client.pid,
        request.uffd_number,
    )


async def test_closing_waits_for_the_hypervisor_and_unmaps(
    hypervisor: TinyHypervisor, client: Scripted
) -> None:
    await client.run("region = Region(4096, name='short', hypervisor=path); address = region.start_address")
    await client.run("region.close(); region.close()")
    assert hypervisor.closed.get_nowait() == "short"
    assert await client.run("region.closed")
    with pytest.raises(AssertionError, match="ValueError"):
        await client.run("region[0]")
    assert await client.run("'farpage:' not in open('/proc/self/maps').read()")


async def test_a_region_in_use_refuses_to_close_and_goes_on(
    hypervisor: TinyHypervisor, client: Scripted
) -> None:
    await client.run(
        "region = Region(4096, name='used', hypervisor=path); array = np.frombuffer(region, np.uint8)"
    )
    with pytest.raises(AssertionError, match="BufferError"):
        await client.run("region.close()")
    assert hypervisor.closed.empty()
    assert await client.run("int(array[0])") == 0
    await client.run("del array; region.close()")
    assert await hypervisor.ended() == "used"


async def test_with_closes_at_its_end(hypervisor: TinyHypervisor, client: Scripted) -> None:
    await client.run("with Region(4096, name='scoped', hypervisor=path) as region: region[0] = 7")
    assert await hypervisor.ended() == "scoped"


async def test_a_region_that_is_forgotten_warns_and_closes(
    hypervisor: TinyHypervisor, client: Scripted
) -> None:
    await client.run("import warnings; warnings.simplefilter('always')")
    await client.run("region = Region(4096, name='lost', hypervisor=path); del region")
    assert await hypervisor.ended() == "lost"


async def test_the_end_of_the_process_ends_its_regions(hypervisor: TinyHypervisor, client: Scripted) -> None:
    await client.run("regions = [Region(4096, name=f'r{n}', hypervisor=path) for n in range(3)]")
    client.process.kill()
    assert {await hypervisor.ended() for _ in range(3)} == {"r0", "r1", "r2"}


async def test_a_process_killed_while_a_child_holds_its_connection_ends_its_regions(
    hypervisor: TinyHypervisor, client: Scripted
) -> None:
    await client.run("region = Region(4096, name='parent', hypervisor=path)")
    # Not os.fork, whose hook closes the connection in the child.
    await client.run(
        "import ctypes; libc = ctypes.PyDLL(None); child = libc.fork()\nif child == 0: libc.pause()"
    )
    child = await client.run("child")
    client.process.kill()
    assert await hypervisor.ended() == "parent"
    os.kill(child, 9)


async def test_a_forked_child_faults_and_does_not_disturb_its_parent(
    hypervisor: TinyHypervisor, client: Scripted
) -> None:
    await client.run("region = Region(4 * 4096, name='forked', hypervisor=path); region[0] = 9")
    hypervisor.pagers["forked"].evict(0)
    await client.run("child = os.fork()\nif child == 0: region[0]; os._exit(0)")
    assert await client.run("os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])") == -11
    await client.run("child = os.fork()\nif child == 0: region.close(); del region; os._exit(5)")
    assert await client.run("os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])") == 5
    assert hypervisor.closed.empty()
    assert await client.run("region[0]") == 9


async def test_a_region_keeps_its_size(hypervisor: TinyHypervisor, client: Scripted) -> None:
    await client.run("region = Region(4096, name='fixed', hypervisor=path)")
    with pytest.raises(AssertionError, match="InvalidInput"):
        await client.run("region.resize(8192)")


async def test_the_hypervisor_is_found_in_the_state_folder_and_in_the_environment(short_folder: Path) -> None:
    (short_folder / "hypervisor").mkdir()
    hypervisor = TinyHypervisor(short_folder / "hypervisor" / "attach.sock")
    await hypervisor.listener.start()
    async with Scripted(FARPAGE_STATE=str(short_folder)) as client:
        await client.run(f"{IMPORTS}Region(4096, name='found').close()")
        assert await hypervisor.ended() == "found"
        await client.run(f"Region(4096, name='stated', state={str(short_folder)!r}).close()")
        assert await hypervisor.ended() == "stated"
    await hypervisor.listener.close()


async def test_a_refusal_of_the_hypervisor_reaches_the_caller_and_leaves_nothing(
    hypervisor: TinyHypervisor, client: Scripted
) -> None:
    hypervisor.refusal = InvalidInput("limit_bytes", "1 is too little", "ask for more")
    descriptors = await client.run("len(os.listdir('/proc/self/fd'))")
    own = read_descriptors(os.getpid())
    with pytest.raises(AssertionError, match="RegionRefused: limit_bytes: 1 is too little; ask for more"):
        await client.run("Region(4096, hypervisor=path)")
    assert await client.run("len(os.listdir('/proc/self/fd'))") == descriptors
    assert await client.run("'farpage:' not in open('/proc/self/maps').read()")
    # The listener has nothing left to do for a connection when it has taken the next.
    hypervisor.refusal = None
    await client.run("Region(4096, name='next', hypervisor=path).close()")
    await hypervisor.ended()
    assert set(read_descriptors(os.getpid())) <= set(own)


async def test_a_bug_in_the_hypervisor_is_an_internal_error(
    hypervisor: TinyHypervisor, client: Scripted
) -> None:
    hypervisor.refusal = ZeroDivisionError()
    with pytest.raises(AssertionError, match="RegionRefused: the hypervisor could not handle the request"):
        await client.run("Region(4096, hypervisor=path)")


async def test_a_hypervisor_that_went_away_does_not_keep_a_region_open(
    hypervisor: TinyHypervisor, client: Scripted
) -> None:
    await client.run("region = Region(4096, name='orphan', hypervisor=path); region[0] = 1")
    await hypervisor.listener.close()
    await client.run("region.close()")
    assert await client.run("region.closed")


WRONG_ARGUMENTS = [
    ("0, hypervisor=path", "size_bytes"),
    ("-4096, hypervisor=path", "size_bytes"),
    ("4096, hypervisor=path, name='No Name'", "name"),
    ("4096, hypervisor=path, limit_bytes=0", "limit_bytes"),
    ("4096, hypervisor=path, redundancy='raid6'", "redundancy"),
    ("4096, hypervisor='/tmp/' + 'x' * 200", "hypervisor"),
]


async def test_wrong_arguments_are_named(client: Scripted) -> None:
    for arguments, field in WRONG_ARGUMENTS:
        with pytest.raises(AssertionError, match=f"InvalidInput: {field}: "):
            await client.run(f"Region({arguments})")


async def test_without_a_hypervisor_the_error_says_how_to_start_one(short_folder: Path) -> None:
    async with Scripted(FARPAGE_STATE="") as client:
        await client.run(IMPORTS)
        with pytest.raises(AssertionError, match=r"InvalidInput: hypervisor: .*farpage up"):
            await client.run("Region(4096)")
        with pytest.raises(AssertionError, match=r"Unreachable: .*farpage up"):
            await client.run(f"Region(4096, state={str(short_folder)!r})")
