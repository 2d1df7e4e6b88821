"""Clients whose volume has replicas on the devices of two VIOS: each may be lost, full or replaced."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
import pytest_asyncio

from farpage.definition.model import Redundancy, ReplicaState
from farpage.embedded.set import EmbeddedSet
from farpage.errors import FarpageError
from farpage.hypervisor.model import ClientCreate, ClientInfo, ScrubStart
from farpage.pager.progress import ScrubState
from tests.faults.campaign.damage import flip_pages
from tests.support.losses import heal
from tests.support.paged_set import PagedSet, paged_region, running_set
from tests.support.processes import kill_and_wait, worker_pid

pytestmark = pytest.mark.asyncio(loop_scope="module")

PAGES = 2048
LIMIT = 512 * 4096
SMALL_BYTES = 64 << 20


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    """Where the devices are; that of vios2 has 64 MiB, which needs root."""
    made = Path(tempfile.mkdtemp(prefix="fpmir-", dir="/tmp"))
    for name in ("a", "b"):
        (made / name).mkdir()
    try:
        subprocess.run(
            ["mount", "-t", "tmpfs", "-o", f"size={SMALL_BYTES}", "farpage-test", str(made / "b")], check=True
        )
        try:
            yield made
        finally:
            subprocess.run(["umount", "-l", str(made / "b")], check=True)
    finally:
        shutil.rmtree(made)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def mirroring(folder: Path) -> AsyncIterator[EmbeddedSet]:
    """Two VIOS with a device each."""
    async with running_set(
        workers=1, devices=(f"vios1=dir:{folder / 'a'}", f"vios2=dir:{folder / 'b'}")
    ) as embedded:
        yield embedded


@pytest_asyncio.fixture(loop_scope="module")
async def paged(mirroring: EmbeddedSet) -> AsyncIterator[PagedSet]:
    """Page a region to both devices."""
    await heal(mirroring)
    hypervisor = mirroring.hypervisor
    if "client" in [known.name for known in await hypervisor.clients()]:
        await hypervisor.delete_client("client")
    wanted = ClientCreate(
        name="client", memory_bytes=PAGES * 4096, limit_bytes=LIMIT, redundancy=Redundancy.MIRROR
    )
    await hypervisor.create_client(wanted)
    async with paged_region(mirroring, PAGES, LIMIT) as client:
        yield client


def health(info: ClientInfo) -> dict[str, str]:
    """Return the states of the replicas by the VIOS of their device."""
    of = {path.device: path.vios for path in info.paths}
    return {of[replica.device]: replica.state.value for replica in info.replicas}


async def stored_states(paged: PagedSet, vios: str) -> set[ReplicaState]:
    """Return the replica states that a VIOS stores."""
    definition = await paged.embedded.vioses[vios].definition()
    return {replica.state for replica in definition.clients["client"].volumes[0].replicas}


async def test_a_vios_is_killed_and_comes_back_with_its_replica_resynced(paged: PagedSet) -> None:
    await paged.write_all()
    paged.signal("vios1", signal.SIGKILL)
    await paged.write_all()
    await paged.verify_all()
    info = await paged.info()
    assert health(info) == {"vios1": "stale", "vios2": "in_sync"}
    assert await stored_states(paged, "vios2") == {ReplicaState.IN_SYNC, ReplicaState.STALE}
    missed = next(replica.dirty_pages for replica in info.replicas if replica.state.value == "stale")
    assert 0 < missed <= PAGES
    await paged.restart("vios1")
    await paged.until(lambda info: set(health(info).values()) == {"in_sync"}, "in sync")
    await paged.until_alarm("replica_resynced")
    assert await stored_states(paged, "vios2") == {ReplicaState.IN_SYNC}
    paged.signal("vios2", signal.SIGKILL)
    await paged.verify_all()


async def test_a_vios_that_hangs_costs_its_replica_alone(paged: PagedSet) -> None:
    await paged.write_all()
    paged.signal("vios2", signal.SIGSTOP)
    await paged.write_all()
    await paged.verify_all()
    assert health(await paged.info()) == {"vios1": "in_sync", "vios2": "stale"}
    paged.embedded.kill_vios("vios2", signal.SIGCONT)
    await paged.until(lambda info: set(health(info).values()) == {"in_sync"}, "in sync")
    paged.signal("vios1", signal.SIGKILL)
    await paged.verify_all()


async def test_a_full_device_costs_its_replica_alone(paged: PagedSet, folder: Path) -> None:
    ballast = folder / "b" / "ballast"
    free = os.statvfs(folder / "b")
    ballast.write_bytes(bytes(free.f_bavail * free.f_frsize - (1 << 20)))
    try:
        await paged.write_all()
        info = await paged.until(lambda info: health(info)["vios2"] == "stale", "stale")
        assert health(info)["vios1"] == "in_sync"
        assert not info.device_full
        await paged.until_alarm("replica_stale")
        await paged.verify_all()
        assert (await paged.info()).resident_bytes <= LIMIT
    finally:
        ballast.unlink()
    await paged.until(lambda info: set(health(info).values()) == {"in_sync"}, "in sync")
    paged.signal("vios1", signal.SIGKILL)
    await paged.verify_all()


async def test_bits_flipped_on_each_replica_are_read_from_the_other_and_put_right(
    paged: PagedSet, folder: Path
) -> None:
    """No page is wrong on both."""
    await paged.write_all()
    flipped = {name: folder / name / "volumes" / "client" for name in ("a", "b")}
    for parity, volume in enumerate(flipped.values()):
        assert flip_pages(volume, range(parity, PAGES, 2)) > 0
    await paged.verify_all()
    counters = (await paged.info()).counters
    assert counters.repaired_pages > 0
    assert counters.checksum_errors >= counters.repaired_pages
    assert counters.poisoned_pages == 0
    await paged.until_alarm("checksum")
    await paged.embedded.hypervisor.start_scrub("client", ScrubStart(rate_bytes=1 << 30))
    await paged.until(
        lambda info: info.scrub is not None and info.scrub.state is not ScrubState.RUNNING, "scrubbed"
    )
    paged.signal("vios1", signal.SIGKILL)
    await paged.verify_all()


async def test_a_mirror_without_two_independent_devices_is_refused() -> None:
    async with running_set(vios_count=1) as embedded:
        wanted = ClientCreate(name="vm1", memory_bytes=1 << 20, redundancy=Redundancy.MIRROR)
        with pytest.raises(FarpageError, match="no second device over another VIOS"):
            await embedded.hypervisor.create_client(wanted)
        assert "vm1" not in {client.name for client in await embedded.hypervisor.clients()}


async def test_deleting_a_mirrored_client_deletes_both_volumes(paged: PagedSet) -> None:
    await paged.client.stop()
    async with asyncio.timeout(60):
        while (await paged.info()).attachment.value != "none":
            await asyncio.sleep(0.05)
    await paged.embedded.hypervisor.delete_client("client")
    for vios in paged.embedded.vioses.values():
        assert await vios.volumes() == ()


async def test_a_worker_killed_with_page_outs_in_flight_leaves_both_replicas_right(paged: PagedSet) -> None:
    await paged.write_all()
    paged.signal("vios1", signal.SIGSTOP)
    paged.client.send(f"write 0 {PAGES}")
    await paged.until_sent("vios1")
    await kill_and_wait(await worker_pid(paged.embedded, "client"))
    paged.signal("vios1", signal.SIGCONT)
    assert await paged.client.answer() == "done"
    await paged.until_alarm("worker_recovered")
    await paged.verify_all()
    await paged.until(lambda info: set(health(info).values()) == {"in_sync"}, "in sync")
    for lost in ("vios1", "vios2"):
        paged.signal(lost, signal.SIGKILL)
        await paged.verify_all()
        await paged.restart(lost)
        await paged.until(lambda info: set(health(info).values()) == {"in_sync"}, "in sync again")
