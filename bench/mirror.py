"""What a mirror costs, and what checksums do: redundancy `mirror` beside `none` on two devices of one disk.

    python -m bench.mirror [--rounds 5] [--seconds 2] [--memory 256M] [--limit 64M] [--only checksums]
                           [--dir DIR] [--realtime] [--json] [--out DIR]

Clients with redundancy `mirror` and `none` take turns on one set of two VIOSes with a device each. What
checksums cost is seen where nothing else does, so two more sets have a device in memory, and the workers of
one of them no checksums: that is this benchmark's doing, farpage has no such option. All page the memory of
the same program, `touch.c`, under the same limit. Populating shows how fast pages leave (with a mirror each
is written twice); random reads, after a sweep that leaves nothing in memory to be written, how long a page-in
takes.

The exit status is 0, or 1 when a page came back wrong or a target was missed.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench._command import carry_out, check_rounds, tell
from bench._machine import describe_disk, describe_machine, describe_placement, put_ahead
from bench._mirror_report import (
    IN_MEMORY,
    MIRROR,
    NONE,
    PAIRS,
    WITHOUT_CHECKSUMS,
    Figures,
    MirrorResult,
    results,
    targets,
)
from bench._pagers import CLIENT, Work
from bench._published import add_options
from bench._rounds import turns
from bench._toucher import MemoryKind, Pattern, Phase, Toucher, WrongPages, build
from farpage.definition.model import Redundancy
from farpage.embedded.control import HypervisorControl
from farpage.embedded.set import EmbeddedSet, SetSettings
from farpage.hypervisor.model import Attachment, ClientAttach, ClientCreate
from farpage.terminal.sizes import parse_size

POPULATE: Final = Phase(Pattern.POPULATE, write_percent=100)
SWEEP: Final = Phase(Pattern.SEQUENTIAL, write_percent=0)
READ: Final = Phase(Pattern.RANDOM, write_percent=0, threads=1)
VIOSES: Final = ("vios1", "vios2")
END_SECONDS: Final = 30.0
NO_CHECKSUMS: Final = """\
import farpage.pager.checksum as checksum
checksum.page_checksums = lambda content: [0] * (len(content) // 4096)
checksum.checksums_of = lambda pages: [0] * len(pages)
"""
"""A `sitecustomize`: it runs before a worker takes the functions into use (site, Python's library)."""


@dataclass(frozen=True)
class Contender:
    """A redundancy on one of the sets."""

    name: str
    embedded: EmbeddedSet
    redundancy: Redundancy


@contextmanager
def without_checksums(folder: Path) -> Iterator[None]:
    """Have the daemons that are started meanwhile take every page for right."""
    folder.mkdir(parents=True)
    (folder / "sitecustomize.py").write_text(NO_CHECKSUMS)
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(folder), before]))
    try:
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def make_devices(folder: Path) -> list[str]:
    """Make a folder for each VIOS, and return them as devices."""
    for vios in VIOSES:
        (folder / vios).mkdir()
    return [f"{vios}=dir:{folder / vios}" for vios in VIOSES]


@asynccontextmanager
async def running_set(folder: Path, *devices: str, checksums: bool = True) -> AsyncIterator[EmbeddedSet]:
    """Run a set of two VIOSes with these devices."""
    embedded = EmbeddedSet(SetSettings(state_dir=folder / "set", devices=devices))
    with nullcontext() if checksums else without_checksums(folder / "python"):
        try:
            await embedded.start()
            yield embedded
        finally:
            await embedded.stop()


async def turn(contender: Contender, work: Work, seed: int, figures: Figures) -> None:
    """Run both phases once with a new client and a new process.

    :raise WrongPages: it was given back something else than it wrote.
    """
    hypervisor = contender.embedded.hypervisor
    await hypervisor.create_client(
        ClientCreate(name=CLIENT, memory_bytes=work.memory_bytes, redundancy=contender.redundancy)
    )
    async with await Toucher.start(
        work.program, MemoryKind.SHARED, work.memory_bytes, seed, work.folder
    ) as toucher:
        await hypervisor.attach(CLIENT, ClientAttach(pid=toucher.pid, limit_bytes=work.limit_bytes))
        populated, swept, read = [await toucher.run(phase, work.seconds) for phase in work.phases]
        if wrong := swept.wrong_pages + read.wrong_pages:
            raise WrongPages(contender.name, wrong, READ.name)
    await _let_go(hypervisor)
    await hypervisor.delete_client(CLIENT)
    # Populating cannot go on before as many pages have left as the limit has no room for.
    pages = (work.memory_bytes - work.limit_bytes) / 4096
    figures.page_outs_per_second.append(pages / populated.seconds)
    figures.page_in_p50_us.append(read.waited.p50_us)


async def _let_go(hypervisor: HypervisorControl) -> None:
    """Wait until the hypervisor has noticed that the process is gone."""
    deadline = asyncio.get_running_loop().time() + END_SECONDS
    while (await hypervisor.client(CLIENT)).attachment is not Attachment.NONE:
        assert asyncio.get_running_loop().time() < deadline
        await asyncio.sleep(0.02)


async def run(
    folder: Path,
    memory_bytes: int,
    limit_bytes: int,
    rounds: int,
    seconds: float,
    *,
    only: str | None = None,
    realtime: bool,
) -> MirrorResult:
    """Measure all, or `only` one of `PAIRS`.

    :raise FarpageError: a set cannot be run, or gave back wrong pages.
    """
    with tempfile.TemporaryDirectory(prefix="fpbench-", dir=folder) as name:
        place = Path(name)
        work = Work(place, build(place), memory_bytes, limit_bytes, seconds, (POPULATE, SWEEP, READ))
        contenders: list[Contender] = []
        async with AsyncExitStack() as sets:
            if realtime:
                put_ahead()
            if only != "checksums":
                disk = await sets.enter_async_context(running_set(place / "a", *make_devices(place)))
                contenders += [
                    Contender(NONE, disk, Redundancy.NONE),
                    Contender(MIRROR, disk, Redundancy.MIRROR),
                ]
            if only != "mirror":
                device = f"{VIOSES[0]}=memory:{memory_bytes * 2}"
                memory = await sets.enter_async_context(running_set(place / "b", device))
                bare = await sets.enter_async_context(running_set(place / "c", device, checksums=False))
                contenders += [
                    Contender(IN_MEMORY, memory, Redundancy.NONE),
                    Contender(WITHOUT_CHECKSUMS, bare, Redundancy.NONE),
                ]
            figures = {contender.name: Figures() for contender in contenders}
            placement = describe_placement()
            for number in range(rounds):
                for contender in turns(contenders, number):
                    tell(f"round {number + 1} of {rounds}: {contender.name}")
                    await turn(contender, work, number + 1, figures[contender.name])
        return MirrorResult(
            machine=describe_machine(),
            placement=placement,
            disk=describe_disk(place),
            rounds=rounds,
            results=results(figures),
            targets=targets(figures),
        )


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.mirror", description=str(__doc__).split("\n")[0])
    parser.add_argument("--memory", default="256M", metavar="SIZE", help="memory touched (%(default)s)")
    parser.add_argument("--limit", default="64M", metavar="SIZE", help="most of it resident (%(default)s)")
    parser.add_argument("--rounds", default=5, type=int, help="times that each has a turn (%(default)s)")
    parser.add_argument("--seconds", default=2.0, type=float, help="length of the reads (%(default)s)")
    parser.add_argument("--only", choices=PAIRS, help="measure what this costs alone")
    parser.add_argument("--dir", default=Path("/var/tmp"), type=Path, help="folder on the disk (%(default)s)")
    parser.add_argument("--realtime", action="store_true", help="run ahead of all other work; needs root")
    add_options(parser)
    options = parser.parse_args()

    def begin() -> Coroutine[Any, Any, MirrorResult]:
        check_rounds(options.dir, options.rounds)
        return run(
            options.dir,
            parse_size(options.memory, field="--memory"),
            parse_size(options.limit, field="--limit"),
            options.rounds,
            options.seconds,
            only=options.only,
            realtime=options.realtime,
        )

    return carry_out(options, begin)


if __name__ == "__main__":
    sys.exit(main())
