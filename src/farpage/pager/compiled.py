"""The pager's compiled loops, where they were built: all of them, or none.

They call the libraries that the Python packages of LZ4 and xxHash bring along, so that they are built without
headers of either, and no second copy of them is loaded.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from farpage.pager._hub import Hub
    from farpage.pager._lane import Lane
    from farpage.pager._order import Order
    from farpage.pager._readahead import ReadAhead
    from farpage.pager._store import Store
    from farpage.pager._streams import Streams

WITHOUT_VARIABLE: Final = "FARPAGE_WITHOUT_COMPILED"
"""Set in the environment of a process, it goes without: then the same is done in Python."""


class Libraries(NamedTuple):
    """Addresses of LZ4_compress_fast, LZ4_decompress_safe and XXH3_64bits."""

    compress: int
    decompress: int
    digest: int


class Compiled(NamedTuple):
    """What was built."""

    hub: type[Hub]
    lane: type[Lane]
    order: type[Order]
    read_ahead: type[ReadAhead]
    store: type[Store]
    streams: type[Streams]


def _load() -> Compiled | None:
    if os.environ.get(WITHOUT_VARIABLE):
        return None
    try:
        from farpage.pager._hub import Hub
        from farpage.pager._lane import Lane
        from farpage.pager._order import Order
        from farpage.pager._readahead import ReadAhead
        from farpage.pager._store import Store
        from farpage.pager._streams import Streams
    except ImportError:  # there was no compiler
        return None
    return Compiled(Hub, Lane, Order, ReadAhead, Store, Streams)


@cache
def libraries() -> Libraries | None:
    """Load the libraries; None when one does not export what is called."""
    try:
        lz4 = ctypes.CDLL(import_module("lz4.block._block").__file__)
        xxhash = ctypes.CDLL(import_module("xxhash._xxhash").__file__)
        functions = lz4.LZ4_compress_fast, lz4.LZ4_decompress_safe, xxhash.XXH3_64bits
    except (ImportError, OSError, AttributeError):
        return None
    addresses = [ctypes.cast(function, ctypes.c_void_p).value for function in functions]
    return Libraries(*(address or 0 for address in addresses))


COMPILED: Final = _load()
"""None where nothing was built, or it is not wanted."""
