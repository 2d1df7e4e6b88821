"""A volume that is filled: a stand-in for the first VIOS's copying volume, page by page."""

from __future__ import annotations

from farpage.blockio import Allocation, Done, Extent, ExtentsDone
from farpage.definition.model import PAGE_BYTES
from tests.support.blockio import MemoryIO


class FillIO(MemoryIO):
    """Writes and zeroes absent pages only; its map calls absent pages holes and present ones data."""

    def __init__(self, pages: int) -> None:
        super().__init__(pages * PAGE_BYTES)
        self.present = [False] * pages
        self.flushed = False

    def write(self, offset: int, data: memoryview, done: Done, *, fua: bool = False) -> None:
        def step() -> None:
            self.log.append(("write", offset, len(data)))
            error = self.errors.get("write", 0)
            if not error:
                self._fill(offset, data)
            done(error)

        self._run(step)

    def zero(
        self,
        offset: int,
        length: int,
        done: Done,
        *,
        punch: bool = True,
        fast: bool = False,
        fua: bool = False,
    ) -> None:
        def step() -> None:
            self.log.append(("zero", offset, length))
            error = self.errors.get("zero", 0)
            if not error:
                self._fill(offset, memoryview(bytes(length)))
            done(error)

        self._run(step)

    def client_writes(self, page: int, data: bytes) -> None:
        """What the client itself does: it goes before every fill."""
        self.content[page * PAGE_BYTES : (page + 1) * PAGE_BYTES] = data
        self.present[page] = True

    def _fill(self, offset: int, data: memoryview) -> None:
        self.flushed = False
        for at in range(0, len(data), PAGE_BYTES):
            page = (offset + at) // PAGE_BYTES
            if not self.present[page]:
                self.client_writes(page, bytes(data[at : at + PAGE_BYTES]))

    def flush(self, done: Done) -> None:
        def finished(error: int) -> None:
            self.flushed = not error
            done(error)

        super().flush(finished)

    def extents(self, offset: int, length: int, done: ExtentsDone) -> None:
        def step() -> None:
            if error := self.errors.get("extents", 0):
                done(error, None)
                return
            found: list[Extent] = []
            for page in range(offset // PAGE_BYTES, (offset + length) // PAGE_BYTES):
                allocation = Allocation.DATA if self.present[page] else Allocation.HOLE | Allocation.ZERO
                if found and found[-1].allocation == allocation:
                    found[-1] = Extent(found[-1].length + PAGE_BYTES, allocation)
                else:
                    found.append(Extent(PAGE_BYTES, allocation))
            done(0, found[:5])  # a prefix, as a server may tell

        self._run(step)
