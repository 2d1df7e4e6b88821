from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from farpage.demo.stamps import WORDS_PER_PAGE, is_rewritten, is_stamp, write_stamp

pages = st.integers(min_value=0, max_value=1 << 40)
versions = st.integers(min_value=0, max_value=1 << 20)


def blank() -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    return np.zeros(WORDS_PER_PAGE, dtype=np.uint64)


@given(pages, versions)
def test_a_stamp_is_recognised(number: int, version: int) -> None:
    page = blank()
    write_stamp(page, number, version)
    assert is_stamp(page, number, version, blank())


@given(pages, versions, st.integers(0, WORDS_PER_PAGE - 1), st.integers(0, 63))
def test_one_flipped_bit_is_seen(number: int, version: int, word: int, bit: int) -> None:
    page = blank()
    write_stamp(page, number, version)
    page[word] ^= np.uint64(1 << bit)
    assert not is_stamp(page, number, version, blank())


@given(pages, versions)
def test_zeros_old_versions_and_other_pages_are_seen(number: int, version: int) -> None:
    page = blank()
    assert not is_stamp(page, number, version, blank())
    write_stamp(page, number, version)
    assert not is_stamp(page, number, version + 1, blank())
    assert not is_stamp(page, number + 1, version, blank())


def test_a_pass_rewrites_about_a_quarter_and_never_the_same() -> None:
    chosen = [{n for n in range(4000) if is_rewritten(n, pass_number)} for pass_number in range(4)]
    assert all(800 < len(one) < 1200 for one in chosen)
    assert len(set.union(*chosen)) > 2000
