"""A hypervisor attaches a client whose volume it does not reach: it starts at once, and its data follows."""

from __future__ import annotations

import asyncio
import shlex
import signal
import sys

import pytest

from farpage.api.client import ControlClient
from farpage.embedded.control import ViosControl
from farpage.errors import FarpageError
from farpage.hypervisor.model import ClientAdopt, ClientRelease
from farpage.hypervisor.movement import MoveInfo, MoveStage
from farpage.hypervisor.ways import Way
from tests.support.moving_client import MovingClient, moving_client
from tests.support.paged_set import DEADLINE_SECONDS, RegionProcess
from tests.support.second_hypervisor import Other, second_hypervisor

PAGES = 1024
LIMIT = 256 * 4096


async def alarm(other: Other, kind: str) -> str:
    """Wait for an alarm and return its message."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while True:
            for found in await other.control.alarms():
                if found.kind == kind:
                    return found.message
            await asyncio.sleep(0.05)


async def ended(other: Other) -> MoveInfo:
    async with asyncio.timeout(DEADLINE_SECONDS):
        while (info := await other.control.move_progress("client")).stage is not MoveStage.DONE:
            await asyncio.sleep(0.05)
    return info


async def let_go(client: MovingClient) -> None:
    """Release the client and end its process."""
    await client.paged.write_all()
    client.paged.client.process.send_signal(signal.SIGSTOP)
    await client.paged.embedded.hypervisor.release("client", ClientRelease())
    await client.paged.client.stop()


@pytest.mark.parametrize("released", [False, True])
async def test_a_client_starts_where_its_volume_is_out_of_reach(released: bool) -> None:
    async with moving_client(PAGES, LIMIT) as client:
        if released:
            await let_go(client)
        else:
            assert await client.paged.client.do("close") == "done"
            await client.paged.client.stop()
        source, target = client.places
        async with second_hypervisor(client.paged.embedded, client.vios_of(target)) as other:
            reached = client.paged.embedded.vioses[client.vios_of(target)]
            address = client.paged.embedded.document.vioses[client.vios_of(target)].control
            way = await other.control.explain_path("client")
            assert (way.way, way.first_device, way.second_device) == (Way.INDIRECT, target, source)
            starting = None
            if released:
                await other.control.adopt("client", ClientAdopt())
            else:
                starting = await RegionProcess.start(other.state, PAGES, LIMIT)
                assert await starting.do(f"verify 0 {PAGES}") == "wrong 0"
            assert target in await alarm(other, "indirect_access")
            command = (await alarm(other, "intermediary_wanted")).partition(": ")[2]
            words = shlex.split(command)
            assert words[:3] == ["farpage", "intermediary", "run"]
            words[words.index("--listen") + 1] = f"unix:{client.folder / 'relay'}"
            intermediary = await asyncio.create_subprocess_exec(sys.executable, "-m", *words)
            try:
                region = starting or await attached(other, address, reached, target)
                await ended(other)
                for what, answer in (("verify", "wrong 0"), ("write", "done"), ("verify", "wrong 0")):
                    assert await region.do(f"{what} 0 {PAGES}") == answer
                async with asyncio.timeout(DEADLINE_SECONDS):
                    assert await intermediary.wait() == 0
                assert (await client.volumes())[source] == set()
                await region.stop()
            finally:
                if intermediary.returncode is None:
                    intermediary.kill()
                await intermediary.wait()


async def test_a_released_client_is_moved_only_with_its_page_table() -> None:
    async with moving_client(PAGES, LIMIT) as client:
        await let_go(client)
        source, target = client.places
        vios = client.vios_of(target)
        async with second_hypervisor(client.paged.embedded, vios) as other:
            await other.control.adopt("client", ClientAdopt())
            command = (await alarm(other, "intermediary_wanted")).partition(": ")[2]
            state = client.paged.embedded.layout.vios_dir(vios)
            (presence,) = (state / "presence").iterdir()
            in_the_way = state / "handovers" / f"{presence.name.partition('.')[0]}.new"
            in_the_way.mkdir(parents=True)  # as on a disk that has room for little more
            words = shlex.split(command)
            words[words.index("--listen") + 1] = f"unix:{client.folder / 'relay'}"
            intermediary = await asyncio.create_subprocess_exec(sys.executable, "-m", *words)
            try:
                async with asyncio.timeout(DEADLINE_SECONDS):
                    while True:
                        info = await other.control.move_progress("client")
                        if (
                            "stores no handover" in info.problem
                            and info.present_pages == info.total_pages > 0
                        ):
                            break
                        await asyncio.sleep(0.05)
                assert (await client.volumes())[source] == {"client"}
                in_the_way.rmdir()
                await ended(other)
                region = await RegionProcess.start(other.state, PAGES, LIMIT, version=1)
                assert await region.do(f"verify 0 {PAGES}") == "wrong 0"
                await region.stop()
            finally:
                if intermediary.returncode is None:
                    intermediary.kill()
                await intermediary.wait()


async def attached(other: Other, address: str, vios: ViosControl, device: str) -> RegionProcess:
    """Attach the region when its page table has come, with the volume."""
    (found,) = [known.id for known in await vios.devices() if known.name == device]
    async with asyncio.timeout(DEADLINE_SECONDS), ControlClient(address) as client:
        while True:
            try:
                await client.request("GET", "/v1/volumes/client/handover", params={"device": found})
            except FarpageError:
                await asyncio.sleep(0.05)
            else:
                return await RegionProcess.start(other.state, PAGES, LIMIT, version=1)
