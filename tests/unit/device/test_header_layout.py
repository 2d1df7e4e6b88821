from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farpage.device.claim import Claim
from farpage.device.layout import (
    CLAIM_SLOTS,
    CLAIMS_KEPT,
    DATA_OFFSET_BYTES,
    HEADER_BYTES,
    LABEL_SLOTS,
    SLOT_BYTES,
    DeviceLabel,
    Header,
    VolumeEntry,
    Write,
    parse_header,
    room_bytes,
)

VOLUME = VolumeEntry(name="vm1", id="9ebffa09-bce1-473f-badc-f9a816dadf33", size_bytes=1 << 20)
OTHER = VOLUME.model_copy(update={"id": "00000000-bce1-473f-badc-f9a816dadf33"})
LABEL = DeviceLabel(name="disk1", size_bytes=1 << 30, volume=VOLUME)
ALICE, BOB = "a" * 16, "b" * 16


def put(disk: bytearray, write: Write) -> None:
    assert write.offset % SLOT_BYTES == 0
    assert len(write.data) == SLOT_BYTES
    disk[write.offset : write.offset + SLOT_BYTES] = write.data


def labelled() -> bytearray:
    disk = bytearray(HEADER_BYTES)
    put(disk, parse_header(disk).label_write(LABEL))
    return disk


def claimed(disk: bytearray, *claims: Claim) -> Header:
    for claim in claims:
        put(disk, parse_header(disk).claim_write(claim))
    return parse_header(disk)


def test_blank_storage_has_no_label() -> None:
    assert parse_header(bytes(HEADER_BYTES)) == Header(None, 0, ())


def test_what_is_no_label_is_none() -> None:
    assert parse_header(b"\xff" * HEADER_BYTES).label is None


def test_a_label_is_read_as_it_was_written() -> None:
    header = parse_header(labelled())
    assert header.label == LABEL
    assert header.volume("vm1") == VOLUME
    assert header.volume("vm2") is None
    assert header.claims == ()


def test_labels_alternate_between_two_slots_and_the_newest_counts() -> None:
    disk = bytearray(HEADER_BYTES)
    offsets = []
    for number in range(4):
        write = parse_header(disk).label_write(LABEL.model_copy(update={"size_bytes": number + 1}))
        offsets.append(write.offset)
        put(disk, write)
        label = parse_header(disk).label
        assert label is not None
        assert label.size_bytes == number + 1
    assert offsets == [SLOT_BYTES, 0, SLOT_BYTES, 0]


@given(st.integers(0, SLOT_BYTES - 1))
def test_a_label_cut_short_leaves_the_one_before(written: int) -> None:
    disk = labelled()
    put(disk, parse_header(disk).label_write(LABEL))
    write = parse_header(disk).label_write(LABEL.model_copy(update={"volume": None}))
    disk[write.offset : write.offset + written] = write.data[:written]
    label = parse_header(disk).label
    assert label is not None
    # Once all of the text is there, the rest of the slot is zeros in the old one and the new.
    assert label.volume in ((VOLUME,) if written < 24 else (VOLUME, None))


def test_a_damaged_label_is_no_blank_storage() -> None:
    disk = labelled()
    disk[SLOT_BYTES + 100] ^= 1
    with pytest.raises(ValueError, match="damaged"):
        parse_header(disk)


def test_a_lost_label_is_no_blank_storage() -> None:
    disk = labelled()
    claimed(disk, Claim(1))
    disk[: 2 * SLOT_BYTES] = bytes(2 * SLOT_BYTES)
    with pytest.raises(ValueError, match="gone"):
        parse_header(disk)


def test_a_label_of_a_later_format_is_not_guessed_at() -> None:
    disk = bytearray(HEADER_BYTES)
    put(disk, parse_header(disk).label_write(LABEL.model_copy(update={"format": 2})))
    with pytest.raises(ValueError, match="format"):
        parse_header(disk)


def test_claims_are_kept_in_order() -> None:
    header = claimed(labelled(), Claim(1), Claim(2, ALICE), Claim(5, BOB))
    assert header.claims == (Claim(1), Claim(2, ALICE), Claim(5, BOB))
    assert header.claimed.current == Claim(5, BOB)
    assert header.claimed.refuses(Claim(6, ALICE))


def test_only_the_latest_claims_are_kept() -> None:
    header = claimed(labelled(), *(Claim(epoch) for epoch in range(1, 200)))
    assert header.claims[-1] == Claim(199)
    assert CLAIMS_KEPT <= len(header.claims) <= CLAIMS_KEPT + CLAIM_SLOTS


def test_claims_written_at_the_same_moment_do_not_overwrite_each_other() -> None:
    disk = labelled()
    before = claimed(disk, Claim(1, ALICE))
    for claim in (Claim(3, ALICE), Claim(2, BOB)):
        put(disk, before.claim_write(claim))
    assert parse_header(disk).claims == (Claim(1, ALICE), Claim(2, BOB), Claim(3, ALICE))


def test_of_two_claims_of_one_epoch_the_one_on_the_disk_counts() -> None:
    disk = labelled()
    before = claimed(disk, Claim(1, ALICE))
    for claim in (Claim(2, ALICE), Claim(2, BOB)):
        put(disk, before.claim_write(claim))
    assert parse_header(disk).claimed.current == Claim(2, BOB)
    assert claimed(disk, Claim(3, BOB)).claims[-2:] == (Claim(2, BOB), Claim(3, BOB))


@given(st.integers(0, SLOT_BYTES - 1), st.integers(2, 30))
def test_a_claim_cut_short_loses_no_earlier_one(written: int, epoch: int) -> None:
    disk = labelled()
    header = claimed(disk, *(Claim(number) for number in range(1, epoch)))
    write = header.claim_write(Claim(epoch))
    disk[write.offset : write.offset + written] = write.data[:written]
    assert parse_header(disk).claims[: epoch - 1] == header.claims


def test_claims_of_an_earlier_volume_do_not_count() -> None:
    disk = labelled()
    claimed(disk, Claim(1), Claim(9, ALICE))
    put(disk, parse_header(disk).label_write(LABEL.model_copy(update={"volume": OTHER})))
    assert parse_header(disk).claims == ()
    assert claimed(disk, Claim(1, BOB)).claims == (Claim(1, BOB),)


@given(st.binary(max_size=64), st.integers(0, HEADER_BYTES - 64))
def test_damage_is_an_error_or_leaves_what_was_stored(damage: bytes, at: int) -> None:
    disk = labelled()
    claimed(disk, Claim(1), Claim(2))
    disk[at : at + len(damage)] = damage
    try:
        header = parse_header(disk)
    except ValueError:
        return
    assert header.label == LABEL
    assert set(header.claims) <= {Claim(1), Claim(2)}


def test_header_and_slots_fit_before_the_volume() -> None:
    assert HEADER_BYTES == (LABEL_SLOTS + CLAIM_SLOTS) * SLOT_BYTES <= DATA_OFFSET_BYTES


@pytest.mark.parametrize(
    ("storage_bytes", "room"),
    [(0, 0), (1 << 20, 0), ((1 << 20) + 4095, 0), ((1 << 20) + 4096, 4096), ((2 << 20) + 1, 1 << 20)],
)
def test_the_room_is_what_lies_behind_the_first_mebibyte(storage_bytes: int, room: int) -> None:
    assert room_bytes(storage_bytes) == room
