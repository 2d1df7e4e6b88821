"""What the RAM tier's store takes for a page: the compiled one beside the one in Python.

    python -m bench.store [--rounds 5] [--json] [--out DIR]

Both are full all the time, as in a client that pages: each page that is kept makes older ones leave. Pages
come one by one; they are those of `touch.c`: compressible ones, which LZ4 makes half as large, and others.

The exit status is 0, or 6 when the compiled store cannot be used here.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import numpy as np

from bench._command import carry_out, check_rounds, tell
from bench._machine import describe_machine
from bench._published import BenchResult, Panel, Summary, add_options
from bench._rounds import Spread, ratio, turns
from farpage.errors import Unsupported
from farpage.pager.checksum import page_checksum
from farpage.pager.store import PythonStore, Store, new_store
from farpage.pager.table import PAGE_BYTES

MOST_BYTES: Final = 13 << 20
"""10 % of a limit of 128 MiB."""
PAGES: Final = 20000
TAKEN_PAGES: Final = 4000
CONTENDERS: Final[dict[str, Callable[[int], Store]]] = {"compiled": new_store, "Python": PythonStore}
CASES: Final = ("keep a compressible page", "take a compressible page", "try an incompressible page")


class StoreResult(BenchResult):
    """Microseconds a page by case and store, and how many times as long the one in Python takes."""

    machine: str
    rounds: int
    microseconds: dict[str, dict[str, Spread]]
    ratios: dict[str, Spread | None]

    def as_text(self) -> str:
        """Return the report for a terminal."""
        lines = [f"{self.machine}; {self.rounds} rounds; us a page, median (range)"]
        for case, found in self.microseconds.items():
            times = ", ".join(f"{name} {spread.text(2)}" for name, spread in found.items())
            gain = self.ratios[case]
            lines.append(f"{case}: {times}; {gain.text(2) if gain else '-'} times as long")
        return "\n".join(lines)

    def summary(self) -> Summary:
        """Return what is published."""
        context = {"machine": self.machine, "rounds": str(self.rounds)}
        panels = [
            Panel(case, "us a page", found, {"Python / compiled": self.ratios[case]}, decimals=2)
            for case, found in self.microseconds.items()
        ]
        return Summary("store", "The RAM tier's store", context, panels)


async def run(rounds: int) -> StoreResult:
    """Measure both stores in turn.

    :raise Unsupported: the compiled one cannot be used here.
    """
    check_rounds(Path(), rounds)
    if isinstance(new_store(0), PythonStore):
        raise Unsupported("the compiled store", "it was not built", "install a C compiler, then farpage anew")
    small, large = _pages(compressible=True), _pages(compressible=False)
    sums = [page_checksum(page) for page in small]
    found: dict[str, dict[str, list[float]]] = {case: {name: [] for name in CONTENDERS} for case in CASES}
    for number in range(rounds):
        for name in turns(list(CONTENDERS), number):
            tell(f"round {number + 1} of {rounds}: {name}")
            for case, taken in zip(CASES, _measure(CONTENDERS[name], small, sums, large), strict=True):
                found[case][name].append(taken)
    return StoreResult(
        machine=describe_machine(),
        rounds=rounds,
        microseconds={
            case: {name: Spread.of(values) for name, values in by_name.items()}
            for case, by_name in found.items()
        },
        ratios={case: ratio(by_name["Python"], by_name["compiled"]) for case, by_name in found.items()},
    )


def _pages(*, compressible: bool) -> list[memoryview]:
    """Return pages with the words that `touch.c` fills them with."""
    words = np.arange(PAGE_BYTES // 8, dtype=np.uint64)
    if compressible:
        words[(words & 64) != 0] = 0
    starts = np.arange(PAGES, dtype=np.uint64)[:, None] * np.uint64(words.size)
    mixed = (starts + words + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0xBF58476D1CE4E5B9)
    content = memoryview(mixed.tobytes())
    return [content[at : at + PAGE_BYTES] for at in range(0, len(content), PAGE_BYTES)]


def _measure(
    make: Callable[[int], Store],
    small: Sequence[memoryview],
    sums: Sequence[int],
    large: Sequence[memoryview],
) -> tuple[float, float, float]:
    """Return what a page takes in each of the cases."""
    store = make(MOST_BYTES)
    while not store.dropped:
        for page, content in enumerate(small[: PAGES // 2]):
            store.keep(page, content)
    began = time.perf_counter()
    for page in range(PAGES // 2, PAGES):
        store.keep(page, small[page])
    kept = time.perf_counter() - began
    wanted = list(range(PAGES - TAKEN_PAGES, PAGES))
    random.Random(1).shuffle(wanted)
    began = time.perf_counter()
    for page in wanted:
        store.take(page, sums[page])
    taken = time.perf_counter() - began
    began = time.perf_counter()
    for page, content in enumerate(large):
        store.keep(page, content)
    tried = time.perf_counter() - began
    return (kept / (PAGES // 2) * 1e6, taken / TAKEN_PAGES * 1e6, tried / PAGES * 1e6)


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.store", description=str(__doc__).split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="at least 1 (default: 5)")
    add_options(parser)
    options = parser.parse_args()
    return carry_out(options, lambda: run(options.rounds))


if __name__ == "__main__":
    sys.exit(main())
