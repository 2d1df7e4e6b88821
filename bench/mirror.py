"""What a mirror costs: farpage with redundancy `mirror` beside `none`, on the same two devices of one disk.

    python -m bench.mirror [--rounds 5] [--seconds 2] [--memory 256M] [--limit 64M] [--dir DIR]
                           [--json] [--out DIR]

Both page the memory of the same program, `touch.c`, under the same limit, and take turns. Populating shows
how fast pages leave (with a mirror each is written twice), random reads how long a page-in takes.

The exit status is 0, or 1 when a page came back wrong or a target was missed.
"""

from __future__ import annotations

import argparse
import asyncio
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

from pydantic import BaseModel, ConfigDict

from bench._machine import describe_disk, describe_machine, describe_placement
from bench._pagers import CLIENT, Farpage, Measured, Work, measure
from bench._published import Panel, Summary, add_options, check_options, publish
from bench._rounds import Spread, ratio, turns
from bench._toucher import Pattern, Phase, Toucher, build
from farpage.cli.report import report
from farpage.definition.model import Redundancy
from farpage.errors import FarpageError
from farpage.hypervisor.model import ClientAttach, ClientCreate
from farpage.terminal.sizes import parse_size

POPULATE: Final = Phase(Pattern.POPULATE, write_percent=100)
READ: Final = Phase(Pattern.RANDOM, write_percent=0, threads=1)
LEAST_PAGE_OUT: Final = 0.6
MOST_PAGE_IN: Final = 1.05


class OnTwoDevices(Farpage):
    """A set whose two VIOSes have a device each, and a client with one redundancy."""

    def __init__(self, redundancy: Redundancy) -> None:
        super().__init__()
        self.name = redundancy.value
        self._redundancy = redundancy

    @asynccontextmanager
    async def ready(self, work: Work) -> AsyncIterator[None]:
        """Start the set."""
        folders = {vios: work.folder / f"device-{vios}" for vios in ("vios1", "vios2")}
        for folder in folders.values():
            folder.mkdir()
        try:
            async with self.running(work, tuple(f"{vios}=dir:{path}" for vios, path in folders.items())):
                yield
        finally:
            for folder in folders.values():
                shutil.rmtree(folder)

    async def take(self, toucher: Toucher, work: Work) -> None:
        """Make the client with its redundancy, and attach the toucher as it."""
        hypervisor = self.hypervisor
        await hypervisor.create_client(
            ClientCreate(name=CLIENT, memory_bytes=work.memory_bytes, redundancy=self._redundancy)
        )
        await hypervisor.attach(CLIENT, ClientAttach(pid=toucher.pid, limit_bytes=work.limit_bytes))


class MirrorResult(BaseModel):
    """Everything that a run found; ratios are those of `mirror` to `none`, round by round."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    machine: str
    placement: str
    disk: str
    page_outs_per_second: dict[str, Spread]
    page_in_p50_us: dict[str, Spread]
    page_out_ratio: Spread | None
    page_in_ratio: Spread | None

    @property
    def reached(self) -> bool:
        """Whether both targets were."""
        outs, ins = self.page_out_ratio, self.page_in_ratio
        return (
            outs is not None
            and ins is not None
            and (outs.median >= LEAST_PAGE_OUT and ins.median <= MOST_PAGE_IN)
        )

    def as_text(self) -> str:
        """Return the table."""
        lines = [f"machine    {self.machine}", f"placement  {self.placement}", f"disk       {self.disk}", ""]
        lines.append(f"{'redundancy':<12}{'page-outs/s':>28}{'page-in p50, us':>28}")
        for name, outs in self.page_outs_per_second.items():
            lines.append(f"{name:<12}{outs.text():>28}{self.page_in_p50_us[name].text(1):>28}")
        if self.page_out_ratio and self.page_in_ratio:
            out_ratio, in_ratio = self.page_out_ratio.text(2), self.page_in_ratio.text(2)
            lines.append(f"{'ratio':<12}{out_ratio:>28}{in_ratio:>28}")
        lines.append(f"targets: page-outs at least {LEAST_PAGE_OUT}, page-in p50 at most {MOST_PAGE_IN}: ")
        lines[-1] += "reached" if self.reached else "missed"
        return "\n".join(lines)

    def summary(self) -> Summary:
        """Return what is published."""
        context = {"machine": self.machine, "placement": self.placement, "disk": self.disk}
        panels = (
            Panel("page-outs", "pages/s", self.page_outs_per_second, {"mirror / none": self.page_out_ratio}),
            Panel("page-in, median", "us", self.page_in_p50_us, {"mirror / none": self.page_in_ratio}, 1),
        )
        return Summary("mirror", "Volumes with a mirror beside volumes without", context, panels)


async def run(folder: Path, memory_bytes: int, limit_bytes: int, rounds: int, seconds: float) -> MirrorResult:
    """Measure.

    :raise FarpageError: a set cannot be run, or gave back wrong pages.
    """
    outs: dict[str, list[float]] = {"none": [], "mirror": []}
    ins: dict[str, list[float]] = {"none": [], "mirror": []}
    with tempfile.TemporaryDirectory(prefix="fpbench-", dir=folder) as name:
        work = Work(
            folder=Path(name),
            program=build(Path(name)),
            memory_bytes=memory_bytes,
            limit_bytes=limit_bytes,
            seconds=seconds,
            phases=(POPULATE, READ),
        )
        contenders = [OnTwoDevices(Redundancy.NONE), OnTwoDevices(Redundancy.MIRROR)]
        for number in range(rounds):
            for pager in turns(contenders, number):
                print(f"round {number + 1} of {rounds}: {pager.name}", file=sys.stderr, flush=True)
                populated, read = await measure(pager, work, seed=number + 1)
                outs[pager.name].append(_page_outs_per_second(populated, work))
                ins[pager.name].append(read.report.waited.p50_us)
        return MirrorResult(
            machine=describe_machine(),
            placement=describe_placement(),
            disk=describe_disk(work.folder),
            page_outs_per_second={name: Spread.of(values) for name, values in outs.items()},
            page_in_p50_us={name: Spread.of(values) for name, values in ins.items()},
            page_out_ratio=ratio(outs["mirror"], outs["none"]),
            page_in_ratio=ratio(ins["mirror"], ins["none"]),
        )


def _page_outs_per_second(populated: Measured, work: Work) -> float:
    """Populating cannot go on before as many pages have left as the limit has no room for."""
    return (work.memory_bytes - work.limit_bytes) / 4096 / populated.report.seconds


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.mirror", description=str(__doc__).split("\n")[0])
    parser.add_argument("--memory", default="256M", metavar="SIZE", help="memory touched (%(default)s)")
    parser.add_argument("--limit", default="64M", metavar="SIZE", help="most of it resident (%(default)s)")
    parser.add_argument("--rounds", default=5, type=int, help="times that both have a turn (%(default)s)")
    parser.add_argument("--seconds", default=2.0, type=float, help="length of the reads (%(default)s)")
    parser.add_argument("--dir", default=Path("/var/tmp"), type=Path, help="folder on the disk (%(default)s)")
    add_options(parser)
    options = parser.parse_args()
    try:
        check_options(options)
        memory_bytes = parse_size(options.memory, field="--memory")
        limit_bytes = parse_size(options.limit, field="--limit")
        result = asyncio.run(run(options.dir, memory_bytes, limit_bytes, options.rounds, options.seconds))
    except FarpageError as problem:
        return report(problem)
    publish(result.summary(), result.as_text(), result.model_dump_json(indent=2), options)
    return 0 if result.reached else 1


if __name__ == "__main__":
    sys.exit(main())
