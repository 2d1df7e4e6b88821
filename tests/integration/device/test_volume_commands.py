"""What volumes of every kind of device do."""

from __future__ import annotations

import asyncio
import errno
import os
from collections.abc import AsyncIterator

import pytest

from farpage.blockio import Allocation, BlockIO, Feature, read_bytes
from farpage.device.base import PagingDevice
from farpage.device.claim import Claim
from farpage.device.spec import Allocate
from farpage.kernel.memory import AlignedBuffer
from tests.support.volumes import cache, carry_out_at_random, extents, flush, read_error, trim, write, zero

SIZE = 1 << 20


@pytest.fixture
async def volume(device: PagingDevice) -> AsyncIterator[BlockIO]:
    device.create_volume("vm1", SIZE)
    device.claim("vm1", Claim(1))
    opened = await device.open_volume("vm1", 1)
    yield opened
    await opened.close()


async def test_a_new_volume_reads_as_zeros_and_is_one_hole(volume: BlockIO) -> None:
    assert await read_bytes(volume, 0, SIZE) == bytes(SIZE)
    assert await extents(volume, 0, SIZE) == (0, [(await extents(volume, 0, SIZE))[1][0]])  # type: ignore[index]


async def test_random_commands_leave_what_a_plain_buffer_would_hold(volume: BlockIO) -> None:
    model = await carry_out_at_random(volume, SIZE, units=[1, 512, 4096], counts=[1, 3, 16])
    assert await flush(volume) == 0
    assert await read_bytes(volume, 0, SIZE) == model


async def test_neighbouring_writes_at_once_do_not_undo_each_other(volume: BlockIO) -> None:
    pieces = [(offset, os.urandom(700)) for offset in range(0, SIZE - 4096, 700)]
    blocks = [(offset, os.urandom(4096)) for offset in range(0, SIZE, 64 << 10)]
    model = bytearray(SIZE)
    # The pieces over the blocks: the model knows that order, so the test waits in between.
    assert not any(await asyncio.gather(*(write(volume, offset, data) for offset, data in blocks)))
    assert not any(await asyncio.gather(*(write(volume, offset, data) for offset, data in pieces)))
    for offset, data in blocks + pieces:
        model[offset : offset + len(data)] = data
    assert await read_bytes(volume, 0, SIZE) == model


async def test_aligned_memory_is_written_and_read(volume: BlockIO) -> None:
    with AlignedBuffer(64 << 10) as buffer:
        content = os.urandom(64 << 10)
        buffer.view[:] = content
        assert await write(volume, 128 << 10, buffer.view) == 0
        assert await read_bytes(volume, 128 << 10, 64 << 10) == content


async def test_a_trimmed_range_is_given_back(volume: BlockIO, device: PagingDevice) -> None:
    if device.allocate is Allocate.FULL:
        pytest.skip("a full volume keeps its blocks")
    assert await write(volume, 0, os.urandom(256 << 10), fua=True) == 0
    assert device.volume("vm1").used_bytes >= 256 << 10
    assert await trim(volume, 0, 256 << 10) == 0
    assert device.volume("vm1").used_bytes < 64 << 10
    assert await read_bytes(volume, 0, 256 << 10) == bytes(256 << 10)


async def test_extents_tell_data_from_holes(volume: BlockIO, device: PagingDevice) -> None:
    if device.allocate is Allocate.FULL:
        pytest.skip("a full volume has no holes")
    assert await write(volume, 64 << 10, os.urandom(64 << 10), fua=True) == 0
    error, found = await extents(volume, 0, SIZE)
    assert error == 0
    assert found is not None
    hole = Allocation.HOLE | Allocation.ZERO
    assert [(extent.length, extent.allocation) for extent in found] == [
        (64 << 10, hole),
        (64 << 10, Allocation.DATA),
        (SIZE - (128 << 10), hole),
    ]


async def test_zeros_that_keep_their_place_are_no_hole_for_a_later_write(
    volume: BlockIO, device: PagingDevice, mode: str
) -> None:
    assert await write(volume, 0, os.urandom(64 << 10), fua=True) == 0
    fast = device.allocate is Allocate.SPARSE
    assert await zero(volume, 0, 64 << 10, punch=False, fast=fast) == 0
    assert await read_bytes(volume, 0, 64 << 10) == bytes(64 << 10)
    if mode != "memory":
        assert device.volume("vm1").used_bytes >= 64 << 10


async def test_a_range_outside_is_a_bug_of_the_caller(volume: BlockIO) -> None:
    for offset, length in ((SIZE, 1), (SIZE - 1, 2), (-1, 1)):
        with pytest.raises(ValueError, match="outside"):
            volume.read(offset, length, lambda _error, _payload: None)
        with pytest.raises(ValueError, match="outside"):
            volume.trim(offset, length, lambda _error: None)


async def test_a_read_only_volume_is_not_changed(volume: BlockIO, device: PagingDevice) -> None:
    content = os.urandom(4096)
    assert await write(volume, 0, content) == 0
    view = await device.open_volume("vm1", None)
    assert view.read_only
    assert await write(view, 0, bytes(4096)) == errno.EPERM
    assert await zero(view, 0, 4096) == errno.EPERM
    assert await trim(view, 0, 4096) == errno.EPERM
    assert await read_bytes(view, 0, 4096) == content
    await view.close()


async def test_a_write_of_an_older_owner_is_refused(volume: BlockIO, device: PagingDevice) -> None:
    device.claim("vm1", Claim(2))
    assert await write(volume, 0, b"x" * 4096) == errno.ESHUTDOWN
    assert await zero(volume, 0, 4096) == errno.ESHUTDOWN
    assert await trim(volume, 0, 4096) == errno.ESHUTDOWN
    newer = await device.open_volume("vm1", 2)
    assert await write(newer, 0, b"x" * 4096) == 0
    await newer.close()


async def test_closing_waits_for_the_commands_in_flight(device: PagingDevice) -> None:
    device.create_volume("vm2", SIZE)
    opened = await device.open_volume("vm2", 1)
    errors: list[int] = []
    for offset in range(0, SIZE, 64 << 10):
        opened.write(offset, memoryview(bytes(64 << 10)), errors.append)
    await opened.close()
    assert errors == [0] * (SIZE // (64 << 10))
    await opened.close()


async def test_caching_is_offered_where_it_helps(volume: BlockIO, mode: str) -> None:
    offered = Feature.CACHE in volume.features
    assert offered == (mode in {"buffered", "memory"})
    assert await cache(volume, 0, 4096) == (0 if offered else errno.ENOTSUP)


async def test_bytes_are_at_hand_only_from_a_cache(volume: BlockIO, mode: str) -> None:
    content = os.urandom(4096)
    assert await write(volume, 8192, content) == 0
    into = bytearray(4096)
    at_hand = volume.read_now(8192, memoryview(into))
    if mode in {"direct", "dropped"}:
        assert not at_hand
    if at_hand:
        assert into == content
    assert await read_error(volume, 8192, 4096) == 0
