"""The demo's real guest: Linux in an unmodified QEMU, attached to while it runs."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from farpage.demo.guests import CLIENT, DemoGuest, GuestDied, GuestSettings
from farpage.demo.reports import FillReport, PassReport
from farpage.embedded.set import EmbeddedSet
from farpage.errors import InvalidInput
from farpage.guest.image import build_image
from farpage.guest.qemu import GuestOptions, QemuGuest
from farpage.guest.reports import Failed, Filled, PassDone, Started, WrongWord
from farpage.hypervisor.model import ClientAttach

MIB = 1 << 20


class VirtualGuest(DemoGuest):
    """A QEMU guest that fills and checks its memory; QEMU knows nothing of farpage."""

    kind = "qemu"
    paged_from_start = False

    def __init__(self, settings: GuestSettings, tell: Callable[[str], None]) -> None:
        super().__init__(settings, tell)
        for option, size_bytes in (("--memory", settings.memory_bytes), ("--fill", settings.fill_bytes)):
            if size_bytes % MIB:
                raise InvalidInput(option, "a QEMU guest takes whole MiB", "use a size like 512M")
        self._guest: QemuGuest | None = None
        self._seen = 0

    async def start(self, embedded: EmbeddedSet) -> None:
        """Build the guest's image if this is the first time, and boot it.

        :raise FarpageError: a program that is needed is missing, or a step of building failed.
        """
        image = await asyncio.to_thread(build_image)
        options = GuestOptions(
            memory_mib=self.settings.memory_bytes // MIB, fill_mib=self.settings.fill_bytes // MIB
        )
        self._guest = QemuGuest(image, options, self.settings.folder)
        await self._guest.start()
        self._tell(f"QEMU boots Linux with {options.memory_mib} MiB, pid {self._guest.pid}")

    async def limit(self, embedded: EmbeddedSet, limit_bytes: int) -> None:
        """Attach to the running QEMU."""
        assert self._guest is not None
        await embedded.hypervisor.attach(CLIENT, ClientAttach(pid=self._guest.pid, limit_bytes=limit_bytes))
        self._tell(f"attached to the running QEMU, pid {self._guest.pid}")

    async def memory_pids(self, embedded: EmbeddedSet) -> list[int]:
        """Return QEMU's process."""
        assert self._guest is not None
        return [self._guest.pid]

    def poll(self) -> None:
        """Take the reports that the guest's console has brought."""
        assert self._guest is not None
        new = self._guest.reports[self._seen :]
        self._seen += len(new)
        for report in new:
            match report:
                case Started(uptime_seconds=uptime_seconds):
                    self._tell(f"Linux has booted in {uptime_seconds:.1f} s")
                case Filled(pages=pages, seconds=seconds):
                    self._heard(FillReport(pages=pages, seconds=seconds))
                case PassDone(pages=pages, wrong=wrong, seconds=seconds, longest_stall_ms=gap_ms):
                    self._heard(
                        PassReport(
                            pages_verified=pages - wrong,
                            pages_wrong=wrong,
                            seconds=seconds,
                            longest_gap_ms=gap_ms,
                        )
                    )
                case WrongWord(page=page, version=version, expected=expected, found=found):
                    self._tell(f"page {page}, version {version}: {found} instead of {expected}")
                case Failed(cause=cause):
                    raise GuestDied(f"failed ({cause})", str(self._guest.log))
        if not self._guest.running:
            raise GuestDied(f"ended: {' | '.join(list(self._guest.console)[-3:])}", str(self._guest.log))

    async def stop(self) -> None:
        """End QEMU."""
        if self._guest is not None:
            await self._guest.stop()
