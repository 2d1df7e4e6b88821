"""What carries out the I/O of a local device's volumes: threads, queues of the kernel for direct I/O, aligned
buffers."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Final, TypeVar

from farpage.device.reads import RingReader
from farpage.device.spans import SpanGate
from farpage.device.threads import IoThreads
from farpage.device.writes import AsyncWriter
from farpage.kernel.buffers import AlignedPool

Result = TypeVar("Result")

PREALLOCATED: Final = {4 << 10: 64, 64 << 10: 16, 1 << 20: 4}
"""Buffers that are there from the start by size, so that paging out under memory pressure needs no memory."""


class Engine:
    """One device's; made, used and closed in the event loop that uses its volumes."""

    def __init__(self, device_name: str, *, direct: bool) -> None:
        """Without `direct` I/O the threads do everything."""
        self.threads = IoThreads(f"io-{device_name}"[:15])
        self.reader = RingReader.open() if direct else None
        self.writer = AsyncWriter.open() if direct else None
        self.buffers = AlignedPool(preallocated=PREALLOCATED)
        self._gates: weakref.WeakValueDictionary[str, SpanGate] = weakref.WeakValueDictionary()

    async def run(self, work: Callable[..., Result], *arguments: Any) -> Result:
        """Run `work(*arguments)` in a thread and return what it returns, or raise what it raises."""
        return await self.threads.run(work, *arguments)

    def gate(self, volume: str) -> SpanGate:
        """Return the gate that all who have a volume open go through."""
        gate = self._gates.get(volume)
        if gate is None:
            gate = self._gates[volume] = SpanGate()
        return gate

    async def close(self) -> None:
        """Finish what was submitted and end the threads."""
        if self.reader is not None:
            await self.reader.close()
        if self.writer is not None:
            await self.writer.close()
        await self.threads.close()
        self.buffers.close()
