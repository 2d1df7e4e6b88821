"""Memory for payloads."""

from __future__ import annotations

import ctypes
import mmap

import pytest

from farpage.nbd.buffers import AlignedPool


def address_of(buffer: memoryview) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(buffer))


@pytest.mark.parametrize("length", [1, 4096, 4097, 100_000, 1 << 20, (1 << 20) + 1, 32 << 20])
def test_buffers_are_long_enough_and_page_aligned(length: int) -> None:
    buffer = AlignedPool().take(length)
    assert len(buffer) >= length
    assert address_of(buffer) % mmap.PAGESIZE == 0


def test_a_buffer_that_was_given_back_is_used_again() -> None:
    pool = AlignedPool()
    first = pool.take(4096)
    place = address_of(first)
    pool.give(first)
    assert address_of(pool.take(4096)) == place


def test_buffers_in_use_never_overlap() -> None:
    pool = AlignedPool()
    taken = [pool.take(4096) for _ in range(600)]
    assert len({address_of(buffer) for buffer in taken}) == 600


def test_large_buffers_beyond_the_idle_limit_are_let_go() -> None:
    pool = AlignedPool(idle_max_bytes=2 << 20)
    for buffer in [pool.take(1 << 20) for _ in range(5)]:
        pool.give(buffer)
    assert pool.idle_bytes == 2 << 20
