"""Unmodified Linux guests under QEMU, whose memory is paged while they check it."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from farpage.api.remote import RemoteError
from farpage.embedded.set import EmbeddedSet
from farpage.guest.image import GuestImage
from farpage.guest.qemu import GuestOptions, QemuGuest
from farpage.guest.reports import PassDone
from farpage.hypervisor.model import Attachment, ClientAttach
from tests.guest.support import BOOT_TIMEOUT_SECONDS, BootGuest, booted
from tests.support.paged_set import until_client

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

MIB = 1 << 20
PASS_TIMEOUT_SECONDS = 240.0
LIMIT_BYTES = 48 * MIB


def userfaultfds(pid: int) -> list[str]:
    """List the descriptors of a process that are userfaultfds."""
    folder = Path(f"/proc/{pid}/fd")
    return [entry.name for entry in folder.iterdir() if "userfaultfd" in str(entry.readlink())]


async def next_pass(guest: QemuGuest) -> PassDone:
    """Wait for a pass that begins after now, and return it."""
    done = max((report.number for report in guest.reports if isinstance(report, PassDone)), default=-1)
    report = await guest.wait_for(
        lambda report: isinstance(report, PassDone) and report.number >= done + 2, PASS_TIMEOUT_SECONDS
    )
    assert isinstance(report, PassDone)
    return report


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def guest(guest_image: GuestImage) -> AsyncIterator[QemuGuest]:
    """One guest that verifies, for the tests that leave it detached and at work; the last one ends it."""
    async with booted(guest_image, GuestOptions(memory_mib=192, fill_mib=96)) as verifying:
        await verifying.wait_for(lambda report: isinstance(report, PassDone), BOOT_TIMEOUT_SECONDS)
        yield verifying


async def test_memtester_finds_nothing_wrong_in_a_guest_paged_to_a_quarter(
    embedded: EmbeddedSet, boot_guest: BootGuest
) -> None:
    tested = await boot_guest(
        GuestOptions(memory_mib=112, commands=("MEMTESTER_TEST_MASK=0x03 memtester 30M 1",))
    )
    # The guest needs the rest itself, and what is tested is more than the limit: each of its passes is paged.
    await attach_while_it_boots(embedded, tested, "tested", limit_bytes=28 * MIB)
    assert await tested.command_statuses(400.0) == [0], "\n".join(tested.console)


async def attach_while_it_boots(
    embedded: EmbeddedSet, guest: QemuGuest, name: str, limit_bytes: int = 32 * MIB
) -> None:
    """Attach a guest, as the client of that name, as soon as QEMU has mapped its memory."""
    wanted = ClientAttach(pid=guest.pid, limit_bytes=limit_bytes)
    async with asyncio.timeout(BOOT_TIMEOUT_SECONDS):
        while True:
            try:
                await embedded.hypervisor.attach(name, wanted)
            except RemoteError as error:
                assert error.code == "no_shared_memory", error
                await asyncio.sleep(0.05)
            else:
                return


async def test_a_guest_is_attached_and_detached_five_times_while_it_runs(
    embedded: EmbeddedSet, guest: QemuGuest
) -> None:
    for _ in range(5):
        attached = await embedded.hypervisor.attach(
            "vm1", ClientAttach(pid=guest.pid, limit_bytes=LIMIT_BYTES)
        )
        assert attached.attachment is Attachment.PROCESS
        assert len(userfaultfds(guest.pid)) == 1
        await until_client(
            embedded.hypervisor,
            "vm1",
            lambda info: info.resident_bytes <= LIMIT_BYTES * 1.05 and info.on_device_bytes > 0,
            "paged to its limit",
        )
        await next_pass(guest)
        detached = await embedded.hypervisor.detach("vm1")
        assert detached.attachment is Attachment.NONE
        assert userfaultfds(guest.pid) == []
        await next_pass(guest)
    assert [report.wrong for report in guest.reports if isinstance(report, PassDone) and report.wrong] == []


async def test_a_real_guest_is_paused_by_qmp_while_no_path_works(
    embedded: EmbeddedSet, guest: QemuGuest
) -> None:
    wanted = ClientAttach(pid=guest.pid, limit_bytes=LIMIT_BYTES, qmp=guest.qmp_socket)
    await embedded.hypervisor.attach("vm1", wanted)
    await next_pass(guest)
    for vios in embedded.vioses:
        embedded.supervise_vios(vios, supervised=False)
        embedded.kill_vios(vios, signal.SIGKILL)
    async with asyncio.timeout(PASS_TIMEOUT_SECONDS):
        while not (await embedded.hypervisor.client("vm1")).guest_paused:
            await asyncio.sleep(0.05)
    for vios in embedded.vioses:
        await embedded.vios_exited(vios)
        await embedded.start_vios(vios)
    assert (await next_pass(guest)).wrong == 0
    info = await until_client(
        embedded.hypervisor, "vm1", lambda info: not info.guest_paused, "seen to run again"
    )
    assert info.counters.poisoned_pages == 0
    # Under TCG a virtual CPU that waits for a page stops only when it has it.
    alarms = [alarm.kind for alarm in await embedded.hypervisor.alarms()]
    assert alarms.index("guest_paused") < alarms.index("guest_resumed")
    assert (await guest.qmp("query-status"))["status"] == "running"
    await embedded.hypervisor.detach("vm1")


async def test_stopping_the_hypervisor_gives_a_guest_its_memory_back(
    embedded: EmbeddedSet, guest: QemuGuest
) -> None:
    await embedded.hypervisor.attach("vm1", ClientAttach(pid=guest.pid, limit_bytes=LIMIT_BYTES))
    await next_pass(guest)
    embedded.supervise_hypervisor(supervised=False)
    embedded.kill_hypervisor(signal.SIGTERM)
    await embedded.hypervisor_exited()
    assert userfaultfds(guest.pid) == []
    assert (await next_pass(guest)).wrong == 0
    await embedded.start_hypervisor()


async def test_a_guest_that_ends_while_it_is_paged_leaves_a_client_that_can_be_deleted(
    embedded: EmbeddedSet, guest: QemuGuest
) -> None:
    await embedded.hypervisor.attach("vm1", ClientAttach(pid=guest.pid, limit_bytes=LIMIT_BYTES))
    await next_pass(guest)
    await guest.stop()
    await until_client(
        embedded.hypervisor, "vm1", lambda info: info.attachment is Attachment.NONE, "noticed to have ended"
    )
    await embedded.hypervisor.delete_client("vm1")
    assert "vm1" not in [client.name for client in await embedded.hypervisor.clients()]
    for vios in embedded.vioses.values():
        assert "vm1" not in [volume.name for volume in await vios.volumes()]
