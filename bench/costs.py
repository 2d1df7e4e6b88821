"""What farpage costs while it has nothing to do, and what it keeps: processor time, page tables, memory.

    python -m bench.costs [--seconds 10] [--memory 1G] [--limit 256M] [--dir DIR] [--json] [--out DIR]

A set as `farpage up` starts it pages one program, which writes all of its memory once and then touches
nothing for `--seconds`. Counted is what the daemons took of a core in that time, what the worker that pages
it has in memory beside the RAM tier, and what it keeps for each page of the client.

The exit status is 0, or 1 when a target was missed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, Final

from bench._command import carry_out
from bench._machine import describe_machine, describe_placement
from bench._pagers import Farpage, Work
from bench._published import BenchResult, Panel, Summary, add_options
from bench._rounds import Spread
from bench._toucher import Pattern, Phase, Toucher, build
from farpage.pager.replacement import BYTES_A_PAGE
from farpage.pager.states import ENTRY_BYTES
from farpage.pager.table import PAGE_BYTES
from farpage.terminal.sizes import parse_size

MOST_IDLE_PERCENT: Final = 1.0
MOST_TABLE_PERCENT: Final = 0.25
MOST_WORKER_BYTES: Final = 64 << 20
POPULATE: Final = Phase(Pattern.POPULATE, write_percent=100)
TICKS_A_SECOND: Final = os.sysconf("SC_CLK_TCK")


class CostsResult(BenchResult):
    """Everything that a run found."""

    machine: str
    placement: str
    memory_bytes: int
    limit_bytes: int
    seconds: float
    idle_percent: dict[str, float]
    """Of a core, by daemon."""
    table_percent: float
    """Bytes of page table and order of replacement to those of the client's memory."""
    worker_bytes: int
    """In memory, without the RAM tier."""
    tier_bytes: int

    @property
    def reached(self) -> bool:
        """Whether all targets were."""
        return (
            max(self.idle_percent.values()) <= MOST_IDLE_PERCENT
            and self.table_percent <= MOST_TABLE_PERCENT
            and self.worker_bytes <= MOST_WORKER_BYTES
        )

    @property
    def status(self) -> int:
        """1 where a target was missed."""
        return 0 if self.reached else 1

    def as_text(self) -> str:
        """Return the report for a terminal."""
        tables, own, tier = self.table_percent, self.worker_bytes / 2**20, self.tier_bytes / 2**20
        idle = ", ".join(f"{name} {percent:.2f} %" for name, percent in self.idle_percent.items())
        return "\n".join(
            (
                f"{self.machine}; {self.placement}",
                f"client of {self.memory_bytes >> 20} MiB, {self.limit_bytes >> 20} MiB resident at most",
                f"idle for {self.seconds:g} s, of a core: {idle} (at most {MOST_IDLE_PERCENT:g} %)",
                f"page table and replacement: {tables:.3f} % of the client's memory "
                f"(at most {MOST_TABLE_PERCENT:g} %)",
                f"worker: {own:.1f} MiB and {tier:.1f} MiB of RAM tier "
                f"(at most {MOST_WORKER_BYTES >> 20} MiB and the tier)",
                "targets reached" if self.reached else "a target was missed",
            )
        )

    def summary(self) -> Summary:
        """Return what is published."""
        context = {
            "machine": self.machine,
            "placement": self.placement,
            "client": f"{self.memory_bytes >> 20} MiB, {self.limit_bytes >> 20} MiB of it resident at most",
            "idle": f"for {self.seconds:g} s",
        }
        idle = {name: Spread.of([percent]) for name, percent in self.idle_percent.items()}
        panels = (
            Panel("idle daemons", "% of a core", idle, decimals=2),
            Panel("page table", "% of the memory", {"worker": Spread.of([self.table_percent])}, decimals=3),
            Panel("worker's memory", "MiB", {"worker": Spread.of([self.worker_bytes / 2**20])}, decimals=1),
        )
        return Summary("costs", "Costs of doing nothing", context, panels)


def _daemons(parent: int) -> Iterator[tuple[str, int]]:
    """Yield name and process of every daemon below this process, workers numbered."""
    workers = 0
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            try:
                fields = (folder / "stat").read_text().rpartition(")")[2].split()
            except OSError:
                continue
            children.setdefault(int(fields[1]), []).append(int(folder.name))
    found = [parent]
    for pid in found:
        found += sorted(children.get(pid, []))
    for pid in found[1:]:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        if "farpage.pager" in words:
            workers += 1
            yield f"worker {workers}", pid
        elif "vios" in words:
            yield words[words.index("run") + 1], pid
        elif "hypervisor" in words:
            yield "hypervisor", pid


def _core_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_A_SECOND


def _resident_bytes(pid: int) -> int:
    """Return what a process has in memory that no other process shares."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    return 0


def table_percent(pages: int, limit_pages: int) -> float:
    """Return what a client's tables take of its memory, with as much of it resident as may be."""
    return 100 * (pages * (ENTRY_BYTES + BYTES_A_PAGE) + limit_pages * 4) / (pages * PAGE_BYTES)


async def run(folder: Path, memory_bytes: int, limit_bytes: int, seconds: float) -> CostsResult:
    """Measure.

    :raise FarpageError: the set cannot be run.
    """
    with tempfile.TemporaryDirectory(prefix="fpbench-", dir=folder) as name:
        work = Work(Path(name), build(Path(name)), memory_bytes, limit_bytes, seconds, (POPULATE,))
        farpage = Farpage()
        async with (
            farpage.ready(work),
            await Toucher.start(work.program, farpage.kind, memory_bytes, 1, work.folder) as toucher,
        ):
            await farpage.take(toucher, work)
            await toucher.run(POPULATE, seconds)
            await asyncio.sleep(2.0)  # what was under way comes to rest
            daemons = dict(_daemons(os.getpid()))
            before = {name: _core_seconds(pid) for name, pid in daemons.items()}
            await asyncio.sleep(seconds)
            idle = {
                name: 100 * (_core_seconds(pid) - before[name]) / seconds for name, pid in daemons.items()
            }
            tier_bytes = (await farpage.hypervisor.client("touched")).ram_tier.taken_bytes
            workers = [_resident_bytes(pid) for name, pid in daemons.items() if name.startswith("worker")]
            return CostsResult(
                machine=describe_machine(),
                placement=describe_placement(),
                memory_bytes=memory_bytes,
                limit_bytes=limit_bytes,
                seconds=seconds,
                idle_percent=idle,
                table_percent=table_percent(memory_bytes // PAGE_BYTES, limit_bytes // PAGE_BYTES),
                worker_bytes=max(workers) - tier_bytes,
                tier_bytes=tier_bytes,
            )


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.costs", description=str(__doc__).split("\n")[0])
    parser.add_argument("--seconds", default=10.0, type=float, help="idle time (%(default)s)")
    parser.add_argument("--memory", default="1G", metavar="SIZE", help="the client's memory (%(default)s)")
    parser.add_argument("--limit", default="256M", metavar="SIZE", help="most of it resident (%(default)s)")
    parser.add_argument("--dir", default=Path("/var/tmp"), type=Path, help="folder on the disk (%(default)s)")
    add_options(parser)
    options = parser.parse_args()

    def begin() -> Coroutine[Any, Any, CostsResult]:
        memory_bytes = parse_size(options.memory, field="--memory")
        limit_bytes = parse_size(options.limit, field="--limit")
        return run(options.dir, memory_bytes, limit_bytes, options.seconds)

    return carry_out(options, begin)


if __name__ == "__main__":
    sys.exit(main())
