"""Page contents that can be checked: every word follows from the page's number and version. No I/O."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Words = NDArray[np.uint64]

PAGE_BYTES = 4096
WORDS_PER_PAGE = PAGE_BYTES // 8

_PAGE_FACTOR = 0x9E3779B97F4A7C15
_VERSION_FACTOR = 0xD1B54A32D192ED03
_MASK = (1 << 64) - 1

_WORD_STEPS: Words = (np.arange(WORDS_PER_PAGE, dtype=np.uint64) + np.uint64(1)) * np.uint64(
    0xBF58476D1CE4E5B9
)


def seed_of(page: int, version: int) -> int:
    """Return a number that differs for every page and version, never 0."""
    mixed = (page * _PAGE_FACTOR + version * _VERSION_FACTOR + 1) & _MASK
    mixed ^= mixed >> 31
    return (mixed * _PAGE_FACTOR & _MASK) | 1


def write_stamp(page: Words, number: int, version: int) -> None:
    """Write all words of the page."""
    np.bitwise_xor(_WORD_STEPS, np.uint64(seed_of(number, version)), out=page)


def is_stamp(page: Words, number: int, version: int, scratch: Words) -> bool:
    """Check all words of the page; `scratch` is another page's worth of words to compute in."""
    np.bitwise_xor(page, np.uint64(seed_of(number, version)), out=scratch)
    return bool(np.array_equal(scratch, _WORD_STEPS))


def is_rewritten(number: int, pass_number: int) -> bool:
    """Say whether a pass writes the page anew: a quarter of the pages, another one each time."""
    return seed_of(number, pass_number ^ 0x5A5A) >> 33 & 3 == 0
