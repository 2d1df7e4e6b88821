"""The page table of a client that goes to another hypervisor, as bytes: pure.

Every page is on the device, or was never written, or is lost; so one bit for each of the first and the last
and four bytes for each page on the device are all that there is to know:

    0     16   magic
    16    4    format version, 2
    20    4    length of the volume's name
    24    8    pages
    32    8    epoch under which the volume was written last
    40    8    number of the release, counted over the attachment of the client
    48    8    pages that are on the device
    56    32   SHA-256 of all that is not this field
    88    64   name of the volume, filled up with zeros
    152        bitmap of the pages on the device, least significant bit first
               bitmap of the lost pages
               checksums of the pages on the device, in their order, 4 bytes each

All numbers are little-endian. What comes from elsewhere is believed in nothing: `decode` checks each field
against the others, and against the length before it takes memory for pages.
"""

from __future__ import annotations

import hashlib
import re
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from farpage.errors import ExitStatus, FarpageError

if TYPE_CHECKING:  # a VIOS, which only checks handovers, starts without it
    import numpy as np
    import numpy.typing as npt

    Bits = npt.NDArray[np.bool_]
    Checksums = npt.NDArray[np.uint32]

MAGIC: Final = b"farpage handover"
VERSION: Final = 2
PAGES_MAX: Final = 1 << 40
"""4 PiB of memory."""

_HEAD: Final = struct.Struct("<16sIIQQQQ32s64s")
_DIGEST: Final = slice(56, 88)
_NAME: Final = re.compile(rb"[a-z0-9][a-z0-9._-]{0,62}")


@dataclass(eq=False)
class HandoverDamaged(FarpageError):
    """The bytes are no handover, or not those that were written."""

    code = "handover_damaged"
    template = "the handover of {whose} cannot be used: {problem}"
    remedy = (
        "it is used by nobody; fetch it from another VIOS that stores it, or release the client once more "
        "where it still is"
    )
    exit_status = ExitStatus.USAGE
    whose: str
    problem: str


@dataclass(eq=False)
class HandoverOutdated(FarpageError):
    """A later release has stored its own: this one comes late from one that was given up."""

    code = "handover_outdated"
    template = "the handover of volume {volume!r} is older than the one that is stored"
    remedy = "nothing is to be done: the stored one is kept"
    exit_status = ExitStatus.CONFLICT
    volume: str


@dataclass(frozen=True)
class Handover:
    """Where each page of a client is. `checksums` has an entry for every page, 0 where not on the device."""

    volume: str
    epoch: int
    attempt: int
    """Rises with each release that is begun, so that one that was given up is known when it comes late."""
    on_device: Bits
    lost: Bits
    checksums: Checksums

    @property
    def pages(self) -> int:
        """Pages of the client's memory."""
        return len(self.on_device)

    @property
    def on_device_pages(self) -> int:
        """Pages that only the device holds."""
        return int(self.on_device.sum())


def most_bytes(pages: int) -> int:
    """Return the length of the longest handover of so many pages."""
    return _HEAD.size + 2 * _map_bytes(pages) + 4 * pages


def encode(handover: Handover) -> bytes:
    """Return the bytes of a handover."""
    import numpy as np

    name = handover.volume.encode()
    head = bytearray(
        _HEAD.pack(
            MAGIC,
            VERSION,
            len(name),
            handover.pages,
            handover.epoch,
            handover.attempt,
            handover.on_device_pages,
            bytes(32),
            name,
        )
    )
    body = b"".join(
        (
            np.packbits(handover.on_device, bitorder="little").tobytes(),
            np.packbits(handover.lost, bitorder="little").tobytes(),
            handover.checksums[handover.on_device].astype("<u4").tobytes(),
        )
    )
    head[_DIGEST] = _digest(head, body)
    return bytes(head) + body


@dataclass(frozen=True)
class Summary:
    """What a handover says at its beginning."""

    volume: str
    epoch: int
    attempt: int
    pages: int
    on_device_pages: int
    digest: str
    """Hexadecimal digits."""

    def is_older(self, other: Summary) -> bool:
        """Tell whether it was made before another one of the same volume."""
        return (self.epoch, self.attempt) < (other.epoch, other.attempt)


def check(encoded: bytes | bytearray | memoryview, *, whose: str) -> Summary:
    """Look whether the bytes are a handover, whole and unchanged; `whose` is for messages.

    :raise HandoverDamaged: they are not, or of another version.
    """
    content = memoryview(encoded)
    if len(content) < _HEAD.size or bytes(content[: len(MAGIC)]) != MAGIC:
        raise HandoverDamaged(whose, "it does not begin as one")
    _, version, name_bytes, pages, epoch, attempt, on_device_pages, digest, padded = _HEAD.unpack_from(
        content
    )
    if version != VERSION:
        raise HandoverDamaged(whose, f"its format has version {version}, this farpage knows {VERSION}")
    name = padded[:name_bytes]
    if not _NAME.fullmatch(name) or padded != name.ljust(len(padded), b"\0"):
        raise HandoverDamaged(whose, "the name in it is no volume's")
    if not 0 < pages <= PAGES_MAX or not 0 < epoch < 1 << 53 or on_device_pages > pages:
        raise HandoverDamaged(whose, f"{on_device_pages} of {pages} pages at epoch {epoch} cannot be")
    expected_bytes = _HEAD.size + 2 * _map_bytes(pages) + 4 * on_device_pages
    if len(content) != expected_bytes:
        raise HandoverDamaged(whose, f"it has {len(content)} bytes instead of {expected_bytes}")
    if _digest(content[: _HEAD.size], content[_HEAD.size :]) != digest:
        raise HandoverDamaged(whose, "its digest does not match")
    return Summary(name.decode(), epoch, attempt, pages, on_device_pages, digest.hex())


def decode(encoded: bytes | bytearray | memoryview, *, whose: str) -> Handover:
    """Read a handover; `whose` is for messages.

    :raise HandoverDamaged: it is none, of another version, contradicts itself, or was changed.
    """
    import numpy as np

    summary = check(encoded, whose=whose)
    maps = memoryview(encoded)[_HEAD.size :]
    map_bytes = _map_bytes(summary.pages)
    on_device = _bits(maps[:map_bytes], summary.pages)
    lost = _bits(maps[map_bytes : 2 * map_bytes], summary.pages)
    if on_device is None or lost is None or int(np.count_nonzero(on_device)) != summary.on_device_pages:
        raise HandoverDamaged(whose, "its bitmaps do not fit the number of its pages")
    if bool((on_device & lost).any()):
        raise HandoverDamaged(whose, "a page in it is both on the device and lost")
    checksums = np.zeros(summary.pages, np.uint32)
    checksums[on_device] = np.frombuffer(maps[2 * map_bytes :], "<u4")
    return Handover(summary.volume, summary.epoch, summary.attempt, on_device, lost, checksums)


def _map_bytes(pages: int) -> int:
    return -(-pages // 8)


def _bits(packed: memoryview, pages: int) -> Bits | None:
    """Unpack a bitmap; None when there are bits behind the last page."""
    import numpy as np

    bits = np.unpackbits(np.frombuffer(packed, np.uint8), bitorder="little").astype(np.bool_)
    return None if bool(bits[pages:].any()) else bits[:pages]


def _digest(head: bytes | bytearray | memoryview, body: bytes | memoryview) -> bytes:
    covered = bytearray(head)
    covered[_DIGEST] = bytes(32)
    found = hashlib.sha256(covered)
    found.update(body)
    return found.digest()
