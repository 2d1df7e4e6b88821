"""Checksums of paged-out pages: the low four bytes of xxh3_64, the fastest on 4 KiB pages. No I/O."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from xxhash import xxh3_64_intdigest

from farpage.pager.table import PAGE_BYTES


def page_checksum(page: memoryview) -> int:
    """Return the checksum of one page's bytes, 32 bits."""
    return xxh3_64_intdigest(page) & 0xFFFFFFFF


def page_checksums(content: memoryview) -> list[int]:
    """Return the checksum of each page in a run of whole pages."""
    if len(content) == PAGE_BYTES:
        return [page_checksum(content)]
    return checksums_of(
        [content[offset : offset + PAGE_BYTES] for offset in range(0, len(content), PAGE_BYTES)]
    )


def checksums_of(pages: Sequence[memoryview]) -> list[int]:
    """Return the checksum of each page."""
    digest = xxh3_64_intdigest
    return [digest(page) & 0xFFFFFFFF for page in pages]


def zero_pages(content: memoryview) -> list[int]:
    """Return which pages of a run of whole pages hold nothing but zeros, as indexes from 0."""
    words = np.frombuffer(content, np.uint64).reshape(-1, PAGE_BYTES // 8)
    # The first word settles nearly all pages that hold data; only the others are read whole.
    maybe = words[:, 0] == 0
    if not maybe.any():
        return []
    return [row for row in maybe.nonzero()[0].tolist() if not words[row].any()]
