"""The page table of a client that goes to another hypervisor, as bytes."""

from __future__ import annotations

import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farpage.handover import Handover, HandoverDamaged, _digest, check, decode, encode, most_bytes

STATES = st.lists(st.sampled_from("zdl"), min_size=1, max_size=70)


def handover(states: str | list[str], volume: str = "vm1", epoch: int = 7) -> Handover:
    """Make one of pages that are zero, on the device, or lost."""
    numbers = np.arange(1, len(states) + 1, dtype=np.uint32) * np.uint32(2654435761)
    on_device = np.array([state == "d" for state in states])
    lost = np.array([state == "l" for state in states])
    return Handover(volume, epoch, 1, on_device, lost, np.where(on_device, numbers, np.uint32(0)))


def resigned(encoded: bytes | bytearray) -> bytes:
    """Give changed bytes the digest that they would have."""
    changed = bytearray(encoded)
    changed[56:88] = _digest(changed[:152], bytes(changed[152:]))
    return bytes(changed)


@given(STATES)
def test_what_was_encoded_is_decoded(states: list[str]) -> None:
    given_one = handover(states)
    encoded = encode(given_one)
    assert len(encoded) <= most_bytes(len(states))
    found = decode(encoded, whose="vm1")
    assert (found.volume, found.epoch, found.pages) == ("vm1", 7, len(states))
    for name in ("on_device", "lost", "checksums"):
        assert np.array_equal(getattr(found, name), getattr(given_one, name))


def test_a_page_on_the_device_costs_four_bytes_and_two_bits_and_any_other_two_bits() -> None:
    assert len(encode(handover("z" * 800))) == 152 + 200
    assert len(encode(handover("d" * 800))) == 152 + 200 + 3200


def test_equal_tables_have_one_digest_and_different_ones_two() -> None:
    first, again, other = (
        check(encode(handover(states)), whose="vm1").digest for states in ("zdld", "zdld", "zddd")
    )
    assert first == again != other


@given(STATES, st.data())
def test_no_changed_or_cut_byte_is_believed(states: list[str], data: st.DataObject) -> None:
    encoded = encode(handover(states))
    at = data.draw(st.integers(0, len(encoded) - 1))
    changed = bytearray(encoded)
    changed[at] ^= 1 << data.draw(st.integers(0, 7))
    for bad in (bytes(changed), encoded[:at], encoded + b"\0"):
        with pytest.raises(HandoverDamaged):
            decode(bad, whose="vm1")


@given(st.binary(max_size=400))
def test_no_bytes_whatever_make_it_fail_in_another_way(content: bytes) -> None:
    for bad in (content, b"farpage handover" + content, resigned(encode(handover("zd"))[:152] + content)):
        with pytest.raises(HandoverDamaged):
            decode(bad, whose="vm1")


def changed_number(offset: int, layout: str, number: int, states: str = "zdld") -> bytes:
    encoded = bytearray(encode(handover(states)))
    struct.pack_into(layout, encoded, offset, number)
    return resigned(encoded)


@pytest.mark.parametrize(
    ("bad", "problem"),
    [
        (changed_number(16, "<I", 3), "format has version 3"),
        (changed_number(20, "<I", 2), "name in it is no volume's"),
        (changed_number(20, "<I", 200), "name in it is no volume's"),
        (changed_number(24, "<Q", 0), "of 0 pages"),
        (changed_number(24, "<Q", 1 << 60), "cannot be"),
        (changed_number(24, "<Q", 1 << 30), "bytes instead of"),
        (changed_number(24, "<Q", 3), "bitmaps do not fit"),
        (changed_number(32, "<Q", 0), "at epoch 0"),
        (changed_number(48, "<Q", 1), "bytes instead of"),
        (changed_number(48, "<Q", 5), "5 of 4 pages"),
        (changed_number(152, "<B", 0b00000001), "bitmaps do not fit"),
        (changed_number(153, "<B", 0b00000110), "both on the device and lost"),
        (changed_number(153, "<B", 0b10000100), "bitmaps do not fit"),
    ],
)
def test_what_contradicts_itself_is_refused_even_with_a_true_digest(bad: bytes, problem: str) -> None:
    with pytest.raises(HandoverDamaged, match=problem):
        decode(bad, whose="vm1")
