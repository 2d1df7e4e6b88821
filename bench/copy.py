"""How fast a volume moves: through an intermediate client, beside nbdcopy between two nbdkit servers.

    python -m bench.copy [--size 1G] [--rounds 5] [--dir DIR] [--realtime] [--json]

Both copy the same file, warm in the page cache, to a new one on the same file system, and are done when it
is on stable storage; they take turns. A second volume of the same size holds 5 % data in runs of 256 KiB.

With --realtime all that is measured runs before everything else on the machine.

The exit status is 0, or 1 when a target was missed.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any, Final

from bench._command import carry_out, check_rounds
from bench._machine import describe_disk, describe_machine, describe_placement, put_ahead, put_back
from bench._moves import Moves
from bench._nbd_contenders import Place, Served, running
from bench._published import BenchResult, Panel, Summary, add_options
from bench._rounds import Spread, ratio, turns
from farpage.terminal.sizes import parse_size

OURS, PEER, SPARSE = "farpage", "nbdcopy", "farpage, 5 % data"
LEAST_RATE: Final = 0.8
MOST_TIME: Final = 0.15
SPARSE_PERCENT: Final = 5


class CopyResult(BenchResult):
    """Everything that a run found; ratios are taken round by round."""

    machine: str
    placement: str
    disk: str
    size_bytes: int
    seconds: dict[str, Spread]
    rate_ratio: Spread
    """Of farpage's bytes a second to nbdcopy's."""
    sparse_ratio: Spread
    """Of the sparse volume's time to the full one's."""

    @property
    def reached(self) -> bool:
        """Whether both targets were."""
        return self.rate_ratio.median >= LEAST_RATE and self.sparse_ratio.median < MOST_TIME

    @property
    def status(self) -> int:
        """1 where a target was missed."""
        return 0 if self.reached else 1

    def as_text(self) -> str:
        """Return the table."""
        lines = [f"{self.machine}; {self.placement}; {self.disk}", f"{self.size_bytes >> 20} MiB"]
        lines.append(f"{'':<20}{'seconds, median (range)':>26}{'MB/s':>8}")
        for name, spread in self.seconds.items():
            rate = self.size_bytes / spread.median / 1e6
            lines.append(f"{name:<20}{spread.text(2):>26}{rate:>8.0f}")
        lines.append(
            f"rate of {OURS} to {PEER} {self.rate_ratio.text(2)}, target at least {LEAST_RATE}; "
            f"time with {SPARSE_PERCENT} % data {self.sparse_ratio.text(3)}, target below {MOST_TIME}: "
            + ("reached" if self.reached else "missed")
        )
        return "\n".join(lines)

    def summary(self) -> Summary:
        """Return what is published."""
        context = {
            "machine": self.machine,
            "placement": self.placement,
            "disk": self.disk,
            "size": f"{self.size_bytes >> 20} MiB",
        }
        ratios = {f"rate of {OURS} / {PEER}": self.rate_ratio, f"{SPARSE} / {OURS}": self.sparse_ratio}
        panels = (Panel("copying a volume", "seconds", self.seconds, ratios, 2),)
        return Summary("copy", "Copying a volume beside nbdcopy", context, panels)


async def run(folder: Path, size_bytes: int, rounds: int, realtime: bool) -> CopyResult:
    """Measure.

    :raise FarpageError: a VIOS refuses something.
    """
    seconds: dict[str, list[float]] = {OURS: [], PEER: [], SPARSE: []}
    with tempfile.TemporaryDirectory(prefix="fpb-", dir=folder) as name:
        work = Path(name)
        moves = Moves(work)
        async with moves.running(4 * size_bytes):
            source = await moves.make("full", size_bytes, 100)
            await moves.make("sparse", size_bytes, SPARSE_PERCENT)
            for pid in moves.pids if realtime else ():
                put_ahead(pid)
            for number in range(rounds):
                for contender in turns([OURS, PEER, SPARSE], number):
                    if realtime:
                        put_ahead()
                    if contender == PEER:
                        took = await _nbdcopy(work, source, size_bytes)
                    else:
                        took = await moves.copy("full" if contender == OURS else "sparse", size_bytes)
                    put_back()
                    seconds[contender].append(took)
                    print(
                        f"round {number + 1} of {rounds}: {contender} {took:.2f} s",
                        file=sys.stderr,
                        flush=True,
                    )
        rate_ratio = ratio(seconds[PEER], seconds[OURS])
        sparse_ratio = ratio(seconds[SPARSE], seconds[OURS])
        assert rate_ratio is not None
        assert sparse_ratio is not None
        return CopyResult(
            machine=describe_machine(),
            placement=describe_placement() + (", measured with SCHED_RR" if realtime else ""),
            disk=describe_disk(work),
            size_bytes=size_bytes,
            seconds={name: Spread.of(values) for name, values in seconds.items()},
            rate_ratio=rate_ratio,
            sparse_ratio=sparse_ratio,
        )


async def _nbdcopy(folder: Path, source: Path, size_bytes: int) -> float:
    """Copy with the peer and return the seconds."""
    target = folder / "peer"
    with target.open("wb") as file:
        file.truncate(size_bytes)
    served = Served(folder, direct=False, tcp=False)
    places = [Place(served, "from"), Place(served, "to")]
    servers = [
        ["nbdkit", "-f", "-r", "-U", str(places[0].socket), "file", str(source)],
        ["nbdkit", "-f", "-U", str(places[1].socket), "file", str(target)],
    ]
    async with running(servers[0], places[0]), running(servers[1], places[1]):
        began = time.monotonic()
        process = await asyncio.create_subprocess_exec("nbdcopy", "--flush", *(place.uri for place in places))
        if await process.wait():
            raise SystemExit("nbdcopy failed")
        took = time.monotonic() - began
    for path in (target, *(place.socket for place in places)):
        path.unlink(missing_ok=True)
    return took


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.copy", description=str(__doc__).split("\n")[0])
    parser.add_argument("--size", default="1G", metavar="SIZE", help="size of the volumes (%(default)s)")
    parser.add_argument("--rounds", default=5, type=int, help="times that all have a turn (%(default)s)")
    parser.add_argument("--dir", default=Path("/var/tmp"), type=Path, help="folder on the disk (%(default)s)")
    parser.add_argument("--realtime", action="store_true", help="run before everything else on the machine")
    add_options(parser)
    options = parser.parse_args()
    for program in ("nbdkit", "nbdcopy", "qemu-img"):
        if shutil.which(program) is None:
            raise SystemExit(f"{program} is not installed: apt.txt names the packages")

    def begin() -> Coroutine[Any, Any, CopyResult]:
        check_rounds(options.dir, options.rounds)
        return run(options.dir, parse_size(options.size, field="--size"), options.rounds, options.realtime)

    return carry_out(options, begin)


if __name__ == "__main__":
    sys.exit(main())
