"""Asks a farpage server for one feature through libnbd: `libnbd_features.py SOCKET FEATURE` prints `ok`.

Run by Debian's own Python, which has the binding (python3-libnbd) and may be older than farpage's.
"""

from __future__ import annotations

import errno
import sys
from typing import Any

import nbd  # type: ignore[import-not-found]

SIZE = 16 << 20


def handle(path: str, **settings: Any) -> Any:
    """Connect to export `v` after calling the named settings."""
    h = nbd.NBD()
    h.set_export_name("v")
    for name, value in settings.items():
        getattr(h, name)(value)
    h.connect_unix(path)
    return h


def check_data(h: Any) -> None:
    h.pwrite(b"farpage!" * 512, 4096)
    assert h.pread(4096, 4096) == b"farpage!" * 512
    h.flush()


def error_of(function: Any, *arguments: Any) -> int:
    try:
        function(*arguments)
    except nbd.Error as error:
        return int(error.errnum)
    return 0


def everything(path: str) -> None:
    h = handle(path, add_meta_context="base:allocation")
    assert h.get_structured_replies_negotiated()
    assert h.can_meta_context("base:allocation")
    assert h.get_protocol() == "newstyle-fixed"
    assert not h.get_tls_negotiated()
    assert h.get_size() == SIZE
    check_data(h)
    h.shutdown()


def no_structured_replies(path: str) -> None:
    h = handle(path, set_request_structured_replies=False, add_meta_context="base:allocation")
    assert not h.get_structured_replies_negotiated()
    assert not h.can_meta_context("base:allocation")
    assert not h.can_df()
    check_data(h)
    h.shutdown()


def no_block_status(path: str) -> None:
    h = handle(path)
    h.set_strict_mode(0)
    assert not h.can_meta_context("base:allocation")
    assert error_of(h.block_status, 4096, 0, lambda *_: 0) == errno.EINVAL
    check_data(h)
    h.shutdown()


def export_name_only(path: str) -> None:
    h = handle(path, set_handshake_flags=0)
    assert h.get_protocol() == "newstyle"
    assert not h.get_structured_replies_negotiated()
    check_data(h)
    h.shutdown()


def no_zeroes_padding(path: str) -> None:
    for flags in (nbd.HANDSHAKE_FLAG_FIXED_NEWSTYLE, nbd.HANDSHAKE_FLAG_NO_ZEROES):
        h = handle(path, set_handshake_flags=flags)
        check_data(h)
        h.shutdown()


def list_contexts(path: str) -> None:
    h = handle(path, set_opt_mode=True)
    found: list[str] = []

    def take_context(name: str) -> int:
        found.append(name)
        return 0

    assert h.opt_list_meta_context(take_context) == 1
    assert found == ["base:allocation"]
    exports: list[str] = []

    def take_export(name: str, description: str) -> int:
        exports.append(name)
        return 0

    assert h.opt_list(take_export) == 3
    assert "v" in exports
    h.opt_abort()


def unfragmented_reads(path: str) -> None:
    h = handle(path)
    h.zero(1 << 20, 0)
    chunks: list[int] = []

    def chunk(data: bytes, offset: int, status: int, error: Any) -> int:
        chunks.append(status)
        return 0

    h.pread_structured(1 << 20, 0, chunk)
    assert nbd.READ_HOLE in chunks
    del chunks[:]
    h.pread_structured(1 << 20, 0, chunk, nbd.CMD_FLAG_DF)
    assert chunks == [nbd.READ_DATA]
    h.shutdown()


def fua(path: str) -> None:
    h = handle(path)
    h.pwrite(b"x" * 4096, 0, nbd.CMD_FLAG_FUA)
    h.zero(4096, 0, nbd.CMD_FLAG_FUA)
    h.trim(4096, 0, nbd.CMD_FLAG_FUA)
    h.shutdown()


def zero_and_trim(path: str) -> None:
    h = handle(path)
    h.pwrite(b"x" * 65536, 0)
    h.zero(4096, 0, nbd.CMD_FLAG_NO_HOLE)
    h.zero(4096, 4096, nbd.CMD_FLAG_FAST_ZERO)
    h.zero(SIZE // 2, SIZE // 2)
    assert h.pread(8192, 0) == bytes(8192)
    assert h.pread(4096, 8192) == b"x" * 4096
    h.trim(SIZE // 2, SIZE // 2)
    h.shutdown()


def cache(path: str) -> None:
    h = handle(path)
    h.cache(65536, 0)
    h.shutdown()


def request_one(path: str) -> None:
    h = handle(path, add_meta_context="base:allocation")
    h.zero(SIZE, 0)
    h.pwrite(b"x" * 4096, 65536)
    found: list[int] = []

    def extents(context: str, offset: int, entries: list[int], error: Any) -> int:
        found.extend(entries)
        return 0

    h.block_status(SIZE, 0, extents)
    assert found[:4] == [65536, 3, 4096, 0]
    del found[:]
    h.block_status(SIZE, 0, extents, nbd.CMD_FLAG_REQ_ONE)
    assert found == [65536, 3]
    h.shutdown()


def info_without_going(path: str) -> None:
    h = handle(path, set_opt_mode=True, set_full_info=True)
    h.opt_info()
    assert h.get_size() == SIZE
    assert h.get_export_description() == "volume v"
    assert h.get_block_size(nbd.SIZE_MINIMUM) == 1
    assert h.get_block_size(nbd.SIZE_MAXIMUM) == 32 << 20
    h.set_export_name("nothing")
    assert error_of(h.opt_info) == errno.ENOENT
    h.set_export_name("v")
    h.opt_go()
    check_data(h)
    h.shutdown()


def starttls(path: str) -> None:
    h = handle(path, set_tls=nbd.TLS_ALLOW)
    assert not h.get_tls_negotiated()
    check_data(h)
    h.shutdown()
    h = nbd.NBD()
    h.set_export_name("v")
    h.set_tls(nbd.TLS_REQUIRE)
    assert error_of(h.connect_unix, path) == errno.ENOTSUP


def errors(path: str) -> None:
    h = handle(path)
    h.set_strict_mode(0)
    assert error_of(h.pread, 4096, SIZE) == errno.EINVAL
    assert error_of(h.pwrite, b"x" * 4096, SIZE) == errno.ENOSPC
    assert error_of(h.zero, 4096, SIZE) == errno.ENOSPC
    assert error_of(h.trim, 4096, SIZE) == errno.EINVAL
    assert error_of(h.pread, 0, 0) == errno.EINVAL
    check_data(h)
    h.shutdown()


def pipelining(path: str) -> None:
    h = handle(path)
    pages = {i: bytes([i]) * 4096 for i in range(128)}
    for i, page in pages.items():
        h.aio_pwrite(nbd.Buffer.from_bytearray(bytearray(page)), i * 4096)
    while h.aio_in_flight():
        h.poll(-1)
    buffers = {i: nbd.Buffer(4096) for i in pages}
    for i, buffer in buffers.items():
        h.aio_pread(buffer, i * 4096)
    while h.aio_in_flight():
        h.poll(-1)
    assert all(bytes(buffers[i].to_bytearray()) == page for i, page in pages.items())
    h.shutdown()


if __name__ == "__main__":
    globals()[sys.argv[2].replace(" ", "_")](sys.argv[1])
    print("ok")
