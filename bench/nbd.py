"""`python -m bench.nbd`: farpage's NBD server beside nbdkit's file plugin and qemu-nbd.

All three serve the same warm file over a UNIX socket, each from a process of its own, and take turns; fio
reads 4 KiB at random over one connection.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from bench._machine import describe_machine, describe_placement
from bench._rounds import Spread, ratio, turns
from farpage.device.open import open_device

OURS: Final = "farpage"
ROOT: Final = Path(__file__).parents[1]
TARGETS: Final = {16: {"nbdkit": 1.3, "qemu-nbd": 2.5}, 1: {"nbdkit": 0.8}}
"""The ratios that farpage sets itself, by queue depth."""
PLACEMENTS: Final = {"free": (None, None), "apart": (0, 1), "together": (0, 0)}
"""Cores of fio and of the server: the kernel's choice, one each, one for both."""
_START_SECONDS: Final = 10.0


@dataclass(frozen=True)
class Comparison:
    """Reads a second of each server at one queue depth, round by round."""

    depth: int
    figures: dict[str, list[float]]

    @property
    def ratios(self) -> dict[str, Spread]:
        """Farpage's figures divided by each peer's."""
        found = {name: ratio(self.figures[OURS], theirs) for name, theirs in self.figures.items()}
        return {name: spread for name, spread in found.items() if name != OURS and spread is not None}

    def verdict(self, name: str) -> str:
        """Say whether the target beside a peer was reached."""
        target = TARGETS.get(self.depth, {}).get(name)
        if target is None or name not in self.ratios:
            return ""
        reached = self.ratios[name].median >= target
        return f"target {target}: {'reached' if reached else 'missed'}"


@dataclass(frozen=True)
class Settings:
    """What the command line says."""

    rounds: int
    seconds: float
    size_bytes: int
    depths: tuple[int, ...]
    placement: str
    folder: Path


def contenders(folder: Path) -> dict[str, list[str]]:
    """Return the command of each server, to be given a socket's path for `{socket}`."""
    image = str(folder / "device" / "volumes" / "v")
    device = f"dir:{folder / 'device'}?cache=buffered"
    return {
        OURS: [sys.executable, "-m", "bench._nbd_server", "{socket}", device, "v"],
        "nbdkit": ["nbdkit", "-f", "-r", "-U", "{socket}", "file", image],
        "qemu-nbd": ["qemu-nbd", "-t", "-r", "-e", "8", "-f", "raw", "-k", "{socket}", image],
    }


async def make_volume(folder: Path, size_bytes: int) -> None:
    """Make a volume of incompressible data and leave it in the page cache."""
    device = await open_device(f"dir:{folder / 'device'}?cache=buffered", size_bytes=2 * size_bytes)
    device.create_volume("v", size_bytes)
    await device.close()
    with (folder / "device" / "volumes" / "v").open("r+b") as file:
        for _ in range(size_bytes >> 20):
            file.write(os.urandom(1 << 20))
        file.flush()
        os.fsync(file.fileno())  # nothing is left to be written back while others are measured


@asynccontextmanager
async def running(command: list[str], socket: Path, core: int | None) -> AsyncIterator[None]:
    """Run a server until it listens, and end it afterwards."""
    process = await asyncio.create_subprocess_exec(
        *_on_core(core),
        *(part.format(socket=socket) for part in command),
        stdin=asyncio.subprocess.PIPE,
        cwd=ROOT,
    )
    try:
        async with asyncio.timeout(_START_SECONDS):
            while not socket.exists():  # noqa: ASYNC240 (a foreign program makes it)
                if process.returncode is not None:
                    raise SystemExit(f"{command[0]} ended with status {process.returncode}")
                await asyncio.sleep(0.01)
        yield
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


def _on_core(core: int | None) -> list[str]:
    return [] if core is None else ["taskset", "-c", str(core)]


async def read_at_random(
    socket: Path, depth: int, settings: Settings, folder: Path, core: int | None
) -> float:
    """Return fio's reads a second."""
    process = await asyncio.create_subprocess_exec(
        *_on_core(core),
        "fio",
        "--name=bench",
        "--ioengine=nbd",
        f"--uri=nbd+unix:///?socket={socket}",
        "--rw=randread",
        "--bs=4k",
        f"--iodepth={depth}",
        f"--size={settings.size_bytes}",
        "--time_based",
        f"--runtime={settings.seconds:g}",
        "--output-format=json",
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        cwd=folder,
    )
    output, complaints = await process.communicate()
    if process.returncode:
        raise SystemExit(f"fio ended with status {process.returncode}: {complaints.decode()}")
    (job,) = json.loads(output[output.index(b"{") :])["jobs"]
    return float(job["read"]["iops"])


async def measure(settings: Settings, folder: Path) -> list[Comparison]:
    """Return one comparison for each queue depth; tells of each turn on standard error."""
    await make_volume(folder, settings.size_bytes)
    fio_core, server_core = PLACEMENTS[settings.placement]
    comparisons = []
    async with AsyncExitStack() as stack:
        sockets = {}
        for name, command in contenders(folder).items():
            sockets[name] = folder / f"{name}.sock"
            await stack.enter_async_context(running(command, sockets[name], server_core))
        for depth in settings.depths:
            comparison = Comparison(depth, {name: [] for name in sockets})
            for round_ in range(settings.rounds):
                for name in turns(list(sockets), round_):
                    figure = await read_at_random(sockets[name], depth, settings, folder, fio_core)
                    comparison.figures[name].append(figure)
                    print(f"QD{depth} round {round_ + 1}: {name:10} {figure:>10,.0f}", file=sys.stderr)
            comparisons.append(comparison)
    return comparisons


def as_text(settings: Settings, comparisons: list[Comparison]) -> str:
    """Return the report for a terminal."""
    lines = [
        f"{describe_machine()}; {describe_placement()}",
        f"placement {settings.placement}; {settings.rounds} rounds of {settings.seconds:g} s;"
        f" {settings.size_bytes >> 20} MiB, warm in the page cache; 4 KiB random reads, one connection",
    ]
    for comparison in comparisons:
        lines.append(f"queue depth {comparison.depth}: reads/s, median (range)")
        for name, figures in comparison.figures.items():
            line = f"  {name:10} {Spread.of(figures).text():28}"
            if name in comparison.ratios:
                line += f" {OURS} is {comparison.ratios[name].text(2)}x  {comparison.verdict(name)}"
            lines.append(line.rstrip())
    return "\n".join(lines)


def as_json(settings: Settings, comparisons: list[Comparison]) -> str:
    """Return the report as one JSON object."""
    document = {
        "machine": describe_machine(),
        "placement": f"{settings.placement}; {describe_placement()}",
        "rounds": settings.rounds,
        "seconds": settings.seconds,
        "size_bytes": settings.size_bytes,
        "comparisons": [
            {
                "queue_depth": comparison.depth,
                "reads_per_second": comparison.figures,
                "medians": {
                    name: Spread.of(found).model_dump() for name, found in comparison.figures.items()
                },
                "ratios": {name: spread.model_dump() for name, spread in comparison.ratios.items()},
                "targets": TARGETS.get(comparison.depth, {}),
            }
            for comparison in comparisons
        ],
    }
    return json.dumps(document, indent=2)


def parse_arguments() -> tuple[Settings, bool]:
    """Return the settings and whether JSON is wanted."""
    parser = argparse.ArgumentParser(prog="python -m bench.nbd", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="turns of each server (5)")
    parser.add_argument("--seconds", type=float, default=3.0, help="length of one turn (3)")
    parser.add_argument("--size-mib", type=int, default=256, help="size of the file (256)")
    parser.add_argument("--depth", type=int, action="append", help="queue depth; repeatable (16 and 1)")
    parser.add_argument("--placement", choices=PLACEMENTS, default="free", help="cores of fio and server")
    parser.add_argument("--folder", type=Path, default=Path("/tmp"), help="where to put the file (/tmp)")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    settings = Settings(
        rounds=arguments.rounds,
        seconds=arguments.seconds,
        size_bytes=arguments.size_mib << 20,
        depths=tuple(arguments.depth or (16, 1)),
        placement=arguments.placement,
        folder=arguments.folder,
    )
    return settings, arguments.json


def main() -> None:
    """Run the benchmark."""
    settings, json_wanted = parse_arguments()
    for program in ("fio", "nbdkit", "qemu-nbd", "taskset"):
        if shutil.which(program) is None:
            raise SystemExit(f"{program} is not installed: apt.txt names the packages")
    with tempfile.TemporaryDirectory(prefix="fp-bench-", dir=settings.folder) as folder:
        comparisons = asyncio.run(measure(settings, Path(folder)))
    print((as_json if json_wanted else as_text)(settings, comparisons))


if __name__ == "__main__":
    main()
