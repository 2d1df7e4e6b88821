"""Block commands as coroutines."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from farpage.blockio import BlockIO, Extent, read_bytes, wait_done

__all__ = ["condition", "extents_of", "read_bytes", "wait_done", "write_bytes", "zero_bytes"]


async def write_bytes(io: BlockIO, offset: int, data: bytes, *, fua: bool = False) -> int:
    """Write and return the error."""
    return await wait_done(lambda done: io.write(offset, memoryview(data), done, fua=fua))


async def zero_bytes(io: BlockIO, offset: int, length: int) -> int:
    """Zero and return the error."""
    return await wait_done(lambda done: io.zero(offset, length, done))


async def extents_of(io: BlockIO, offset: int, length: int) -> list[Extent]:
    future: asyncio.Future[list[Extent]] = asyncio.get_running_loop().create_future()

    def done(error: int, extents: list[Extent] | None) -> None:
        if error or extents is None:
            future.set_exception(OSError(error, "extents"))
        else:
            future.set_result(extents)

    io.extents(offset, length, done)
    return await future


async def condition(holds: Callable[[], bool], timeout_seconds: float = 60.0) -> None:
    """Wait until something is so."""
    async with asyncio.timeout(timeout_seconds):
        while not holds():
            await asyncio.sleep(0.001)
