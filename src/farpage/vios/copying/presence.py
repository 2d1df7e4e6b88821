"""Which pages of a volume its new device has. No I/O.

In memory it is a byte for each page, which is looked at for each page-in; on storage a bit. A bit may be
missing there although the device has the page, never the other way around: the old device has every page
until the end, so what is missing is fetched from there once more.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import xxhash

BLOCK_BYTES: Final = 4096
"""What is written at once; storage writes it whole or leaves it as it was, or its checksum tells."""
_CHECKSUM: Final = struct.Struct("<Q")
_BITS_BYTES: Final = BLOCK_BYTES - _CHECKSUM.size
BLOCK_PAGES: Final = _BITS_BYTES * 8
"""Pages whose bits are in one block."""

_MAGIC: Final = b"farpage presence\n"
_HEADER: Final = struct.Struct("<17sB36s16sQ")
_VERSION: Final = 1


@dataclass(frozen=True)
class PresenceKey:
    """What presence is about: another volume, or another move of the same one, begins with nothing."""

    volume_id: str
    """UUID of the volume on its new device."""
    principal: str
    """Token of the move."""
    pages: int


class Presence:
    """The pages that are present, and which blocks of the file have changed since they were stored."""

    def __init__(self, pages: int) -> None:
        """Begin with none."""
        self.pages = pages
        self.present = bytearray(pages)
        """1 for each page that is present."""
        self.count = 0
        self._changed: set[int] = set()

    def __len__(self) -> int:
        return self.pages

    @property
    def complete(self) -> bool:
        """Whether every page is present."""
        return self.count == self.pages

    def has(self, start: int, end: int) -> bool:
        """Tell whether all pages from `start` up to `end` are present."""
        return self.present.find(0, start, end) < 0

    def add(self, start: int, end: int) -> None:
        """Note that the pages from `start` up to `end` are present."""
        absent = self.present.count(0, start, end)
        if absent:
            self.present[start:end] = b"\1" * (end - start)
            self.count += absent
            self._changed.update(range(start // BLOCK_PAGES, (end - 1) // BLOCK_PAGES + 1))

    def runs(self, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
        """Return the runs of pages: where each begins and ends, and whether it is present."""
        return runs(self.present, start, end)

    # Storage

    @property
    def changed(self) -> bool:
        """Whether anything is not stored."""
        return bool(self._changed)

    def take_changed(self, key: PresenceKey) -> dict[int, bytes]:
        """Return the blocks to store, by their place in the file, and take them for stored."""
        changed, self._changed = self._changed, set()
        return {index + 1: self._block(index, key) for index in changed}

    def put_back(self, blocks: dict[int, bytes]) -> None:
        """Note that blocks were not stored."""
        self._changed.update(index - 1 for index in blocks)

    def load(self, index: int, block: bytes, key: PresenceKey) -> bool:
        """Take over the block at a place in the file; False, and nothing taken over, if it is not whole."""
        bits, checksum = block[:_BITS_BYTES], block[_BITS_BYTES:]
        if checksum != _checksum(bits, index, key):
            return False
        import numpy as np

        start = (index - 1) * BLOCK_PAGES
        end = min(start + BLOCK_PAGES, self.pages)
        found = np.unpackbits(np.frombuffer(bits, np.uint8), count=end - start, bitorder="little")
        self.present[start:end] = found.tobytes()
        self.count += int(found.sum())
        return True

    def _block(self, index: int, key: PresenceKey) -> bytes:
        import numpy as np

        start = index * BLOCK_PAGES
        pages = np.frombuffer(bytes(self.present[start : start + BLOCK_PAGES]), np.uint8)
        bits = np.packbits(pages, bitorder="little").tobytes().ljust(_BITS_BYTES, b"\0")
        return bits + _checksum(bits, index + 1, key)


def runs(flags: bytearray, start: int, end: int) -> Iterator[tuple[int, int, bool]]:
    """Return the runs of like flags (0 or 1): where each begins and ends, and whether it is set."""
    while start < end:
        here = flags[start]
        stop = flags.find(1 - here, start, end)
        stop = end if stop < 0 else stop
        yield start, stop, bool(here)
        start = stop


def blocks_of(pages: int) -> int:
    """Return how many blocks a file has, its header included."""
    return 1 + -(-pages // BLOCK_PAGES)


def encode_header(key: PresenceKey) -> bytes:
    """Return the file's first block."""
    header = _HEADER.pack(_MAGIC, _VERSION, key.volume_id.encode(), key.principal.encode(), key.pages)
    padded = header.ljust(_BITS_BYTES, b"\0")
    return padded + _CHECKSUM.pack(xxhash.xxh3_64_intdigest(padded))


def _checksum(bits: bytes, index: int, key: PresenceKey) -> bytes:
    """Return the checksum of a block in its place: one of another file, or of another place, is not valid."""
    seed = xxhash.xxh3_64_intdigest(f"{key.volume_id} {key.principal} {key.pages} {index}".encode())
    return _CHECKSUM.pack(xxhash.xxh3_64_intdigest(bits, seed))
