"""A process whose region is paged, and that does with its pages what a test tells it, checking every byte.

Run as `python region_client.py STATE PAGES LIMIT_BYTES [NAME [VERSION]]`: with a version every page has that
one already, which another process has written.
It answers each command, one a line, with a line:

    write FIRST COUNT     give the pages a new version of their content        -> done
    verify FIRST COUNT    compare every byte with what was written last         -> wrong N
    punch FIRST COUNT     give the pages back to the kernel, as a balloon does    -> done
    punched FIRST COUNT   count what they hold now, and forget what it was       -> zeros N old N other N
    close                 let the region go                                     -> done
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from pathlib import Path

import numpy as np

from farpage.attach.region import Region

WORDS = 512
PAGE_BYTES = 8 * WORDS
CHUNK_PAGES = 64


Words = np.ndarray[tuple[int, ...], np.dtype[np.uint64]]


def expected_words(first: int, versions: Words) -> Words:
    """Return the content of the pages from `first` on at their versions, a row each; version 0 is zeros.

    Each word is derived from its page, the page's version and its place.
    """
    words = np.arange(1, WORDS + 1, dtype=np.uint64)
    numbers = np.arange(first + 1, first + 1 + len(versions), dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    seeds = (numbers ^ (versions * np.uint64(0xC2B2AE3D27D4EB4F)))[:, None]
    return np.where(versions[:, None] == 0, np.uint64(0), seeds * words)


class Pages:
    """Pages with known content."""

    def __init__(self, region: Region, pages: int, version: int) -> None:
        self._content = np.frombuffer(region, np.uint64).reshape(pages, WORDS)
        self._versions = np.full(pages, version, np.uint64)

    def _expected(self, first: int, last: int) -> Words:
        return expected_words(first, self._versions[first:last])

    def write(self, first: int, count: int) -> str:
        """Write the next version of pages."""
        for start in range(first, first + count, CHUNK_PAGES):
            end = min(start + CHUNK_PAGES, first + count)
            self._versions[start:end] += np.uint64(1)
            self._content[start:end] = self._expected(start, end)
        return "done"

    def verify(self, first: int, count: int) -> str:
        """Count the pages with any wrong byte; pages never written must be zero."""
        wrong = 0
        for start in range(first, first + count, CHUNK_PAGES):
            end = min(start + CHUNK_PAGES, first + count)
            wrong += int((self._content[start:end] != self._expected(start, end)).any(axis=1).sum())
        return f"wrong {wrong}"

    def punch(self, first: int, count: int) -> str:
        """Remove pages from the file behind the region."""
        address = self._content.ctypes.data + first * PAGE_BYTES
        if ctypes.CDLL(None, use_errno=True).madvise(
            ctypes.c_void_p(address), ctypes.c_size_t(count * PAGE_BYTES), mmap.MADV_REMOVE
        ):
            return f"errno {ctypes.get_errno()}"
        return "done"

    def punched(self, first: int, count: int) -> str:
        """Count pages that read as zeros, as they were, or as anything else."""
        found = self._content[first : first + count].copy()
        zeros = ~found.any(axis=1)
        old = (found == self._expected(first, first + count)).all(axis=1) & ~zeros
        self._versions[first : first + count][zeros] = 0
        return f"zeros {zeros.sum()} old {old.sum()} other {count - zeros.sum() - old.sum()}"

    def release(self) -> None:
        """Give up the view of the region, so that it can be closed."""
        del self._content


def main() -> None:
    """Do what standard input says."""
    state, pages, limit_bytes = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    name = sys.argv[4] if len(sys.argv) > 4 else "client"
    version = int(sys.argv[5]) if len(sys.argv) > 5 else 0
    region = Region(pages * 4096, name=name, limit_bytes=limit_bytes, state=state)
    content = Pages(region, pages, version)
    print("ready", flush=True)
    for line in sys.stdin:
        word, *numbers = line.split()
        match word, [int(number) for number in numbers]:
            case "write", [first, count]:
                answer = content.write(first, count)
            case "verify", [first, count]:
                answer = content.verify(first, count)
            case "punch", [first, count]:
                answer = content.punch(first, count)
            case "punched", [first, count]:
                answer = content.punched(first, count)
            case "close", []:
                content.release()
                region.close()
                answer = "done"
            case _:
                answer = f"unknown command {line!r}"
        print(answer, flush=True)


if __name__ == "__main__":
    main()
