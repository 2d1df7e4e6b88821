from __future__ import annotations

import os

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from farpage.pager.checksum import page_checksum, page_checksums, zero_pages
from farpage.pager.table import PAGE_BYTES


def test_the_checksums_of_a_run_are_those_of_its_pages() -> None:
    content = memoryview(os.urandom(5 * PAGE_BYTES))
    single = [page_checksum(content[at : at + PAGE_BYTES]) for at in range(0, len(content), PAGE_BYTES)]
    assert page_checksums(content) == single


@given(st.integers(0, PAGE_BYTES * 8 - 1))
def test_every_flipped_bit_changes_the_checksum(bit: int) -> None:
    page = bytearray(os.urandom(PAGE_BYTES))
    before = page_checksum(memoryview(page))
    page[bit // 8] ^= 1 << bit % 8
    assert page_checksum(memoryview(page)) != before


@given(st.lists(st.sampled_from(["zero", "first", "last", "full"]), min_size=1, max_size=12))
def test_only_pages_without_any_bit_are_zero_pages(kinds: list[str]) -> None:
    content = np.zeros((len(kinds), PAGE_BYTES), np.uint8)
    for row, kind in enumerate(kinds):
        if kind == "first":
            content[row, 0] = 1
        elif kind == "last":
            content[row, -1] = 1
        elif kind == "full":
            content[row] = 255
    zeros = [index for index, kind in enumerate(kinds) if kind == "zero"]
    assert zero_pages(memoryview(content.tobytes())) == zeros
