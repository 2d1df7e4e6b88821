"""Commands of a `BlockIO` as coroutines."""

from __future__ import annotations

import asyncio

from farpage.blockio import BlockIO, Extent, wait_done


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
