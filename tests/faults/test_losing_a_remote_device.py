"""What a client sees whose paging device is a block device, or an NBD server that dies and comes back."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from farpage.definition.model import Redundancy
from farpage.embedded.set import EmbeddedSet
from farpage.hypervisor.model import ClientCreate
from tests.support.loopdevice import loop_device
from tests.support.losses import heal
from tests.support.nbd import short_folder
from tests.support.nbdkit import Nbdkit
from tests.support.paged_set import DEADLINE_SECONDS, PagedSet, paged_region, running_set

pytestmark = pytest.mark.asyncio(loop_scope="module")

PAGES = 2048
LIMIT_BYTES = PAGES * 4096 // 4
STORAGE = (PAGES * 4096) + (1 << 20)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def server(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Nbdkit]:
    image = tmp_path_factory.mktemp("remote") / "image"
    with image.open("wb") as file:
        file.truncate(STORAGE)
    with short_folder() as folder:
        async with Nbdkit(folder / "s", "file", str(image)) as server:
            yield server


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def remote_set(server: Nbdkit) -> AsyncIterator[EmbeddedSet]:
    async with running_set(workers=1, devices=(server.uri,)) as started:
        yield started


@pytest_asyncio.fixture(loop_scope="module")
async def remote(remote_set: EmbeddedSet) -> AsyncIterator[PagedSet]:
    await heal(remote_set)
    async with paged_region(remote_set, PAGES, LIMIT_BYTES) as paged:
        yield paged


@pytest_asyncio.fixture(loop_scope="module")
async def block(tmp_path: Path) -> AsyncIterator[PagedSet]:
    with loop_device(tmp_path / "disk", STORAGE) as path:
        async with (
            running_set(workers=1, devices=(f"block:{path}",)) as embedded,
            paged_region(embedded, PAGES, LIMIT_BYTES) as paged,
        ):
            yield paged


async def lose_the_active_vios(paged: PagedSet) -> None:
    await paged.write_all()
    active = await paged.active()
    paged.signal(active, signal.SIGKILL)
    await paged.verify_all()
    await paged.write_all()
    await paged.restart(active)
    await paged.until_state(active, "standby")
    await paged.verify_all()


async def test_a_client_on_a_block_device_survives_the_loss_of_a_vios(block: PagedSet) -> None:
    await lose_the_active_vios(block)


async def test_a_client_on_a_remote_device_survives_the_loss_of_a_vios(remote: PagedSet) -> None:
    await lose_the_active_vios(remote)


async def test_a_client_waits_for_a_remote_device_that_is_restarted(remote: PagedSet, server: Nbdkit) -> None:
    await remote.write_all()
    for _ in range(3):
        await server.kill()
        remote.client.send(f"verify 0 {PAGES}")
        await remote.until(lambda info: info.stalled_faults > 0, "an access waits")
        await server.start()
        assert await remote.client.answer() == "wrong 0"
        await remote.write_all()
    await remote.verify_all()


async def test_page_outs_go_on_when_a_remote_device_is_killed_under_them(
    remote: PagedSet, server: Nbdkit
) -> None:
    for _ in range(3):
        remote.client.send(f"write 0 {PAGES}")
        await asyncio.sleep(0.02)
        await server.kill()
        await server.start()
        assert await remote.client.answer() == "done"
        await remote.verify_all()


async def test_a_vios_restarted_while_its_remote_device_is_away_serves_it_when_it_is_back(
    remote: PagedSet, server: Nbdkit
) -> None:
    await remote.write_all()
    await server.kill()
    for vios in remote.embedded.vioses:
        remote.signal(vios, signal.SIGKILL)
        await remote.restart(vios)
        assert await remote.embedded.vioses[vios].devices() == ()
    await server.start()
    await remote.verify_all()
    await remote.write_all()
    await remote.verify_all()


async def until_reached_by(embedded: EmbeddedSet, *vioses: str) -> None:
    """Wait until the definition says that the one device is reached by some VIOS and by no other."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while True:
            (device,) = (await embedded.hypervisor.definition()).devices.values()
            if {reach.vios for reach in device.reached_by} == set(vioses):
                return
            await asyncio.sleep(0.05)


async def test_a_device_that_comes_up_after_its_vios_is_reached_over_it_again(
    remote_set: EmbeddedSet, server: Nbdkit
) -> None:
    await heal(remote_set)
    await server.kill()
    remote_set.supervise_vios("vios1", supervised=False)
    remote_set.kill_vios("vios1", signal.SIGKILL)
    await remote_set.vios_exited("vios1")
    await remote_set.start_vios("vios1")
    await until_reached_by(remote_set, "vios2")
    await server.start()
    await until_reached_by(remote_set, "vios1", "vios2")
    async with paged_region(remote_set, PAGES, LIMIT_BYTES) as paged:
        assert {path.vios for path in (await paged.info()).paths} == {"vios1", "vios2"}


async def test_a_common_device_that_hangs_costs_its_replica_alone(tmp_path: Path) -> None:
    """Neither VIOS can tell what is on it, and yet both answer."""
    with short_folder() as folder:
        async with (
            Nbdkit(folder / "s", "memory", "64M") as server,
            running_set(workers=1, devices=(f"dir:{tmp_path}", server.uri)) as embedded,
        ):
            hypervisor = embedded.hypervisor
            wanted = ClientCreate(
                name="client",
                memory_bytes=PAGES * 4096,
                limit_bytes=LIMIT_BYTES,
                redundancy=Redundancy.MIRROR,
            )
            await hypervisor.create_client(wanted)
            async with paged_region(embedded, PAGES, LIMIT_BYTES) as paged:
                await paged.write_all()
                server.signal(signal.SIGSTOP)
                await hypervisor.refresh_devices()
                assert {len(vios.devices) for vios in await hypervisor.vioses() if vios.reachable} == {2}
                await paged.write_all()
                await paged.verify_all()
                replicas = (await paged.info()).replicas
                assert sorted(replica.state for replica in replicas) == ["in_sync", "stale"]
                server.signal(signal.SIGCONT)
                await paged.until(
                    lambda info: {replica.state for replica in info.replicas} == {"in_sync"}, "in sync"
                )
                await paged.verify_all()
