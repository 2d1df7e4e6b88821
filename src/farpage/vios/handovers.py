"""The page tables of released clients: a file each in the VIOS' state folder, by volume identifier.

A file is there whole or not at all, and on the disk before whoever brings it is told so. The volume's
identifier and not its name makes the file's, so a volume that is made anew has none.
"""

from __future__ import annotations

import os
import threading
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from farpage import handover
from farpage.device.label import sync_folder
from farpage.errors import ExitStatus, FarpageError

FOLDER_NAME = "handovers"


@dataclass(eq=False)
class HandoverMissing(FarpageError):
    """No page table is stored for the volume."""

    code = "handover_not_found"
    template = "VIOS {vios!r} stores no handover of volume {volume!r}"
    remedy = "ask another VIOS that reaches the device; one is stored when a client is released"
    exit_status = ExitStatus.NOT_FOUND
    vios: str
    volume: str


@dataclass(eq=False)
class HandoverNotStored(FarpageError):
    """The state folder cannot be written."""

    code = "handover_not_stored"
    template = "the handover of volume {volume!r} cannot be stored in {folder}: {problem}"
    remedy = "make room there; the client stays where it is meanwhile"
    volume: str
    folder: str
    problem: str


class Handovers:
    """The stored ones. Safe to use from any thread."""

    def __init__(self, state_dir: Path) -> None:
        self.state_dir = state_dir
        self._folder = state_dir / FOLDER_NAME
        self._storing = threading.Lock()

    def store(self, volume: str, volume_id: str, encoded: bytes | bytearray) -> handover.Summary:
        """Keep a handover durably, in place of an older one of that volume; one that is damaged is refused.

        :raise HandoverDamaged: it is none, or of another volume.
        :raise HandoverOutdated: a later one is stored.
        :raise HandoverNotStored: there is no room.
        """
        summary = handover.check(encoded, whose=f"volume {volume!r}")
        if summary.volume != volume:
            raise handover.HandoverDamaged(f"volume {volume!r}", f"it is one of volume {summary.volume!r}")
        with self._storing:
            self._store(volume, self._path(volume_id), summary, encoded)
        return summary

    def _store(self, volume: str, path: Path, summary: handover.Summary, encoded: bytes | bytearray) -> None:
        fresh = path.with_suffix(".new")
        try:
            with suppress(FileNotFoundError, handover.HandoverDamaged):
                if summary.is_older(handover.check(path.read_bytes(), whose="")):
                    raise handover.HandoverOutdated(volume)
            self._folder.mkdir(mode=0o700, exist_ok=True)
            sync_folder(self._folder.parent)
            with fresh.open("wb") as file:
                file.write(encoded)
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(path)
            sync_folder(self._folder)
        except OSError as error:
            with suppress(OSError):
                fresh.unlink()
            raise HandoverNotStored(volume, str(self._folder), error.strerror or str(error)) from error

    def load(self, volume_id: str) -> bytes | None:
        """Read what is stored; None for nothing."""
        try:
            return self._path(volume_id).read_bytes()
        except FileNotFoundError:
            return None

    def remove(self, volume_id: str) -> None:
        """Forget a volume's, if there is one."""
        with suppress(FileNotFoundError):
            self._path(volume_id).unlink()

    def _path(self, volume_id: str) -> Path:
        return self._folder / volume_id
