"""farpage beside the host's own swap and page cache, on the same disk and under the same limit.

    python -m bench.paging [--rounds 5] [--seconds 2] [--memory 512M] [--limit 128M] [--ram-tier 10%]
                           [--only PATTERN]... [--sparse] [--cpu N] [--dir DIR] [--json] [--out DIR]

Every contender pages the memory of the same program, `touch.c`, which checks every page it touches:

- `farpage`: a set as `farpage up` starts it, two VIOSes on a common `dir:` device; the program is attached
  while it runs, as `farpage client attach --pid` does it; its volume is allocated in full (`allocate=full`),
  as a swap area is, which may have no holes, or with `--sparse` as pages are first written;
- `swap-3`, `swap-0`: a swap file and a memory cgroup, with vm.page-cluster 3 (the kernel's default) and 0;
- `file`, `file-random`: a file with all of its blocks that the program maps MAP_SHARED, in a memory cgroup,
  without and with MADV_RANDOM;
- `zram`, where pages are compressible: a share of the limit as large as farpage's RAM tier for zram with LZ4,
  the same swap file for the rest.

With `--cpu N` the program runs on that CPU alone under every contender, as a guest does whose vCPUs are
pinned, and farpage's hypervisor with `--worker-cpus clients`.

The exit status is 0, 1 when a page came back wrong, or 6 when host swap could not take part.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Coroutine
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench import _hostswap
from bench._command import carry_out, check_rounds, tell
from bench._machine import describe_disk, describe_machine, describe_placement
from bench._pagers import Farpage, FarpageInPython, HostSwap, MappedFile, Pager, Work, Zram, measure
from bench._paging_report import PagingResult, Rounds, ratios, results
from bench._published import add_options
from bench._rounds import turns
from bench._toucher import MemoryKind, Pattern, Phase, build
from farpage.errors import InvalidInput, Unsupported
from farpage.kernel.affinity import format_cpus, own_cpus
from farpage.pager.limit import DEFAULT_TIER_PERCENT, LARGEST_TIER_PERCENT
from farpage.terminal.sizes import parse_percent, parse_size

PHASES = (
    Phase(Pattern.POPULATE, write_percent=100),
    *(
        Phase(pattern, write_percent, threads)
        for threads in (1, 4)
        for pattern, write_percent in (
            (Pattern.SEQUENTIAL, 0),
            (Pattern.STRIDED, 0),
            (Pattern.RANDOM, 0),
            (Pattern.RANDOM, 50),
        )
    ),
)
COMPRESSIBLE_PHASES = (
    Phase(Pattern.POPULATE, write_percent=100, compressible=True),
    *(Phase(Pattern.ZIPF, 20, threads, compressible=True, warmed=True) for threads in (1, 4)),
)
SCATTERED_PHASES = (Phase(Pattern.POPULATE, write_percent=100, scattered=True),)
CLUSTERS = (3, 0)
SWAP_SHARE = 1.25
"""Size of the swap file as a share of the memory; the kernel keeps slots of pages that are back in memory."""


@dataclass(frozen=True)
class Settings:
    """What was asked for on the command line."""

    memory_bytes: int
    limit_bytes: int
    rounds: int
    seconds: float
    folder: Path
    ram_tier_percent: int = DEFAULT_TIER_PERCENT
    sparse: bool = False
    """Whether farpage's volumes are allocated as they are written."""
    twin: bool = False
    """Whether farpage without compiled loops takes part."""
    only: frozenset[Pattern] = frozenset()
    """What is measured, after the memory is populated; empty for everything."""
    cpu: int | None = None
    """Where the program runs; None for anywhere."""

    def __post_init__(self) -> None:
        check_rounds(self.folder, self.rounds)
        if not 0.05 <= self.seconds <= 60:
            raise InvalidInput("--seconds", f"{self.seconds} is not from 0.05 to 60", "two are plenty")
        if self.memory_bytes % (1 << 20) or self.limit_bytes % (1 << 20):
            raise InvalidInput("--memory, --limit", "not whole mebibytes", "write for example 512M")
        if not 16 << 20 <= self.limit_bytes < self.memory_bytes:
            raise InvalidInput(
                "--limit", "it is not from 16M to below the memory", "a quarter of it is usual"
            )
        if self.cpu is not None and self.cpu not in own_cpus():
            raise InvalidInput(
                "--cpu", f"CPU {self.cpu} may not be used", f"name one of {format_cpus(own_cpus())}"
            )
        free_bytes = shutil.disk_usage(self.folder).free
        needed_bytes = int(self.memory_bytes * (1 + SWAP_SHARE)) + (64 << 20)
        if free_bytes < needed_bytes:
            raise InvalidInput(
                "--dir",
                f"{self.folder} has {free_bytes >> 20} MiB free and {needed_bytes >> 20} MiB are needed",
                "name another folder or use less --memory",
            )


async def run(settings: Settings) -> PagingResult:
    """Measure; whatever was set up is gone on return, also when it is cancelled.

    :raise FarpageError: a contender cannot be run, or gave back wrong pages.
    """
    with ExitStack() as undo:
        folder = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="fpbench-", dir=settings.folder)))
        work = Work(
            folder=folder,
            program=build(folder),
            memory_bytes=settings.memory_bytes,
            limit_bytes=settings.limit_bytes,
            seconds=settings.seconds,
            phases=(),
            ram_tier_percent=settings.ram_tier_percent,
            cpu=settings.cpu,
        )
        farpage = Farpage(sparse=settings.sparse)
        files: list[Pager] = []
        if not _hostswap.why_no_limit():
            files = [MappedFile(kind) for kind in (MemoryKind.FILE, MemoryKind.FILE_RANDOM)]
        swaps: list[Pager] = []
        compressing: list[Pager] = []
        own: list[Pager] = [farpage, FarpageInPython(sparse=settings.sparse)] if settings.twin else [farpage]
        without_swap = ""
        try:
            swaps, compressing = _swap_pagers(undo, work)
        except Unsupported as problem:
            without_swap = str(problem)
            tell(without_swap)
        parts = [
            (_chosen(PHASES, settings.only), [*own, *swaps, *files]),
            (_chosen(SCATTERED_PHASES, settings.only), [*own, *swaps, *files]),
            (_chosen(COMPRESSIBLE_PHASES, settings.only), [*own, *swaps, *files, *compressing]),
        ]
        found = [
            (phases, await _rounds(replace(work, phases=phases), contenders, settings.rounds))
            for phases, contenders in parts
            if phases
        ]
        return PagingResult(
            machine=describe_machine(),
            placement=_placement(settings.cpu),
            cpu=settings.cpu,
            disk=describe_disk(folder),
            access=farpage.access,
            sparse=settings.sparse,
            memory_bytes=settings.memory_bytes,
            limit_bytes=settings.limit_bytes,
            ram_tier_percent=settings.ram_tier_percent,
            seconds=settings.seconds,
            rounds=settings.rounds,
            without_swap=without_swap,
            results=tuple(row for phases, rounds in found for row in results(rounds, phases)),
            ratios=tuple(row for phases, rounds in found for row in ratios(rounds, phases, farpage.name)),
        )


def _placement(cpu: int | None) -> str:
    if cpu is None:
        return f"nothing is pinned: touching threads, workers and VIOSes share {describe_placement()}"
    return (
        f"touching threads are pinned to CPU {cpu}, where farpage's worker follows them "
        f"(--worker-cpus clients); VIOSes and the kernel's threads share {describe_placement()}"
    )


def _chosen(phases: tuple[Phase, ...], only: frozenset[Pattern]) -> tuple[Phase, ...]:
    """Return the phases of some patterns behind the one that populates the memory; none without any."""
    populate, *others = phases
    chosen = [phase for phase in others if not only or phase.pattern in only]
    return (populate, *chosen) if chosen or not only or Pattern.POPULATE in only else ()


async def _rounds(work: Work, contenders: list[Pager], count: int) -> Rounds:
    """Give every contender its turn in each round."""
    rounds: Rounds = {pager.name: [] for pager in contenders}
    for number in range(count):
        for pager in turns(contenders, number):
            tell(f"round {number + 1} of {count}: {pager.name}, {work.phases[-1].name} and before")
            rounds[pager.name].append(await measure(pager, work, seed=number + 1))
    return rounds


def _swap_pagers(undo: ExitStack, work: Work) -> tuple[list[Pager], list[Pager]]:
    """Return host swap's contenders; the second list needs zram.

    The swap file is made, and it is tried once whether it and the limit can be used.

    :raise Unsupported: they cannot.
    """
    if why := _hostswap.why_unavailable():
        raise Unsupported("host swap", why, "figures are without it")
    path = undo.enter_context(_hostswap.swap_file(work.folder, int(work.memory_bytes * SWAP_SHARE)))
    with _hostswap.swapping_on(path), _hostswap.memory_cgroup(work.limit_bytes):
        pass
    if why := _hostswap.why_no_zram():
        tell(f"without zram: {why}")
    return [HostSwap(path, exponent) for exponent in CLUSTERS], [] if why else [Zram(path)]


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.paging",
        description="Page a program's memory with farpage, host swap and the page cache, in turn, and print "
        "ratios. farpage's volumes are allocated in full, as a swap area is.",
    )
    parser.add_argument(
        "--memory", default="512M", metavar="SIZE", help="memory that is touched (%(default)s)"
    )
    parser.add_argument("--limit", default="128M", metavar="SIZE", help="most of it resident (%(default)s)")
    parser.add_argument(
        "--ram-tier",
        default=f"{DEFAULT_TIER_PERCENT}%",
        metavar="PERCENT",
        help="share of the limit for farpage's RAM tier, and for zram (by default 10%%)",
    )
    parser.add_argument(
        "--only",
        action="append",
        default=[],
        choices=[pattern.value for pattern in Pattern],
        help="measure just this pattern; may be given again",
    )
    parser.add_argument(
        "--cpu",
        type=int,
        metavar="N",
        help="have the program run on this CPU alone, and farpage's worker with it (by default anywhere)",
    )
    parser.add_argument(
        "--twin", action="store_true", help="have farpage without its compiled loops take part as well"
    )
    parser.add_argument(
        "--sparse",
        action="store_true",
        help="allocate farpage's volumes as they are written; by default in full, as a swap area is",
    )
    parser.add_argument("--rounds", default=5, type=int, help="times that everybody has a turn (%(default)s)")
    parser.add_argument("--seconds", default=2.0, type=float, help="length of a random phase (%(default)s)")
    parser.add_argument(
        "--dir", default=Path("/var/tmp"), type=Path, help="folder on the disk to page to (%(default)s)"
    )
    add_options(parser)
    options = parser.parse_args()

    def begin() -> Coroutine[Any, Any, PagingResult]:
        return run(
            Settings(
                memory_bytes=parse_size(options.memory, field="--memory"),
                limit_bytes=parse_size(options.limit, field="--limit"),
                rounds=options.rounds,
                seconds=options.seconds,
                folder=options.dir,
                ram_tier_percent=parse_percent(
                    options.ram_tier, field="--ram-tier", most=LARGEST_TIER_PERCENT
                ),
                sparse=options.sparse,
                twin=options.twin,
                only=frozenset(map(Pattern, options.only)),
                cpu=options.cpu,
            )
        )

    return carry_out(options, begin)


if __name__ == "__main__":
    sys.exit(main())
