"""The demo's guest without a VM: a process that fills a `farpage.Region` and checks it in passes.

It prints one line of JSON for each thing done: first a `FillReport`, then a `PassReport` for every pass.
Three passes of four go through the pages in order, the fourth through runs of pages in random order.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Iterator
from types import FrameType

import numpy as np
from numpy.typing import NDArray

from farpage.attach.region import Region
from farpage.demo.reports import FillReport, PassReport
from farpage.demo.stamps import PAGE_BYTES, WORDS_PER_PAGE, Words, is_rewritten, is_stamp, write_stamp
from farpage.embedded.parent import follow_parent
from farpage.terminal.problems import report

RUN_PAGES = 64
"""Pages in a row in a pass that is in random order otherwise."""


class Verifier:
    """Writes and checks `pages` pages of `words`; the versions written last are kept in this object."""

    def __init__(self, words: Words, pages: int, seed: int = 1) -> None:
        self._words = words
        self._versions: NDArray[np.uint32] = np.zeros(pages, dtype=np.uint32)
        self._random = np.random.default_rng(seed)
        self._passes = 0
        self._stopped = False

    def stop(self) -> None:
        """Have `fill` and `check` return soon; safe in a signal handler."""
        self._stopped = True

    def fill(self) -> FillReport | None:
        """Write every page for the first time; None when stopped."""
        start = time.monotonic()
        for number in range(len(self._versions)):
            if self._stopped:
                return None
            write_stamp(self._page(number), number, 0)
        return FillReport(pages=len(self._versions), seconds=time.monotonic() - start)

    def check(self) -> PassReport | None:
        """Make one pass; None when stopped."""
        self._passes += 1
        pages = len(self._versions)
        scratch = np.empty(WORDS_PER_PAGE, dtype=np.uint64)
        wrong, longest_gap_ns = 0, 0
        start = last = time.monotonic_ns()
        for number in self._order():
            if self._stopped:
                return None
            page = self._page(number)
            if not is_stamp(page, number, int(self._versions[number]), scratch):
                wrong += 1
            if is_rewritten(number, self._passes):
                self._versions[number] = self._passes
                write_stamp(page, number, self._passes)
            now = time.monotonic_ns()
            longest_gap_ns = max(longest_gap_ns, now - last)
            last = now
        return PassReport(
            pages_verified=pages - wrong,
            pages_wrong=wrong,
            seconds=(last - start) / 1e9,
            longest_gap_ms=longest_gap_ns / 1e6,
        )

    def _order(self) -> Iterator[int]:
        pages = len(self._versions)
        if self._passes % 4:
            yield from range(pages)
            return
        for start in self._random.permutation(np.arange(0, pages, RUN_PAGES)).tolist():
            yield from range(start, min(start + RUN_PAGES, pages))

    def _page(self, number: int) -> Words:
        return self._words[number * WORDS_PER_PAGE : (number + 1) * WORDS_PER_PAGE]


def run(attach_path: str, name: str, memory_bytes: int, fill_bytes: int) -> None:
    """Fill and check until SIGTERM."""
    with Region(memory_bytes, name=name, limit_bytes=memory_bytes, hypervisor=attach_path) as region:
        _work(region, fill_bytes)


def _work(region: Region, fill_bytes: int) -> None:
    # Every array is gone when this returns; a region cannot be closed under one.
    verifier = Verifier(np.frombuffer(region, dtype=np.uint64), fill_bytes // PAGE_BYTES)

    def stop(_number: int, _frame: FrameType | None) -> None:
        verifier.stop()

    signal.signal(signal.SIGTERM, stop)
    done: FillReport | PassReport | None = verifier.fill()
    while done is not None:
        sys.stdout.write(done.model_dump_json() + "\n")
        sys.stdout.flush()
        done = verifier.check()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def main() -> int:
    """Run the command line."""
    follow_parent()
    parser = argparse.ArgumentParser(description="Fill a region and check it in passes.")
    parser.add_argument("--attach", required=True, metavar="PATH", help="the hypervisor's attach socket")
    parser.add_argument("--name", required=True)
    parser.add_argument("--memory", required=True, type=int, metavar="BYTES")
    parser.add_argument("--fill", required=True, type=int, metavar="BYTES")
    options = parser.parse_args()
    try:
        run(options.attach, options.name, options.memory, options.fill)
    except Exception as problem:
        return report(problem)
    return 0


if __name__ == "__main__":
    sys.exit(main())
