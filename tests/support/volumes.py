"""Commands of a `BlockIO` as coroutines."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence

from farpage.blockio import BlockIO, Extent, read_bytes, wait_done


async def write(volume: BlockIO, offset: int, data: bytes | memoryview, *, fua: bool = False) -> int:
    return await wait_done(lambda done: volume.write(offset, memoryview(data), done, fua=fua))


async def zero(
    volume: BlockIO, offset: int, length: int, *, punch: bool = True, fast: bool = False, fua: bool = False
) -> int:
    return await wait_done(lambda done: volume.zero(offset, length, done, punch=punch, fast=fast, fua=fua))


async def trim(volume: BlockIO, offset: int, length: int) -> int:
    return await wait_done(lambda done: volume.trim(offset, length, done))


async def flush(volume: BlockIO) -> int:
    return await wait_done(volume.flush)


async def cache(volume: BlockIO, offset: int, length: int) -> int:
    return await wait_done(lambda done: volume.cache(offset, length, done))


async def read_error(volume: BlockIO, offset: int, length: int) -> int:
    future: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    volume.read(offset, length, lambda error, _payload: future.set_result(error))
    return await future


async def extents(volume: BlockIO, offset: int, length: int) -> tuple[int, list[Extent] | None]:
    future: asyncio.Future[tuple[int, list[Extent] | None]] = asyncio.get_running_loop().create_future()
    volume.extents(offset, length, lambda error, found: future.set_result((error, found)))
    return await future


async def carry_out_at_random(
    volume: BlockIO, size_bytes: int, *, units: Sequence[int], counts: Sequence[int]
) -> bytearray:
    """Write, zero and read 250 ranges of `counts` times `units` bytes; returns what the volume holds then."""
    chance = random.Random(1)
    model = bytearray(size_bytes)
    for _ in range(250):
        unit = chance.choice(units)
        offset = chance.randrange(0, size_bytes, unit)
        length = min(chance.choice(counts) * unit, size_bytes - offset)
        match chance.randrange(4):
            case 0 | 1:
                data = chance.randbytes(length)
                assert await write(volume, offset, data, fua=chance.random() < 0.1) == 0
                model[offset : offset + length] = data
            case 2:
                assert await zero(volume, offset, length, punch=chance.random() < 0.5) == 0
                model[offset : offset + length] = bytes(length)
            case 3:
                assert await read_bytes(volume, offset, length) == model[offset : offset + length]
    return model
