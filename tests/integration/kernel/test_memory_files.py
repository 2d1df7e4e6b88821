from __future__ import annotations

import errno
import mmap
import os
from collections.abc import Iterator

import pytest

from farpage.kernel.memory import (
    HUGE_PAGE_BYTES,
    PAGE_SIZE,
    AlignedBuffer,
    address_of,
    create_memfd,
    punch_hole,
    reserve_addresses,
    resident_bytes,
    resident_ranges,
)


@pytest.fixture
def memfd() -> Iterator[int]:
    descriptor = create_memfd("test", 64 * PAGE_SIZE)
    yield descriptor
    os.close(descriptor)


def test_a_new_memfd_is_one_hole(memfd: int) -> None:
    assert os.fstat(memfd).st_size == 64 * PAGE_SIZE
    assert list(resident_ranges(memfd, 0, 64 * PAGE_SIZE)) == []
    assert resident_bytes(memfd) == 0


def test_resident_ranges_are_those_written_and_not_punched(memfd: int) -> None:
    os.pwrite(memfd, b"x" * 8 * PAGE_SIZE, 4 * PAGE_SIZE)
    os.pwrite(memfd, b"x", 63 * PAGE_SIZE)
    punch_hole(memfd, 6 * PAGE_SIZE, 2 * PAGE_SIZE)
    found = [
        (start // PAGE_SIZE, length // PAGE_SIZE)
        for start, length in resident_ranges(memfd, 0, 64 * PAGE_SIZE)
    ]
    assert found == [(4, 2), (8, 4), (63, 1)]
    assert resident_bytes(memfd) == 7 * PAGE_SIZE


def test_resident_ranges_are_cut_to_the_part_asked_for(memfd: int) -> None:
    os.pwrite(memfd, b"x" * 8 * PAGE_SIZE, 4 * PAGE_SIZE)
    assert list(resident_ranges(memfd, 6 * PAGE_SIZE, 2 * PAGE_SIZE)) == [(6 * PAGE_SIZE, 2 * PAGE_SIZE)]
    assert list(resident_ranges(memfd, 0, 2 * PAGE_SIZE)) == []


def test_looking_for_resident_ranges_leaves_the_file_position(memfd: int) -> None:
    os.pwrite(memfd, b"x", 9 * PAGE_SIZE)
    os.lseek(memfd, 7, os.SEEK_SET)
    list(resident_ranges(memfd, 0, 64 * PAGE_SIZE))
    assert os.lseek(memfd, 0, os.SEEK_CUR) == 7


def test_punching_a_descriptor_that_is_no_file_is_an_error() -> None:
    reader, writer = os.pipe()
    with pytest.raises(OSError) as caught:
        punch_hole(writer, 0, PAGE_SIZE)
    assert caught.value.errno in (errno.ENODEV, errno.ESPIPE)
    os.close(reader)
    os.close(writer)


def test_an_aligned_buffer_is_zeroed_memory_at_its_address() -> None:
    with AlignedBuffer(3 * PAGE_SIZE, populate=True) as buffer:
        assert buffer.address % PAGE_SIZE == 0
        assert buffer.address == address_of(buffer.view)
        assert bytes(buffer.view) == bytes(3 * PAGE_SIZE)


@pytest.mark.parametrize("size_bytes", [HUGE_PAGE_BYTES, 5 * HUGE_PAGE_BYTES + PAGE_SIZE])
@pytest.mark.parametrize("populate", [True, False])
def test_a_long_buffer_begins_with_a_huge_page(size_bytes: int, populate: bool) -> None:
    with AlignedBuffer(size_bytes, populate=populate) as buffer:
        assert buffer.address % HUGE_PAGE_BYTES == 0
        assert buffer.address == address_of(buffer.view)
        assert (len(buffer.view), buffer.size_bytes) == (size_bytes, size_bytes)
        buffer.view[-1] = 1
        assert bytes(buffer.view[:-1]) == bytes(size_bytes - 1)


def test_the_parts_of_a_huge_page_are_memory_of_their_own_that_stays_with_each() -> None:
    size_bytes = HUGE_PAGE_BYTES // 8
    parts = AlignedBuffer.parts(HUGE_PAGE_BYTES, size_bytes)
    assert [part.address for part in parts] == [parts[0].address + n * size_bytes for n in range(8)]
    assert parts[0].address % HUGE_PAGE_BYTES == 0
    for number, part in enumerate(parts):
        part.view[:] = bytes([number]) * size_bytes
    last = parts.pop()
    for part in parts:
        part.close()
    parts.clear()
    assert bytes(last.view) == bytes([7]) * size_bytes
    last.close()


def test_an_aligned_buffer_in_use_refuses_to_close() -> None:
    buffer = AlignedBuffer(PAGE_SIZE)
    part = buffer.view[:10]
    with pytest.raises(BufferError):
        buffer.close()
    part.release()
    buffer.close()


def test_reserved_addresses_cannot_be_reserved_again() -> None:
    with mmap.mmap(-1, PAGE_SIZE) as mapping, pytest.raises(OSError) as caught:
        reserve_addresses(address_of(mapping), PAGE_SIZE)
    assert caught.value.errno == errno.EEXIST
