"""A file system of a small size, which can be filled; needs root."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path


class SmallDevice:
    """A tmpfs at `folder`; its part `volumes` is for a directory device, the rest for ballast."""

    def __init__(self, folder: Path, size_bytes: int) -> None:
        self.folder = folder
        self.size_bytes = size_bytes

    @property
    def device(self) -> Path:
        """The folder to serve."""
        return self.folder / "device"

    @property
    def _ballast(self) -> Path:
        return self.folder / "ballast"

    def create(self) -> None:
        """Mount it.

        :raise CalledProcessError: not allowed.
        """
        self.folder.mkdir(parents=True)
        options = f"size={self.size_bytes},mode=700"
        subprocess.run(["mount", "-t", "tmpfs", "-o", options, "farpage-test", str(self.folder)], check=True)

    def fill(self) -> None:
        """Take all room that is left."""
        with self._ballast.open("wb") as ballast:
            length = 0
            while (room := os.statvfs(self.folder)).f_bavail:
                # Whoever else takes room meanwhile makes this one fail; then it is full as well.
                try:
                    os.posix_fallocate(ballast.fileno(), length, room.f_bavail * room.f_frsize)
                except OSError:
                    if not os.statvfs(self.folder).f_bavail:
                        return
                else:
                    length += room.f_bavail * room.f_frsize

    def empty(self) -> None:
        """Give the room back."""
        self._ballast.unlink(missing_ok=True)

    def remove(self) -> None:
        """Unmount it."""
        subprocess.run(["umount", str(self.folder)], check=True)
