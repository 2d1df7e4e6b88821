"""QEMU's live migration of a guest, with and without its memory in the stream.

Stock QEMU copies guest RAM page by page through its stream (pre-copy), reading pages that are paged out back
in for it. With the capability `x-ignore-shared` it leaves out RAM that is shared - which RAM that farpage
pages always is - and the stream has the state of the devices alone; the RAM has to be there at the other end
by other means. See qapi/migration.json and migration/ram.c (`ramblock_is_ignored`) of QEMU.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from farpage.errors import ExitStatus, FarpageError
from farpage.guest.qemu import QemuGuest

IGNORE_SHARED = "x-ignore-shared"
UNLIMITED_BYTES_PER_SECOND = 1 << 40
POLL_SECONDS = 0.01


@dataclass(eq=False)
class MigrationFailed(FarpageError):
    """QEMU gave a migration up."""

    code = "migration_failed"
    template = "the migration of the guest ended as {status!r}: {problem}"
    remedy = "look into the log of both QEMU processes; the guest is where it was, and can be let run there"
    exit_status = ExitStatus.FAILURE
    status: str
    problem: str


@dataclass(frozen=True)
class Migrated:
    """What QEMU says of a migration that was completed, by its source."""

    stream_bytes: int
    """What went through the stream for RAM."""
    seconds: float
    downtime_seconds: float
    """As QEMU estimates it: from the stop of the guest to the end of the stream."""


async def capabilities(guest: QemuGuest, *names: str) -> None:
    """Switch migration capabilities on; to be done alike at both ends.

    :raise QmpFailed: QEMU has none of that name.
    """
    wanted = [{"capability": name, "state": True} for name in names]
    await guest.qmp("migrate-set-capabilities", capabilities=wanted)


async def pre_copy(
    source: QemuGuest, destination: QemuGuest, socket: str, timeout_seconds: float, *, resume: bool = False
) -> Migrated:
    """Migrate a guest with all of its memory; it runs at the destination then.

    With `resume` also one that was stopped for it.

    :raise MigrationFailed: it was given up, or has not converged in time.
    """
    await destination.qmp("migrate-incoming", uri=f"unix:{socket}")
    await source.qmp("migrate-set-parameters", **{"max-bandwidth": UNLIMITED_BYTES_PER_SECOND})
    await source.qmp("migrate", uri=f"unix:{socket}")
    found = await completed(source, timeout_seconds)
    if resume:
        await completed(destination, timeout_seconds)
        await destination.qmp("cont")
    await until_running(destination, timeout_seconds)
    return found


async def save_devices(source: QemuGuest, path: str, timeout_seconds: float) -> Migrated:
    """Stop a guest and write the state of its devices, all but its memory, to a file.

    It needs the capability `x-ignore-shared`. The guest touches nothing of its memory afterwards.

    :raise MigrationFailed: it was given up.
    """
    await source.qmp("stop")
    await source.qmp("migrate-set-parameters", **{"max-bandwidth": UNLIMITED_BYTES_PER_SECOND})
    await source.qmp("migrate", uri=f"exec:cat > {path}")
    return await completed(source, timeout_seconds)


async def load_devices(destination: QemuGuest, path: str, timeout_seconds: float) -> None:
    """Read what `save_devices` has written and let the guest run; its memory must be there.

    :raise MigrationFailed: it was given up.
    """
    await destination.qmp("migrate-incoming", uri=f"exec:cat {path}")
    await completed(destination, timeout_seconds)
    await destination.qmp("cont")
    await until_running(destination, timeout_seconds)


async def completed(guest: QemuGuest, timeout_seconds: float) -> Migrated:
    """Wait for the end of a migration.

    :raise MigrationFailed: it was given up, or takes too long.
    """
    status: dict[str, Any] = {}
    try:
        async with asyncio.timeout(timeout_seconds):
            while status.get("status") != "completed":
                status = await guest.qmp("query-migrate")
                if status.get("status") in ("failed", "cancelled"):
                    raise MigrationFailed(status["status"], status.get("error-desc", "it does not say why"))
                await asyncio.sleep(POLL_SECONDS)
    except TimeoutError:
        raise MigrationFailed(
            status.get("status", "none"), f"not completed in {timeout_seconds:g} s"
        ) from None
    return Migrated(
        stream_bytes=status.get("ram", {}).get("transferred", 0),
        seconds=status.get("total-time", 0) / 1000,
        downtime_seconds=status.get("downtime", 0) / 1000,
    )


async def until_running(guest: QemuGuest, timeout_seconds: float) -> None:
    """Wait until a guest runs.

    :raise MigrationFailed: it does not in time.
    """
    status = ""
    try:
        async with asyncio.timeout(timeout_seconds):
            while status != "running":
                status = (await guest.qmp("query-status"))["status"]
                await asyncio.sleep(POLL_SECONDS)
    except TimeoutError:
        raise MigrationFailed(status, f"the guest does not run after {timeout_seconds:g} s") from None
