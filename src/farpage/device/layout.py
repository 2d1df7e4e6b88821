"""What lies in the first MiB of a device that holds one volume: label, volume and claims. Pure.

    0       label slot 0      4096 bytes each
    4096    label slot 1
    8192    claim slots 0-5
    1 MiB   the volume

The label says what the device is and which volume it holds. A new one goes into the slot that the
present one is not in, so that a write cut short leaves the present one whole; the highest sequence number
counts. The claims of epoch *e* go into claim slot *e* modulo 6, which holds the latest of all earlier claims
too: so two servers that record different epochs at the same moment do not overwrite each other's, even
where the storage has neither locks nor compare-and-swap. Every slot carries a checksum.
"""

from __future__ import annotations

import datetime
import struct
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Final, Literal

import xxhash
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from farpage.device.base import BLOCK_BYTES
from farpage.device.claim import Claim, Claims

SLOT_BYTES: Final = BLOCK_BYTES
LABEL_SLOTS: Final = 2
CLAIM_SLOTS: Final = 6
HEADER_BYTES: Final = (LABEL_SLOTS + CLAIM_SLOTS) * SLOT_BYTES
DATA_OFFSET_BYTES: Final = 1 << 20
"""Where the volume begins. What is between it and the header is for later formats."""

CLAIMS_KEPT: Final = 64
"""So many of the latest claims a slot holds."""

_LABEL_MAGIC: Final = b"farpage device\x01\n"
_CLAIMS_MAGIC: Final = b"farpage claims\x01\n"
_SLOT: Final = struct.Struct("<16sQQI4x")
"""Magic, checksum (xxh3_64 of all that follows it in the slot), sequence number, length of the JSON text."""
_CHECKED_FROM: Final = 24


class VolumeEntry(BaseModel):
    """The volume that the device holds."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    id: str = Field(pattern=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")
    size_bytes: int = Field(gt=0)


class DeviceLabel(BaseModel):
    """What identifies a device: the same `uuid` seen by two VIOS is the same device.

    `size_bytes` is the room for the volume.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    format: Literal[1] = 1
    uuid: str = Field(
        pattern=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$", default_factory=lambda: str(uuid.uuid4())
    )
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    size_bytes: int = Field(gt=0)
    created: str = Field(
        default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    )
    volume: VolumeEntry | None = None


class _ClaimList(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    volume: str
    claims: tuple[tuple[int, str], ...]


@dataclass(frozen=True)
class Write:
    """Bytes to write at an offset of the device."""

    offset: int
    data: bytes


@dataclass(frozen=True)
class Header:
    """The first `HEADER_BYTES` of a device, understood; `label` is None where it has none."""

    label: DeviceLabel | None
    sequence: int
    claims: tuple[Claim, ...]
    """Those of the label's volume, oldest first."""

    def label_write(self, label: DeviceLabel) -> Write:
        """Return the write that replaces the label."""
        sequence = self.sequence + 1
        data = _encode(_LABEL_MAGIC, sequence, label.model_dump_json())
        return Write(sequence % LABEL_SLOTS * SLOT_BYTES, data)

    def claim_write(self, claim: Claim) -> Write:
        """Return the write that adds a claim of the label's volume."""
        assert self.label is not None and self.label.volume is not None
        kept = (*self.claims, claim)[-CLAIMS_KEPT:]
        entry = _ClaimList(
            volume=self.label.volume.id, claims=tuple((item.epoch, item.owner) for item in kept)
        )
        slot = LABEL_SLOTS + claim.epoch % CLAIM_SLOTS
        return Write(slot * SLOT_BYTES, _encode(_CLAIMS_MAGIC, claim.epoch, entry.model_dump_json()))

    @cached_property
    def claimed(self) -> Claims:
        """The claims under the rule by which one replaces another; not to be added to."""
        claimed = Claims()
        for claim in self.claims:
            claimed.add(claim)
        return claimed

    def volume(self, name: str) -> VolumeEntry | None:
        """Return the device's volume if it has that name."""
        entry = self.label.volume if self.label else None
        return entry if entry is not None and entry.name == name else None


def parse_header(data: bytes | bytearray | memoryview) -> Header:
    """Understand the first `HEADER_BYTES` of a device.

    :raise ValueError: there is a label, and it is damaged or of another format.
    """
    slots = [bytes(data[at : at + SLOT_BYTES]) for at in range(0, HEADER_BYTES, SLOT_BYTES)]
    label, sequence = _newest_label(slots[:LABEL_SLOTS])
    if label is None and any(slot.startswith(_CLAIMS_MAGIC) for slot in slots[LABEL_SLOTS:]):
        raise ValueError("its label is gone, and the claims of a volume are there")
    claims: tuple[Claim, ...] = ()
    if label is not None and label.volume is not None:
        claims = _merged(slots[LABEL_SLOTS:], label.volume.id)
    return Header(label, sequence, claims)


def _newest_label(slots: Iterable[bytes]) -> tuple[DeviceLabel | None, int]:
    found: list[tuple[int, str]] = []
    damaged = ""
    for slot in slots:
        if slot.startswith(_LABEL_MAGIC):
            try:
                found.append(_decode(slot))
            except ValueError as error:
                damaged = str(error)
    if not found:
        if damaged:
            raise ValueError(f"its label is damaged: {damaged}")
        return None, 0
    sequence, text = max(found)
    try:
        return DeviceLabel.model_validate_json(text), sequence
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(map(str, problem["loc"])) or "contents"
        raise ValueError(f"its label is not as it should be: {where}: {problem['msg']}") from error


def _merged(slots: Iterable[bytes], volume_id: str) -> tuple[Claim, ...]:
    """Put the claims of all slots together, in the order of their epochs.

    Of two claims of one epoch the one that was written last counts: it is in the slot of that epoch.
    """
    by_epoch: dict[int, tuple[int, Claim]] = {}
    for slot in slots:
        if not slot.startswith(_CLAIMS_MAGIC):
            continue
        try:
            written, text = _decode(slot)
            entry = _ClaimList.model_validate_json(text)
        except ValueError:
            # A write was cut short. The claims before it are in other slots, and nobody was told of this one.
            continue
        if entry.volume != volume_id:
            continue
        for epoch, owner in entry.claims:
            known = by_epoch.get(epoch)
            own_slot = epoch == written
            if known is None or own_slot or (known[0] != epoch and written > known[0]):
                by_epoch[epoch] = (written, Claim(epoch, owner))
    return tuple(by_epoch[epoch][1] for epoch in sorted(by_epoch))


def _encode(magic: bytes, sequence: int, text: str) -> bytes:
    payload = text.encode()
    rest = (_SLOT.pack(magic, 0, sequence, len(payload))[_CHECKED_FROM:] + payload).ljust(
        SLOT_BYTES - _CHECKED_FROM, b"\0"
    )
    if len(rest) != SLOT_BYTES - _CHECKED_FROM:
        raise ValueError("it does not fit into a slot")
    return magic + xxhash.xxh3_64_intdigest(rest).to_bytes(8, "little") + rest


def _decode(slot: bytes) -> tuple[int, str]:
    """Return sequence number and text of a slot.

    :raise ValueError: its checksum is wrong.
    """
    _magic, checksum, sequence, length = _SLOT.unpack_from(slot)
    if xxhash.xxh3_64_intdigest(slot[_CHECKED_FROM:]) != checksum or length > len(slot) - _SLOT.size:
        raise ValueError("its checksum is wrong")
    return sequence, slot[_SLOT.size : _SLOT.size + length].decode()


def room_bytes(storage_bytes: int) -> int:
    """Return what is left for the volume on storage of that size; 0 if it is too small."""
    return max(0, storage_bytes - DATA_OFFSET_BYTES) // BLOCK_BYTES * BLOCK_BYTES
