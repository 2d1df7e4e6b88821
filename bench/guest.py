"""A real guest's work, its memory paged by farpage and by the host's own swap, under the same limit.

    python -m bench.guest [--rounds 5] [--memory 256M] [--data 80M] [--limit 64M] [--lookups 20000]
                          [--dir DIR] [--json] [--out DIR]

The guest is Linux under QEMU with a memfd as its memory. It sorts numbers and looks some of them up
(`guest_work.c`), which needs twice `--data`, and checks the outcome.

- `farpage`: a set as `farpage up` starts it, two VIOSes on a common `dir:` device; QEMU is attached with the
  limit before the guest has booted;
- `swap`: a swap file on the same disk, vm.page-cluster 3 (the kernel's default), and a memory cgroup. Its
  limit is that of the guest's memory and, as the cgroup counts it too, what QEMU has of its own.

Both take turns. A guest that the kernel kills under host swap, when it finds no memory to free in time, is
counted, and that turn repeated. The exit status is 0, 1 when the guest's outcome was wrong, or 6 when host
swap could not take part.
"""

from __future__ import annotations

import argparse
import asyncio
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench import _hostswap
from bench._command import carry_out, check_rounds, tell
from bench._machine import describe_disk, describe_machine, describe_placement
from bench._published import BenchResult, Panel, Summary, add_options
from bench._rounds import Spread, ratio, turns
from farpage.attach.qmp import QmpFailed
from farpage.embedded.set import EmbeddedSet, SetSettings
from farpage.errors import ExitStatus, FarpageError, InvalidInput, Unsupported
from farpage.guest.image import GuestImage, build_image
from farpage.guest.qemu import GuestFailed, GuestOptions, QemuGuest
from farpage.guest.reports import CommandDone
from farpage.hypervisor.model import ClientAttach
from farpage.terminal.sizes import parse_size

MIB: Final = 1 << 20
SOURCE: Final = Path(__file__).with_name("guest_work.c")
COMPILE: Final = ("gcc", "-static", "-O2", "-Wall", "-Wextra", "-Werror")
CLIENT: Final = "guest"
FARPAGE, SWAP = "farpage", "swap"
PAGE_CLUSTER_EXPONENT: Final = 3
TIMEOUT_SECONDS: Final = 900.0
BOOT_SECONDS: Final = 120.0
KILLED_MAX: Final = 5
"""Guests that may be killed under host swap before the run is given up."""
OUTCOME: Final = re.compile(r"guest_work fill=(\S+) sort=(\S+) lookup=(\S+) right=([01])")


@dataclass(frozen=True)
class Settings:
    """What was asked for on the command line."""

    memory_bytes: int
    data_bytes: int
    limit_bytes: int
    lookups: int
    rounds: int
    folder: Path

    def __post_init__(self) -> None:
        check_rounds(self.folder, self.rounds)
        if not MIB <= self.data_bytes <= self.memory_bytes * 3 // 8:
            raise InvalidInput("--data", "the guest has not twice as much memory to spare", "name less of it")
        if not 16 * MIB <= self.limit_bytes < self.memory_bytes:
            raise InvalidInput("--limit", "not from 16M to below the memory", "a quarter of it is usual")


@dataclass(frozen=True)
class Outcome:
    """One guest's work, in seconds of the host's clock from the beginning of the guest's, and of its own."""

    total_seconds: float
    fill_seconds: float
    sort_seconds: float
    lookup_seconds: float


class GuestResult(BenchResult):
    """Everything that a run found."""

    machine: str
    placement: str
    disk: str
    memory_bytes: int
    data_bytes: int
    limit_bytes: int
    own_bytes: int
    """What QEMU has beside the guest's memory."""
    rounds: int
    without_swap: str
    """Why host swap could not take part; empty when it did."""
    killed: int
    """Guests that the kernel has killed under host swap."""
    seconds: dict[str, dict[str, Spread]]
    """By part of the work, then by contender."""
    ratios: dict[str, Spread]
    """Of farpage's seconds to those of host swap, by part of the work; empty without it."""

    @property
    def status(self) -> int:
        """That of a run without its peer where host swap could not take part."""
        return int(ExitStatus.UNSUPPORTED if self.without_swap else ExitStatus.OK)

    def summary(self) -> Summary:
        """Return what is published."""
        context = {
            "machine": self.machine,
            "placement": self.placement,
            "disk": self.disk,
            "guest": f"{self.memory_bytes // MIB} MiB, {self.limit_bytes // MIB} MiB of it resident at most; "
            f"sorts {self.data_bytes // MIB} MiB with as much again",
            "limit": f"the cgroup has {self.own_bytes // MIB} MiB more, for what QEMU has of its own",
            "rounds": f"{self.rounds}, contenders in turn; guests killed under host swap: {self.killed}",
        }
        panels = [
            Panel(
                title=part,
                unit="seconds",
                figures=spreads,
                ratios={f"{FARPAGE} / {SWAP}": self.ratios[part]} if self.ratios else {},
                decimals=2,
            )
            for part, spreads in self.seconds.items()
        ]
        return Summary("guest", "A guest's work, beside host swap", context, panels)

    def as_text(self) -> str:
        """Return the table."""
        lines = [f"{name:<11}{text}" for name, text in self.summary().context.items()]
        lines += ["", *([self.without_swap] if self.without_swap else [])]
        lines.append(f"{'seconds, median (range)':<26}{FARPAGE:>24}{SWAP:>24}{'ratio':>22}")
        for part, spreads in self.seconds.items():
            cells = [spreads[name].text(2) if name in spreads else "-" for name in (FARPAGE, SWAP)]
            quotient = self.ratios[part].text(2) if self.ratios else "-"
            lines.append(f"{part:<26}{cells[0]:>24}{cells[1]:>24}{quotient:>22}")
        return "\n".join(lines)


PARTS: Final[dict[str, Callable[[Outcome], float]]] = {
    "all of it": lambda outcome: outcome.total_seconds,
    "filling": lambda outcome: outcome.fill_seconds,
    "sorting": lambda outcome: outcome.sort_seconds,
    "looking up": lambda outcome: outcome.lookup_seconds,
}


@dataclass(eq=False)
class WrongOutcome(FarpageError):
    """The guest's work came out wrong."""

    code = "wrong_outcome"
    template = "the guest under {contender} has not sorted what it was given: {console}"
    remedy = "no figure of this run counts; report it as a bug"
    contender: str
    console: str


class Bench:
    """The contenders and what they have in common; `folder` is on the disk to measure."""

    def __init__(self, settings: Settings, folder: Path, image: GuestImage, swap: Path | None) -> None:
        self._settings = settings
        self._folder = folder
        self._image = image
        self._swap = swap
        self.own_bytes = 0
        self.killed = 0

    @asynccontextmanager
    async def _guest(self, *commands: str) -> AsyncIterator[QemuGuest]:
        options = GuestOptions(memory_mib=self._settings.memory_bytes // MIB, commands=commands)
        with tempfile.TemporaryDirectory(prefix="fpg-", dir="/tmp") as name:
            async with QemuGuest(self._image, options, Path(name)) as guest:
                yield guest

    async def weigh(self) -> None:
        """Find out what QEMU has of its own once a guest has booted, and worked for a moment."""
        async with self._guest("/bin/guest_work 4 1000", "/bin/busybox sleep 60") as guest:
            await guest.wait_for(lambda found: isinstance(found, CommandDone), BOOT_SECONDS)
            self.own_bytes = _anonymous_bytes(guest.pid)

    async def turn_to_its_end(self, contender: str) -> Outcome:
        """Do as `turn`; where host swap's guest is killed, count that and begin anew.

        :raise FarpageError: as `turn`.
        """
        while True:
            try:
                return await self.turn(contender)
            except GuestFailed as problem:
                if contender != SWAP or self.killed >= KILLED_MAX:
                    raise
                self.killed += 1
                tell(f"under host swap {problem}")

    async def turn(self, contender: str) -> Outcome:
        """Boot a guest under one contender and have it do its work.

        :raise FarpageError: it has not ended, or its outcome is wrong.
        """
        async with AsyncExitStack() as stack:
            paged = _Farpage(self._folder) if contender == FARPAGE else _Swap(self._swap, self.own_bytes)
            await stack.enter_async_context(paged.ready(self._settings.limit_bytes))
            work = f"/bin/guest_work {self._settings.data_bytes // MIB} {self._settings.lookups}"
            guest = await stack.enter_async_context(self._guest("/bin/busybox true", work))
            await paged.take(guest, self._settings.limit_bytes)
            await guest.wait_for(lambda found: isinstance(found, CommandDone), BOOT_SECONDS)
            began_seconds = time.monotonic()
            await guest.wait_for(
                lambda found: isinstance(found, CommandDone) and found.number == 1, TIMEOUT_SECONDS
            )
            total_seconds = time.monotonic() - began_seconds
            console = "\n".join(guest.console)
            found = OUTCOME.search(console)
            if found is None or found[4] != "1":
                raise WrongOutcome(contender, console[-300:])
            return Outcome(total_seconds, float(found[1]), float(found[2]), float(found[3]))


def _anonymous_bytes(pid: int) -> int:
    """Return the memory of a process that is in no file."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) << 10
    return 0


async def _up(guest: QemuGuest) -> None:
    """Wait until QEMU answers; before, the guest's memory is not mapped."""
    while True:
        try:
            await guest.qmp("query-status")
            return
        except (QmpFailed, OSError):
            await asyncio.sleep(0.01)


class _Farpage:
    def __init__(self, folder: Path) -> None:
        self._set = EmbeddedSet(SetSettings(state_dir=folder / "set"))

    @asynccontextmanager
    async def ready(self, limit_bytes: int) -> AsyncIterator[None]:
        del limit_bytes
        try:
            await self._set.start()
            yield
        finally:
            await self._set.stop()
            shutil.rmtree(self._set.settings.state_dir, ignore_errors=True)

    async def take(self, guest: QemuGuest, limit_bytes: int) -> None:
        async with asyncio.timeout(BOOT_SECONDS):
            await _up(guest)
        await self._set.hypervisor.attach(CLIENT, ClientAttach(pid=guest.pid, limit_bytes=limit_bytes))


class _Swap:
    def __init__(self, path: Path | None, own_bytes: int) -> None:
        assert path is not None
        self._path = path
        self._own_bytes = own_bytes
        self._cgroup: _hostswap.MemoryCgroup | None = None

    @asynccontextmanager
    async def ready(self, limit_bytes: int) -> AsyncIterator[None]:
        with ExitStack() as undo:
            undo.enter_context(_hostswap.page_cluster(PAGE_CLUSTER_EXPONENT))
            undo.enter_context(_hostswap.swapping_on(self._path))
            self._cgroup = undo.enter_context(_hostswap.memory_cgroup(limit_bytes + self._own_bytes))
            yield

    async def take(self, guest: QemuGuest, limit_bytes: int) -> None:
        del limit_bytes
        assert self._cgroup is not None
        self._cgroup.add(guest.pid)


def _image(folder: Path) -> GuestImage:
    """Build the guest with its work.

    :raise FarpageError: something that it needs is missing.
    """
    program = folder / "guest_work"
    try:
        subprocess.run([*COMPILE, "-o", str(program), str(SOURCE)], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise Unsupported("the guest's work", str(error), "install gcc and libc6-dev") from error
    return build_image(programs=[str(program)])


async def run(settings: Settings) -> GuestResult:
    """Measure; whatever was set up is gone on return, also when it is cancelled.

    :raise FarpageError: a contender cannot be run, or the guest's outcome is wrong.
    """
    with ExitStack() as undo:
        folder = Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="fpbench-", dir=settings.folder)))
        image = _image(folder)
        contenders, swap, without_swap = [FARPAGE, SWAP], None, _hostswap.why_unavailable()
        if without_swap:
            contenders = [FARPAGE]
            tell(without_swap)
        else:
            size_bytes = settings.memory_bytes * 3 // 2
            swap = undo.enter_context(_hostswap.swap_file(folder, size_bytes))
        bench = Bench(settings, folder, image, swap)
        await bench.weigh()
        outcomes: dict[str, list[Outcome]] = {name: [] for name in contenders}
        for number in range(settings.rounds):
            for contender in turns(contenders, number):
                outcome = await bench.turn_to_its_end(contender)
                outcomes[contender].append(outcome)
                tell(f"round {number + 1} of {settings.rounds}: {contender} {outcome.total_seconds:.2f} s")
        values = {
            part: {name: [figure(outcome) for outcome in found] for name, found in outcomes.items()}
            for part, figure in PARTS.items()
        }
        ratios = {part: ratio(found[FARPAGE], found[SWAP]) for part, found in values.items() if swap}
        return GuestResult(
            machine=describe_machine(),
            placement=f"nothing is pinned: QEMU, workers and VIOSes share {describe_placement()}",
            disk=describe_disk(folder),
            memory_bytes=settings.memory_bytes,
            data_bytes=settings.data_bytes,
            limit_bytes=settings.limit_bytes,
            own_bytes=bench.own_bytes,
            rounds=settings.rounds,
            without_swap=without_swap,
            killed=bench.killed,
            seconds={
                part: {name: Spread.of(seconds) for name, seconds in found.items()}
                for part, found in values.items()
            },
            ratios={part: spread for part, spread in ratios.items() if spread is not None},
        )


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.guest", description=str(__doc__).split("\n")[0])
    parser.add_argument("--memory", default="256M", metavar="SIZE", help="the guest's memory (%(default)s)")
    parser.add_argument("--data", default="80M", metavar="SIZE", help="what it sorts (%(default)s)")
    parser.add_argument("--limit", default="64M", metavar="SIZE", help="most of it resident (%(default)s)")
    parser.add_argument("--lookups", default=20_000, type=int, help="numbers looked up (%(default)s)")
    parser.add_argument("--rounds", default=5, type=int, help="times that both have a turn (%(default)s)")
    parser.add_argument("--dir", default=Path("/var/tmp"), type=Path, help="folder on the disk (%(default)s)")
    add_options(parser)
    options = parser.parse_args()

    def begin() -> Coroutine[Any, Any, GuestResult]:
        return run(
            Settings(
                memory_bytes=parse_size(options.memory, field="--memory"),
                data_bytes=parse_size(options.data, field="--data"),
                limit_bytes=parse_size(options.limit, field="--limit"),
                lookups=options.lookups,
                rounds=options.rounds,
                folder=options.dir,
            )
        )

    return carry_out(options, begin)


if __name__ == "__main__":
    sys.exit(main())
