"""A device takes the place of another one under clients that work."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from farpage.api.remote import RemoteError
from farpage.definition.model import Redundancy
from farpage.embedded.set import EmbeddedSet
from farpage.errors import FarpageError
from farpage.hypervisor.model import (
    ClientAdopt,
    ClientCreate,
    ClientRelease,
    DeviceReplacement,
    ReplaceStage,
)
from farpage.hypervisor.movement import ClientMove, MoveStage
from farpage.vios.model import DeviceAdd
from tests.support.losses import heal, kill_all, kill_control
from tests.support.paged_set import (
    DEADLINE_SECONDS,
    PagedSet,
    RegionProcess,
    once_free,
    paged_region,
    running_set,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

PAGES = 2048
LIMIT = 512 * 4096


@asynccontextmanager
async def with_a_spare(*own: str) -> AsyncIterator[EmbeddedSet]:
    """Run a set with a device `spare` besides those that VIOSes have by their own names, or a common one."""
    folder = Path(tempfile.mkdtemp(prefix="fprep-", dir="/tmp"))
    for name in (*own, "spare"):
        (folder / name).mkdir()
    try:
        devices = tuple(f"{vios}=dir:{folder / vios}" for vios in own)
        async with running_set(workers=1, devices=devices) as embedded:
            for vios in embedded.vioses.values():
                await vios.add_device(DeviceAdd(spec=f"dir:{folder / 'spare'}", name="spare"))
            await embedded.hypervisor.refresh_devices()
            yield embedded
    finally:
        shutil.rmtree(folder)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def common() -> AsyncIterator[EmbeddedSet]:
    async with with_a_spare() as embedded:
        yield embedded


@asynccontextmanager
async def paged(embedded: EmbeddedSet, redundancy: Redundancy) -> AsyncIterator[tuple[PagedSet, str, str]]:
    """Page a region; yields the device to replace, and one to take its place, too."""
    await heal(embedded)
    hypervisor = embedded.hypervisor
    for known in await hypervisor.clients():
        await hypervisor.delete_client(known.name)
    await hypervisor.create_client(
        ClientCreate(name="client", memory_bytes=PAGES * 4096, limit_bytes=LIMIT, redundancy=redundancy)
    )
    definition = await hypervisor.definition()
    replicas = definition.clients["client"].volumes[0].replicas
    used = [definition.devices[replica.device].name for replica in replicas]
    free = [device.name for device in definition.devices.values() if device.name not in used]
    async with paged_region(embedded, PAGES, LIMIT) as client:
        yield client, used[0], free[0]


async def ended(paged: PagedSet, old: str) -> DeviceReplacement:
    """Wait until a replacement has ended."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not (replacement := await paged.embedded.hypervisor.replacement(old)).done:
            await asyncio.sleep(0.05)
    return replacement


async def volumes_on(paged: PagedSet, device: str) -> set[str]:
    """Return the volumes that the VIOS find on a device."""
    found = set()
    for vios in paged.embedded.vioses.values():
        ids = {known.id: known.name for known in await vios.devices()}
        found |= {volume.name for volume in await vios.volumes() if ids[volume.device] == device}
    return found


@pytest.mark.parametrize("redundancy", [Redundancy.PATH, Redundancy.MIRROR])
async def test_a_device_is_replaced_under_a_client_that_works(
    common: EmbeddedSet, redundancy: Redundancy
) -> None:
    async with AsyncExitStack() as stack:
        embedded = common
        if redundancy is Redundancy.MIRROR:
            embedded = await stack.enter_async_context(with_a_spare("vios1", "vios2"))
        client, old, new = await stack.enter_async_context(paged(embedded, redundancy))
        await client.write_all()
        client.client.send(f"write 0 {PAGES}")
        begun = await client.embedded.hypervisor.replace_device(old, new)
        assert [moved.client for moved in begun.clients] == ["client"]
        assert await client.client.answer() == "done"
        while not (replacement := await client.embedded.hypervisor.replacement(old)).done:
            await client.write_all()
        assert [moved.stage for moved in replacement.clients] == [ReplaceStage.DONE]
        await client.verify_all()
        await client.write_all()
        await client.verify_all()
        info = await client.info()
        devices = {replica.device for replica in info.replicas}
        assert old not in devices
        assert new in devices
        assert info.redundancy is redundancy
        assert (await volumes_on(client, old), await volumes_on(client, new)) == (set(), {"client"})
        await client.until_alarm("device_replaced")
        if redundancy is Redundancy.MIRROR:
            client.signal("vios2", signal.SIGKILL)
            await client.verify_all()


async def test_a_worker_killed_while_it_copies_goes_on_in_another(common: EmbeddedSet) -> None:
    async with paged(common, Redundancy.PATH) as (client, old, new):
        await client.write_all()
        await client.embedded.hypervisor.replace_device(old, new)
        workers = (await client.embedded.hypervisor.info()).workers
        os.kill(next(worker.pid for worker in workers if worker.clients), signal.SIGKILL)
        await client.write_all()
        replacement = await ended(client, old)
        assert [moved.stage for moved in replacement.clients] == [ReplaceStage.DONE]
        await client.verify_all()


@pytest.mark.parametrize("lose", [kill_control, kill_all])
async def test_a_replacement_goes_on_when_it_is_asked_for_again_after_the_control_process_was_killed(
    common: EmbeddedSet, lose: Callable[[EmbeddedSet], Awaitable[None]]
) -> None:
    async with paged(common, Redundancy.PATH) as (client, old, new):
        await client.write_all()
        hypervisor = client.embedded.hypervisor
        await hypervisor.replace_device(old, new)
        await lose(client.embedded)
        client.client.send(f"write 0 {PAGES}")
        await client.embedded.start_hypervisor()
        assert await client.client.answer() == "done"
        with pytest.raises(FarpageError, match="goes on where it was cut short"):
            await hypervisor.replacement(old)
        await hypervisor.replace_device(old, new)
        await client.verify_all()
        replacement = await ended(client, old)
        assert [moved.stage for moved in replacement.clients] in ([ReplaceStage.DONE], [])
        assert {replica.device for replica in (await client.info()).replicas} == {new}
        assert (await volumes_on(client, old), await volumes_on(client, new)) == (set(), {"client"})
        await client.verify_all()


async def test_a_client_that_is_not_attached_just_gets_its_volume_elsewhere(common: EmbeddedSet) -> None:
    async with paged(common, Redundancy.PATH) as (client, old, new):
        wanted = ClientCreate(name="idle", memory_bytes=1 << 20, redundancy=Redundancy.PATH)
        hypervisor = client.embedded.hypervisor
        await client.client.stop()
        await hypervisor.create_client(wanted)
        definition = await hypervisor.definition()
        on = definition.devices[definition.clients["idle"].volumes[0].replicas[0].device].name
        to = new if on == old else old
        with pytest.raises(FarpageError, match="they are one device"):
            await hypervisor.replace_device(on, on)
        await hypervisor.replace_device(on, to)
        assert all(moved.stage is ReplaceStage.DONE for moved in (await ended(client, on)).clients)
        assert "idle" in await volumes_on(client, to)
        assert await volumes_on(client, on) == set()


@pytest.mark.parametrize("released_first", [True, False])
async def test_a_client_that_is_released_keeps_every_page_whatever_moves(
    common: EmbeddedSet, released_first: bool
) -> None:
    async with paged(common, Redundancy.PATH) as (client, _, new):
        await client.write_all()
        hypervisor = client.embedded.hypervisor
        if not released_first:
            await hypervisor.move("client", ClientMove(to=new))
        await once_free(lambda: hypervisor.release("client", ClientRelease(force=True)))
        await client.client.stop()
        if released_first:
            with pytest.raises(FarpageError, match="client client is released"):
                await hypervisor.move("client", ClientMove(to=new))
        else:
            while (await hypervisor.move_progress("client")).stage not in (MoveStage.DONE, MoveStage.FAILED):
                await asyncio.sleep(0.05)
        await hypervisor.adopt("client", ClientAdopt())
        root = client.embedded.layout.root
        second = await RegionProcess.start(root, PAGES, LIMIT, "client", version=1)
        try:
            assert await second.do(f"verify 0 {PAGES}") == "wrong 0"
        finally:
            await second.stop()


async def test_nothing_is_replaced_while_the_definition_is_not_known(common: EmbeddedSet) -> None:
    async with paged(common, Redundancy.PATH) as (client, old, new):
        hypervisor = client.embedded.hypervisor
        await kill_control(client.embedded)
        for copy in client.embedded.layout.hypervisor_dir.glob("definition*.json"):
            copy.unlink()
        client.signal("vios2", signal.SIGKILL)
        await client.embedded.vios_exited("vios2")
        await client.embedded.start_hypervisor()
        assert (await hypervisor.info()).definition_problem
        with pytest.raises(RemoteError) as caught:
            await hypervisor.replace_device(old, new)
        assert caught.value.code == "definition_unproven"
        await client.embedded.start_vios("vios2")
