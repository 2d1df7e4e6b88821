"""A device takes the place of another one under clients that work."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from farpage.definition.model import Redundancy
from farpage.errors import FarpageError
from farpage.hypervisor.model import ClientCreate, DeviceReplacement, ReplaceStage
from farpage.vios.model import DeviceAdd
from tests.support.paged_set import DEADLINE_SECONDS, PagedSet, paged_region, running_set

PAGES = 2048
LIMIT = 512 * 4096


@asynccontextmanager
async def paged(redundancy: Redundancy) -> AsyncIterator[tuple[PagedSet, str]]:
    """Page a region; the set has a device `spare` besides. Yields the device to replace too."""
    folder = Path(tempfile.mkdtemp(prefix="fprep-", dir="/tmp"))
    for name in ("a", "b", "spare"):
        (folder / name).mkdir()
    own = (f"vios1=dir:{folder / 'a'}", f"vios2=dir:{folder / 'b'}")
    try:
        async with running_set(devices=own if redundancy is Redundancy.MIRROR else ()) as embedded:
            wanted = ClientCreate(
                name="client", memory_bytes=PAGES * 4096, limit_bytes=LIMIT, redundancy=redundancy
            )
            await embedded.hypervisor.create_client(wanted)
            for vios in embedded.vioses.values():
                await vios.add_device(DeviceAdd(spec=f"dir:{folder / 'spare'}", name="spare"))
            definition = await embedded.hypervisor.refresh_devices()
            used = definition.clients["client"].volumes[0].replicas[0].device
            async with paged_region(embedded, PAGES, LIMIT) as client:
                yield client, definition.devices[used].name
    finally:
        shutil.rmtree(folder)


async def ended(paged: PagedSet, old: str) -> DeviceReplacement:
    """Wait until a replacement has ended."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not (replacement := await paged.embedded.hypervisor.replacement(old)).done:
            await asyncio.sleep(0.02)
    return replacement


async def volumes_on(paged: PagedSet, device: str) -> set[str]:
    """Return the volumes that the VIOS find on a device."""
    found = set()
    for vios in paged.embedded.vioses.values():
        ids = {known.id: known.name for known in await vios.devices()}
        found |= {volume.name for volume in await vios.volumes() if ids[volume.device] == device}
    return found


@pytest.mark.parametrize("redundancy", [Redundancy.PATH, Redundancy.MIRROR])
async def test_a_device_is_replaced_under_a_client_that_works(redundancy: Redundancy) -> None:
    async with paged(redundancy) as (client, old):
        await client.write_all()
        client.client.send(f"write 0 {PAGES}")
        begun = await client.embedded.hypervisor.replace_device(old, "spare")
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
        assert "spare" in devices
        assert info.redundancy is redundancy
        assert (await volumes_on(client, old), await volumes_on(client, "spare")) == (set(), {"client"})
        await client.until_alarm("device_replaced")
        if redundancy is Redundancy.MIRROR:
            client.signal("vios2", signal.SIGKILL)
            await client.verify_all()


async def test_a_worker_killed_while_it_copies_goes_on_in_another() -> None:
    async with paged(Redundancy.PATH) as (client, old):
        await client.write_all()
        await client.embedded.hypervisor.replace_device(old, "spare")
        workers = (await client.embedded.hypervisor.info()).workers
        os.kill(next(worker.pid for worker in workers if worker.clients), signal.SIGKILL)
        await client.write_all()
        replacement = await ended(client, old)
        assert [moved.stage for moved in replacement.clients] == [ReplaceStage.DONE]
        await client.verify_all()


async def test_a_client_that_is_not_attached_just_gets_its_volume_elsewhere() -> None:
    async with paged(Redundancy.PATH) as (client, old):
        wanted = ClientCreate(name="idle", memory_bytes=1 << 20, redundancy=Redundancy.PATH)
        hypervisor = client.embedded.hypervisor
        await client.client.stop()
        await hypervisor.create_client(wanted)
        definition = await hypervisor.definition()
        on = definition.devices[definition.clients["idle"].volumes[0].replicas[0].device].name
        to = "spare" if on == old else old
        with pytest.raises(FarpageError, match="they are one device"):
            await hypervisor.replace_device(on, on)
        await hypervisor.replace_device(on, to)
        assert all(moved.stage is ReplaceStage.DONE for moved in (await ended(client, on)).clients)
        assert "idle" in await volumes_on(client, to)
        assert await volumes_on(client, on) == set()
