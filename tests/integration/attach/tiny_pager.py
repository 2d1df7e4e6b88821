"""The smallest pager: keeps pages of a client in a dictionary, serves faults from the event loop."""

from __future__ import annotations

import asyncio
import errno
import os

from farpage.attach.memory import ClientMemory
from farpage.kernel.memory import PAGE_SIZE, AlignedBuffer, punch_hole, resident_ranges
from farpage.kernel.userfaultfd import FLAG_MINOR, FLAG_WP


class TinyPager:
    def __init__(self, memory: ClientMemory) -> None:
        self.memory = memory
        self.faults = 0
        self._stored: dict[int, bytes] = {}
        self._buffer = AlignedBuffer(PAGE_SIZE)

    def start(self) -> None:
        self.memory.register()
        asyncio.get_running_loop().add_reader(self.memory.uffd.fileno(), self._serve)

    def stop(self) -> None:
        asyncio.get_running_loop().remove_reader(self.memory.uffd.fileno())

    def resident_pages(self) -> list[int]:
        memory = self.memory
        return [
            (offset - memory.memfd_offset_bytes) // PAGE_SIZE + page
            for offset, length in resident_ranges(
                memory.memfd, memory.memfd_offset_bytes, memory.length_bytes
            )
            for page in range(length // PAGE_SIZE)
        ]

    def evict(self, page: int) -> None:
        memory = self.memory
        address = memory.start_address + page * PAGE_SIZE
        offset = memory.memfd_offset_bytes + page * PAGE_SIZE
        assert memory.uffd.write_protect(address, PAGE_SIZE, True) == 0
        self._stored[page] = os.pread(memory.memfd, PAGE_SIZE, offset)
        punch_hole(memory.memfd, offset, PAGE_SIZE)

    def restore_all(self) -> None:
        for page in list(self._stored):
            self._fill(page)

    def _fill(self, page: int) -> None:
        uffd, address = self.memory.uffd, self.memory.start_address + page * PAGE_SIZE
        content = self._stored.pop(page, None)
        if content is None:
            done = uffd.zeropage(address, PAGE_SIZE)
        else:
            self._buffer.view[:] = content
            done = uffd.copy(address, self._buffer.address, PAGE_SIZE)
        assert done in (PAGE_SIZE, -errno.EEXIST), done
        uffd.wake(address, PAGE_SIZE)

    def _serve(self) -> None:
        uffd = self.memory.uffd
        for _, flags, exact in uffd.read_events():
            self.faults += 1
            page = (exact - self.memory.start_address) // PAGE_SIZE
            address = self.memory.start_address + page * PAGE_SIZE
            if flags & FLAG_WP:
                uffd.write_protect(address, PAGE_SIZE, False)
            elif flags & FLAG_MINOR:
                uffd.continue_(address, PAGE_SIZE)
                uffd.wake(address, PAGE_SIZE)
            else:
                self._fill(page)
