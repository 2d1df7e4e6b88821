"""Keeps presence in a VIOS' state folder, one file for each volume that is copied.

    STATE/presence/VOLUME-ID.PRINCIPAL     a header, then blocks of bits (`farpage.vios.copying.presence`)

A block is written in its place: its checksum tells one that was torn, whose pages are then taken for absent.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection
from pathlib import Path

from farpage.device.label import sync_folder
from farpage.vios.copying.presence import (
    BLOCK_BYTES,
    Presence,
    PresenceKey,
    blocks_of,
    encode_header,
)

FOLDER_NAME = "presence"


class PresenceFile:
    """One volume's file. Its methods block; one thread at a time uses them."""

    def __init__(self, folder: Path, key: PresenceKey) -> None:
        """Name the file in `folder`."""
        self.path = folder / f"{key.volume_id}.{key.principal}"
        self._key = key
        self._descriptor = -1

    def load(self) -> Presence:
        """Return what is stored; with nothing present if that is about another move, or nothing is there.

        :raise OSError: the file can neither be read nor made.
        """
        # What bits are packed with: a VIOS starts without it, and a client must not wait for it at the first
        # block that is stored.
        import numpy  # noqa: F401

        self.path.parent.mkdir(mode=0o700, exist_ok=True)
        self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        presence = Presence(self._key.pages)
        header = encode_header(self._key)
        if os.pread(self._descriptor, BLOCK_BYTES, 0) == header:
            for index in range(1, blocks_of(self._key.pages)):
                block = os.pread(self._descriptor, BLOCK_BYTES, index * BLOCK_BYTES)
                if len(block) == BLOCK_BYTES:
                    presence.load(index, block, self._key)
        else:
            # The bits go before the new header comes, so they are never taken for this move's.
            os.ftruncate(self._descriptor, 0)
            os.fdatasync(self._descriptor)
            os.pwrite(self._descriptor, header, 0)
            os.fsync(self._descriptor)
            sync_folder(self.path.parent)
        return presence

    def store(self, blocks: dict[int, bytes]) -> None:
        """Put blocks on stable storage, each in its place.

        :raise OSError: then any of them may be stored or not.
        """
        for index, block in blocks.items():
            written = os.pwrite(self._descriptor, block, index * BLOCK_BYTES)
            if written != len(block):
                raise OSError("a block of presence was not written whole")
        os.fdatasync(self._descriptor)

    def close(self) -> None:
        """Let go of the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def remove(self) -> None:
        """Close and remove the file."""
        self.close()
        _remove([self.path])


def remove_presence(folder: Path, volume_id: str) -> None:
    """Remove what is stored about a volume."""
    _remove([path for path in _stored(folder) if path.name.partition(".")[0] == volume_id])


def remove_other_moves(folder: Path, current: Callable[[], Collection[str]]) -> None:
    """Remove what is stored about moves that are over; `current` tells the principals of those that are not.

    It is asked when the folder has been read: a move may begin meanwhile.
    """
    stored = _stored(folder)
    principals = current()
    _remove([path for path in stored if path.name.partition(".")[2] not in principals])


def _stored(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def _remove(paths: list[Path]) -> None:
    for path in paths:
        path.unlink(missing_ok=True)
    if paths:
        sync_folder(paths[0].parent)
