"""Real guests that check their memory while what pages it dies: the verifier in one, memtester in another.

`FARPAGE_OUTAGE_SECONDS` says how long both VIOS are away, for runs by hand: 4 unless it is set.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from farpage.definition.model import Redundancy
from farpage.embedded.set import EmbeddedSet, SetSettings
from farpage.guest.qemu import GuestOptions, QemuGuest
from farpage.guest.reports import Ended, PassDone
from farpage.hypervisor.model import ClientAttach, ClientCreate, ClientInfo
from farpage.volume.state import ReplicaHealth
from tests.guest.support import BOOT_TIMEOUT_SECONDS, BootGuest
from tests.guest.test_paging_a_guest import attach_while_it_boots, next_pass
from tests.support.paged_set import until_client

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

MIB = 1 << 20
VERIFIER = GuestOptions(memory_mib=160, fill_mib=48)
MEMTESTER = GuestOptions(memory_mib=128, commands=("MEMTESTER_TEST_MASK=0x01 memtester 36M 1",))
MEMTESTER_TIMEOUT_SECONDS = 400.0
OUTAGE_SECONDS = float(os.environ.get("FARPAGE_OUTAGE_SECONDS", "4"))


async def verifying(embedded: EmbeddedSet, boot_guest: BootGuest, name: str = "vm1") -> QemuGuest:
    """Return a guest with the verifier that is paged, under a name, to half of what it verifies."""
    guest = await boot_guest(VERIFIER)
    await guest.wait_for(lambda report: isinstance(report, PassDone), BOOT_TIMEOUT_SECONDS)
    await embedded.hypervisor.attach(name, ClientAttach(pid=guest.pid, limit_bytes=24 * MIB))
    await next_pass(guest)
    return guest


def wrong_pages(guest: QemuGuest) -> int:
    """Return the wrong pages of all passes so far."""
    return sum(report.wrong for report in guest.reports if isinstance(report, PassDone))


@pytest_asyncio.fixture(loop_scope="module")
async def mirroring() -> AsyncIterator[EmbeddedSet]:
    """A set of three VIOS with a device each, of the same name."""
    folder = Path(tempfile.mkdtemp(prefix="fpguest-", dir="/tmp"))
    devices = tuple(f"{vios}=dir:{folder / vios}" for vios in ("vios1", "vios2", "vios3"))
    settings = SetSettings(state_dir=folder / "s", vios_count=len(devices), workers=1, devices=devices)
    running = EmbeddedSet(settings)
    await running.start()
    try:
        yield running
    finally:
        await running.stop()
        shutil.rmtree(folder)


async def lose_the_host_daemons(embedded: EmbeddedSet) -> None:
    """Kill the control process and every worker, and start the hypervisor again."""
    workers = (await embedded.hypervisor.info()).workers
    embedded.supervise_hypervisor(False)
    embedded.kill_hypervisor(signal.SIGKILL)
    for worker in workers:
        os.kill(worker.pid, signal.SIGKILL)
    await embedded.hypervisor_exited()
    await embedded.start_hypervisor()


async def test_guests_go_on_while_their_hypervisor_is_killed_and_restarted_five_times(
    embedded: EmbeddedSet, boot_guest: BootGuest
) -> None:
    guest = await verifying(embedded, boot_guest)
    tested = await boot_guest(MEMTESTER)
    await attach_while_it_boots(embedded, tested, "vm2")
    for _ in range(5):
        await lose_the_host_daemons(embedded)
        await next_pass(guest)
        paged = await embedded.hypervisor.client("vm1")
        assert paged.pid == guest.pid
        assert paged.on_device_bytes > 0
    assert wrong_pages(guest) == 0
    await tested.wait_for(lambda report: isinstance(report, Ended), MEMTESTER_TIMEOUT_SECONDS)
    assert await tested.command_statuses(BOOT_TIMEOUT_SECONDS) == [0], "\n".join(tested.console)


async def test_a_guest_outlives_a_time_without_any_vios(embedded: EmbeddedSet, boot_guest: BootGuest) -> None:
    guest = await verifying(embedded, boot_guest, "waiting")
    for vios in embedded.vioses:
        embedded.supervise_vios(vios, supervised=False)
        embedded.kill_vios(vios, signal.SIGKILL)
    hypervisor = embedded.hypervisor
    # What was paged out may be read without a VIOS; it is what has to be paged out that waits.
    await until_client(
        hypervisor, "waiting", lambda info: info.without_path_seconds is not None, "without a path"
    )
    loop = asyncio.get_running_loop()
    back_at = loop.time() + OUTAGE_SECONDS
    while loop.time() < back_at:
        assert (await hypervisor.client("waiting")).without_path_seconds is not None
        await asyncio.sleep(0.1)
    for vios in embedded.vioses:
        await embedded.start_vios(vios)
    await next_pass(guest)
    assert wrong_pages(guest) == 0


def in_sync_on(*devices: str) -> Callable[[ClientInfo], bool]:
    """Return the condition that a client has replicas on these devices, all of them in sync."""
    wanted = dict.fromkeys(devices, ReplicaHealth.IN_SYNC)
    return lambda info: {replica.device: replica.state for replica in info.replicas} == wanted


async def mirrored(embedded: EmbeddedSet, boot_guest: BootGuest, name: str) -> tuple[QemuGuest, list[str]]:
    """Return a guest whose pages are mirrored, and the VIOSes of its replicas, which are all in sync."""
    wanted = ClientCreate(name=name, memory_bytes=VERIFIER.memory_mib * MIB, redundancy=Redundancy.MIRROR)
    await embedded.hypervisor.create_client(wanted)
    guest = await verifying(embedded, boot_guest, name)
    vioses = [replica.device for replica in (await embedded.hypervisor.client(name)).replicas]
    await until_client(embedded.hypervisor, name, in_sync_on(*vioses), "in sync")
    return guest, vioses


async def test_a_guest_goes_on_while_each_replica_of_its_mirror_is_lost_and_resynced_in_turn(
    mirroring: EmbeddedSet, boot_guest: BootGuest
) -> None:
    guest, vioses = await mirrored(mirroring, boot_guest, "vm1")
    for vios in vioses:
        mirroring.supervise_vios(vios, supervised=False)
        mirroring.kill_vios(vios, signal.SIGKILL)
        await next_pass(guest)
        paged = await mirroring.hypervisor.client("vm1")
        assert sorted(replica.state for replica in paged.replicas) == ["in_sync", "stale"]
        await mirroring.start_vios(vios)
        await until_client(mirroring.hypervisor, "vm1", in_sync_on(*vioses), "in sync")
    await next_pass(guest)
    assert wrong_pages(guest) == 0


async def test_a_guest_goes_on_while_a_lost_replica_of_its_mirror_is_replaced(
    mirroring: EmbeddedSet, boot_guest: BootGuest
) -> None:
    guest, (kept, lost) = await mirrored(mirroring, boot_guest, "vm2")
    (spare,) = set(mirroring.vioses) - {kept, lost}
    mirroring.supervise_vios(lost, supervised=False)
    mirroring.kill_vios(lost, signal.SIGKILL)
    await next_pass(guest)
    await mirroring.hypervisor.replace_device(lost, spare)
    await until_client(mirroring.hypervisor, "vm2", in_sync_on(kept, spare), "in sync on another device")
    # What the first pass after it reads, only the new replica has.
    mirroring.supervise_vios(kept, supervised=False)
    mirroring.kill_vios(kept, signal.SIGKILL)
    await next_pass(guest)
    assert wrong_pages(guest) == 0
