"""A campaign is worth what its clients notice: every way in which a page can be wrong is told, and named."""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.faults.campaign.busy import compile_stamper
from tests.support.paged_set import DEADLINE_SECONDS

WORDS = 512
PAGES = 64
CLIENT = 3
STEP = 0xD1342543DE82EF95
MASK = (1 << 64) - 1


def page_of(stamp: int) -> bytes:
    """Return the content of a page with a stamp."""
    return struct.pack(f"<{WORDS}Q", *((stamp + place * STEP) & MASK for place in range(WORDS)))


@dataclass
class Stamped:
    """Memory that two threads have written to, and that they have verified since."""

    library: ctypes.CDLL
    memory: mmap.mmap
    report: int

    def stamp(self, page: int) -> int:
        (stamp,) = struct.unpack_from("<Q", self.memory, page * 4096)
        assert isinstance(stamp, int)
        return stamp

    def put(self, page: int, content: bytes) -> None:
        self.memory[page * 4096 : (page + 1) * 4096] = content

    def kinds_found(self) -> dict[int, str]:
        """Verify all pages; return what is wrong by page."""
        self.library.stamper_verify()
        os.set_blocking(self.report, False)
        try:
            lines = os.read(self.report, 1 << 16).decode().splitlines()
        except BlockingIOError:
            return {}
        return {int(words[2]): words[3] for words in map(str.split, lines) if words[0] == "wrong"}


@pytest.fixture
def stamped(tmp_path: Path) -> Iterator[Stamped]:
    library = ctypes.CDLL(str(compile_stamper(tmp_path)))
    memory = mmap.mmap(-1, PAGES * 4096)
    buffer = ctypes.c_char.from_buffer(memory)
    report, told = os.pipe()
    never_ns = ctypes.c_uint64(int(DEADLINE_SECONDS * 1e9))
    assert not library.stamper_start(
        ctypes.byref(buffer),
        ctypes.c_uint64(PAGES),
        CLIENT,
        2,
        ctypes.c_uint64(1),
        told,
        never_ns,
        ctypes.c_uint64(0),
    )
    counts = (ctypes.c_uint64 * 4)()
    while counts[1] < 100 * PAGES:
        library.stamper_counts(counts)
    library.stamper_stop()
    library.stamper_join()
    yield Stamped(library, memory, report)
    del buffer
    memory.close()
    os.close(report)
    os.close(told)


def test_pages_that_hold_what_was_written_last_are_right(stamped: Stamped) -> None:
    assert stamped.kinds_found() == {}
    assert stamped.stamp(5) >> 56 == 0x5A
    assert stamped.stamp(5) >> 40 & 0xFFFF == CLIENT
    assert stamped.stamp(5) >> 22 & 0x3FFFF == 5


def test_every_wrong_page_is_told_by_its_kind(stamped: Stamped) -> None:
    old = page_of(stamped.stamp(1) - 1)
    flipped = bytearray(page_of(stamped.stamp(6)))
    flipped[1000] ^= 4
    right = page_of(stamped.stamp(5))
    stamped.put(0, bytes(4096))
    stamped.put(1, old)
    stamped.put(2, page_of(stamped.stamp(2) + 1))
    stamped.put(3, page_of(stamped.stamp(30)))
    stamped.put(4, page_of(stamped.stamp(4) + (1 << 40)))
    stamped.put(5, page_of(stamped.stamp(5) - 1)[:2048] + right[2048:])
    stamped.put(6, bytes(flipped))
    assert stamped.kinds_found() == {
        0: "zeros",
        1: "old",
        2: "newer",
        3: "foreign_page",
        4: "foreign_client",
        5: "torn",
        6: "damaged",
    }
    assert stamped.kinds_found() == {}, "a wrong page is told of once"
