"""Memory for payloads."""

from __future__ import annotations

import mmap

import pytest

from farpage.kernel.buffers import AlignedPool


@pytest.mark.parametrize("length", [1, 4096, 4097, 100_000, 1 << 20, (1 << 20) + 1, 32 << 20])
def test_buffers_are_long_enough_and_page_aligned(length: int) -> None:
    buffer = AlignedPool().take(length)
    assert len(buffer.view) == buffer.size_bytes >= length
    assert buffer.address % mmap.PAGESIZE == 0


def test_a_buffer_that_was_given_back_is_used_again() -> None:
    pool = AlignedPool()
    first = pool.take(4096)
    pool.give(first)
    assert pool.take(4096) is first


def test_buffers_in_use_never_overlap() -> None:
    pool = AlignedPool()
    taken = [pool.take(4096) for _ in range(600)]
    assert len({buffer.address for buffer in taken}) == 600


@pytest.mark.parametrize("size_bytes", [4096, 1 << 20, 2 << 20])
def test_no_more_is_kept_than_was_said(size_bytes: int) -> None:
    pool = AlignedPool(2 << 20)
    for buffer in [pool.take(size_bytes) for _ in range(5)]:
        pool.give(buffer)
    assert size_bytes <= pool.kept_bytes <= 2 << 20


def test_preallocated_buffers_are_there_from_the_start() -> None:
    pool = AlignedPool(preallocated={4096: 64, 64 << 10: 16})
    kept = pool.kept_bytes
    taken = [pool.take(4096) for _ in range(64)] + [pool.take(64 << 10) for _ in range(16)]
    assert kept - pool.kept_bytes == sum(buffer.size_bytes for buffer in taken)
    assert kept >= 64 * 4096 + 16 * (64 << 10)


def test_a_slice_that_is_in_use_outlives_its_pool() -> None:
    pool = AlignedPool()
    buffer = pool.take(4096)
    with buffer.view[:8] as part:
        pool.give(buffer)
        pool.close()
        part[:] = b"still in"
        assert bytes(part) == b"still in"
    assert pool.kept_bytes == 0
