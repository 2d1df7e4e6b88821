"""A guest that goes on under another QEMU and another hypervisor, with its pages left on the device."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from farpage.api.remote import RemoteError
from farpage.embedded.set import EmbeddedSet
from farpage.guest import migration
from farpage.guest.qemu import GuestOptions
from farpage.guest.reports import PassDone
from farpage.hypervisor.model import ClientAdopt, ClientAttach, ClientRelease
from tests.guest.support import BOOT_TIMEOUT_SECONDS, BootGuest
from tests.guest.test_paging_a_guest import next_pass
from tests.support.second_hypervisor import second_hypervisor

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

MIB = 1 << 20
LIMIT_BYTES = 48 * MIB
STEP_SECONDS = 120.0


async def test_a_guest_paged_to_a_quarter_is_migrated_without_its_pages(
    embedded: EmbeddedSet, boot_guest: BootGuest, tmp_path: Path
) -> None:
    source = await boot_guest(GuestOptions(memory_mib=192, fill_mib=96))
    destination = await boot_guest(GuestOptions(memory_mib=192, fill_mib=96, incoming=True))
    devices = tmp_path / "devices"
    async with second_hypervisor(embedded) as other:
        await source.wait_for(lambda report: isinstance(report, PassDone), BOOT_TIMEOUT_SECONDS)
        await embedded.hypervisor.attach("vm1", ClientAttach(pid=source.pid, limit_bytes=LIMIT_BYTES))
        await next_pass(source)
        with pytest.raises(RemoteError) as caught:
            await embedded.hypervisor.release("vm1", ClientRelease())
        assert caught.value.code == "client_runs"
        for guest in (source, destination):
            await migration.capabilities(guest, migration.IGNORE_SHARED)
        await migration.save_devices(source, str(devices), STEP_SECONDS)
        assert devices.stat().st_size < 4 * MIB
        await embedded.hypervisor.release("vm1", ClientRelease(qmp=source.qmp_socket))
        await source.stop()
        await other.control.adopt("vm1", ClientAdopt())
        wanted = ClientAttach(pid=destination.pid, limit_bytes=LIMIT_BYTES)
        attached = await other.control.attach("vm1", wanted)
        assert attached.resident_bytes == 0
        assert attached.on_device_bytes > 96 * MIB
        await migration.load_devices(destination, str(devices), STEP_SECONDS)
        # To load its devices QEMU looks at a few pages of the guest's memory.
        assert (await other.control.client("vm1")).counters.page_in_pages < 2048
        async with asyncio.timeout(240):
            while len([report for report in destination.reports if isinstance(report, PassDone)]) < 2:
                await asyncio.sleep(0.05)
        assert [report.wrong for report in destination.reports if isinstance(report, PassDone)] == [0, 0]
        info = await other.control.client("vm1")
        assert (info.counters.poisoned_pages, info.counters.checksum_errors) == (0, 0)
        assert info.resident_bytes <= LIMIT_BYTES * 1.05
        await destination.stop()
