"""What several data processes of one VIOS bring: its volumes' commands a second with 1 and with 2 of them.

    python -m bench.workers [--workers N ...] [--volumes 4] [--depth 16] [--work read ...] [--rounds 5]
                            [--seconds 2] [--cache direct | --cache buffered] [--dir DIR] [--json] [--out DIR]

Each contender is a VIOS of its own (`farpage vios run --workers N`) over the same directory; they take turns.
fio is the client: one connection to each volume, each in a process of its own, so on a machine of few cores
clients and data processes share those.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import tempfile
from collections.abc import AsyncIterator, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench import _fio
from bench._command import carry_out, check_rounds, tell
from bench._machine import describe_disk, describe_machine, describe_placement
from bench._nbd_cases import FIO_OPTIONS, Work
from bench._published import BenchResult, Panel, Summary, add_options
from bench._rounds import Spread, ratio, turns
from farpage.device.open import open_device

START_SECONDS = 30.0


@dataclass(frozen=True)
class Settings:
    """What the command line says."""

    workers: tuple[int, ...]
    works: tuple[Work, ...]
    volumes: int
    depth: int
    rounds: int
    seconds: float
    size_bytes: int
    cache: str
    folder: Path


def volume(number: int) -> str:
    """Return a volume's name."""
    return f"v{number}"


async def make_volumes(folder: Path, settings: Settings) -> None:
    """Make the volumes, of incompressible data."""
    size_bytes = settings.size_bytes
    spec = f"dir:{folder / 'device'}?cache=buffered"
    device = await open_device(spec, size_bytes=settings.volumes * size_bytes)
    for number in range(settings.volumes):
        device.create_volume(volume(number), size_bytes)
        with (folder / "device" / "volumes" / volume(number)).open("r+b") as file:
            for _ in range(size_bytes >> 20):
                file.write(os.urandom(1 << 20))
            file.flush()
            os.fsync(file.fileno())
    await device.close()


@asynccontextmanager
async def vios(folder: Path, workers: int, settings: Settings) -> AsyncIterator[Path]:
    """Run a VIOS; yields the path of its NBD socket."""
    own = folder / f"vios{workers}"
    own.mkdir()
    with (own / "log").open("wb") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "farpage", "vios", "run", f"vios{workers}", "--dir", str(own)),
            *("--device", f"dir:{folder / 'device'}?cache={settings.cache}", "--workers", str(workers)),
            stdout=log,
            stderr=log,
        )
    try:
        async with asyncio.timeout(START_SECONDS):
            while not (own / "control.sock").exists():
                if process.returncode is not None:
                    raise SystemExit(f"the VIOS ended: {(own / 'log').read_text()}")
                await asyncio.sleep(0.05)
        yield own / "data.sock"
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def one_turn(sock: Path, epoch: int, work: Work, settings: Settings) -> float:
    """Return the commands a second that fio got from all volumes together."""
    jobs = [
        word
        for number in range(settings.volumes)
        for word in (
            f"--name={volume(number)}",
            "--ioengine=nbd",
            f"--uri=nbd+unix:///{volume(number)}@{epoch}?socket={sock}",
        )
    ]
    return await _fio.run(
        jobs,
        work,
        depth=settings.depth,
        size_bytes=settings.size_bytes,
        seconds=settings.seconds,
        folder=sock.parent,
    )


class WorkersResult(BenchResult):
    """Commands a second of all volumes together, by kind of work and number of processes."""

    machine: str
    placement: str
    conditions: str
    measured: dict[Work, dict[int, list[float]]]
    """One figure a round."""

    def _ratios(self, work: Work) -> dict[int, Spread]:
        """Compare with the first number of processes."""
        (_, first), *others = self.measured[work].items()
        compared = {workers: ratio(values, first) for workers, values in others}
        return {workers: spread for workers, spread in compared.items() if spread}

    def as_text(self) -> str:
        """Return the report for a terminal."""
        lines = [f"{self.machine}; {self.placement}", self.conditions]
        for work, measured in self.measured.items():
            ratios = self._ratios(work)
            for workers, values in measured.items():
                line = f"  {work:10} --workers {workers:<3} {Spread.of(values).text():30}"
                gained = f" {ratios[workers].text(2)}x" if workers in ratios else ""
                lines.append((line + gained).rstrip())
        return "\n".join(lines)

    def summary(self) -> Summary:
        """Return what is published."""
        context = {"machine": self.machine, "placement": self.placement, "conditions": self.conditions}
        panels = [
            Panel(
                title=work,
                unit="commands/s",
                figures={f"--workers {workers}": Spread.of(values) for workers, values in measured.items()},
                ratios={f"--workers {workers}": spread for workers, spread in self._ratios(work).items()},
            )
            for work, measured in self.measured.items()
        ]
        return Summary("workers", "Data processes of one VIOS", context, panels)


async def measure(settings: Settings) -> WorkersResult:
    """Run every contender, round by round; tells of each turn on standard error."""
    found: dict[Work, dict[int, list[float]]] = {}
    placement = describe_placement()
    with tempfile.TemporaryDirectory(prefix="fp-bench-", dir=settings.folder) as name:
        folder = Path(name)
        await make_volumes(folder, settings)
        async with AsyncExitStack() as stack:
            sockets = {
                workers: await stack.enter_async_context(vios(folder, workers, settings))
                for workers in settings.workers
            }
            epoch = 0
            for work in settings.works:
                found[work] = {workers: [] for workers in settings.workers}
                for round_ in range(settings.rounds):
                    for workers in turns(list(sockets), round_):
                        epoch += 1  # of the VIOSes that share the device, the last one owns it
                        figure = await one_turn(sockets[workers], epoch, work, settings)
                        found[work][workers].append(figure)
                        tell(f"{work}: round {round_ + 1}: --workers {workers} {figure:>10,.0f}")
    conditions = (
        f"{settings.volumes} volumes with a connection each, QD{settings.depth} on each, {settings.cache};"
        f" {settings.rounds} rounds of {settings.seconds:g} s on {describe_disk(settings.folder)};"
        " commands a second in all, median (range)"
    )
    return WorkersResult(
        machine=describe_machine(), placement=placement, conditions=conditions, measured=found
    )


def parse_arguments(words: Sequence[str] | None = None) -> tuple[Settings, argparse.Namespace]:
    """Return the settings, and the options for what concerns the output."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.workers",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--workers", type=int, action="append", help="repeatable (1 and 2)")
    parser.add_argument("--work", choices=FIO_OPTIONS, action="append", help="repeatable (read and write)")
    parser.add_argument("--volumes", type=int, default=4, help="each with one connection (4)")
    parser.add_argument("--depth", type=int, default=16, help="on each connection (16)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each (5)")
    parser.add_argument("--seconds", type=float, default=2.0, help="length of one turn (2)")
    parser.add_argument("--size-mib", type=int, default=64, help="size of a volume (64)")
    parser.add_argument("--cache", choices=("direct", "buffered"), default="buffered", help="(buffered)")
    parser.add_argument("--dir", type=Path, default=Path("/tmp"), help="where to put the volumes (/tmp)")
    add_options(parser)
    given = parser.parse_args(words)
    settings = Settings(
        workers=tuple(given.workers or (1, 2)),
        works=tuple(given.work or ("read", "write")),
        volumes=given.volumes,
        depth=given.depth,
        rounds=given.rounds,
        seconds=given.seconds,
        size_bytes=given.size_mib << 20,
        cache=given.cache,
        folder=given.dir,
    )
    return settings, given


def main() -> int:
    """Run the command line."""
    settings, options = parse_arguments()

    def begin() -> Coroutine[Any, Any, WorkersResult]:
        check_rounds(settings.folder, settings.rounds)
        return measure(settings)

    return carry_out(options, begin)


if __name__ == "__main__":
    sys.exit(main())
