"""Contents of simulated pages: a stamp of page and version, repeated over the whole page."""

from __future__ import annotations

import struct
from functools import lru_cache

from farpage.pager.table import PAGE_BYTES

_STAMP = struct.Struct("<IHH")
_MARK = 0xFA6E
_REPEATED = PAGE_BYTES // _STAMP.size

ZEROS = bytes(PAGE_BYTES)


@lru_cache(maxsize=4096)
def content_of(page: int, version: int, client: int = 1) -> bytes:
    """Return a page's content; version 0 is a page that was never written."""
    if version == 0:
        return ZEROS
    return _STAMP.pack(version, page, _MARK ^ client) * _REPEATED


def version_of(page: int, content: bytes | memoryview, client: int = 1) -> int | None:
    """Return the version that a page holds; None for any content that was never written to that page."""
    version, _, _ = _STAMP.unpack_from(content)
    return version if content == content_of(page, version, client) else None
