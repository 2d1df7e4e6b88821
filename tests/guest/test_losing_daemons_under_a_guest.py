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
    """A set of two VIOS with a device each."""
    folder = Path(tempfile.mkdtemp(prefix="fpguest-", dir="/tmp"))
    devices = tuple(f"{vios}=dir:{folder / vios}" for vios in ("vios1", "vios2"))
    running = EmbeddedSet(SetSettings(state_dir=folder / "s", workers=1, devices=devices))
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


def replicas_are(state: ReplicaHealth) -> Callable[[ClientInfo], bool]:
    """Return the condition that every replica of a client is in one state."""
    return lambda info: len(info.replicas) == 2 and all(replica.state is state for replica in info.replicas)


async def test_a_guest_goes_on_while_each_replica_of_its_mirror_is_lost_and_resynced_in_turn(
    mirroring: EmbeddedSet, boot_guest: BootGuest
) -> None:
    wanted = ClientCreate(name="vm1", memory_bytes=VERIFIER.memory_mib * MIB, redundancy=Redundancy.MIRROR)
    await mirroring.hypervisor.create_client(wanted)
    guest = await verifying(mirroring, boot_guest)
    for vios in mirroring.vioses:
        in_sync = replicas_are(ReplicaHealth.IN_SYNC)
        await until_client(mirroring.hypervisor, "vm1", in_sync, "in sync")
        mirroring.supervise_vios(vios, supervised=False)
        mirroring.kill_vios(vios, signal.SIGKILL)
        await next_pass(guest)
        paged = await mirroring.hypervisor.client("vm1")
        assert sorted(replica.state for replica in paged.replicas) == ["in_sync", "stale"]
        await mirroring.start_vios(vios)
        await until_client(mirroring.hypervisor, "vm1", in_sync, "in sync")
    await next_pass(guest)
    assert wrong_pages(guest) == 0
