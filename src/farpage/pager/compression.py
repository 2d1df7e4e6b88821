"""Pages made small: LZ4 blocks, and one word for a page that repeats it. No I/O.

LZ4 is loaded with the first page, so that a worker that has none starts without it.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Final

from farpage.pager.table import PAGE_BYTES

if TYPE_CHECKING:
    from collections.abc import Callable

MOST_BYTES: Final = PAGE_BYTES * 3 // 4
"""What is larger when compressed is not worth its place."""
WORD_BYTES: Final = 8
_PERHAPS_ONE_WORD_BYTES: Final = 48
"""LZ4 makes no more of a page that repeats a word: a literal word, and a byte for each 255 that follow."""
_WORDS: Final = PAGE_BYTES // WORD_BYTES


def pack(page: memoryview) -> bytes | None:
    """Return a page's bytes made small; None when they do not get small enough.

    A page that repeats one word is that word: WORD_BYTES, which no LZ4 block of a page is as short as.
    """
    packed = _lz4()[0](page)
    if len(packed) > MOST_BYTES:
        return None
    if len(packed) <= _PERHAPS_ONE_WORD_BYTES:
        content = bytes(page)
        word = content[:WORD_BYTES]
        if content == word * _WORDS:
            return word
    return packed


def unpack(packed: bytes) -> bytes:
    """Return the page that `pack` made small.

    :raise ValueError: it is no such thing.
    """
    if len(packed) == WORD_BYTES:
        return packed * _WORDS
    try:
        page = _lz4()[1](packed)
    except Exception as error:  # LZ4BlockError, which is no other's kind
        raise ValueError(str(error)) from error
    if len(page) != PAGE_BYTES:
        raise ValueError(f"{len(page)} bytes are not a page")
    return page


@cache
def _lz4() -> tuple[Callable[[memoryview], bytes], Callable[[bytes], bytes]]:
    """Load LZ4."""
    from functools import partial

    from lz4.block import compress, decompress

    return partial(compress, store_size=False), partial(decompress, uncompressed_size=PAGE_BYTES)
