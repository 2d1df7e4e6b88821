"""How long a client waits for its pages before, during and after a move to another device.

    python -m bench.move [--rounds 5] [--seconds 2] [--memory 128M] [--limit 32M] [--threads 1] [--dir DIR]
                         [--load reads|mixed] [--json]

A set as `farpage up` starts it, whose two VIOSes have a device each. A program (`touch.c`), which checks each
page that it touches, loads pages at random (`reads`), or stores to every third (`mixed`), without a pause,
while an intermediate client moves its volume from one device to the other, and in the next round back.

Each wait for a page is taken by the program itself. That the worker goes over to the target's VIOS, and that
the move ends, is seen from the hypervisor, which is asked ten times a second; the longest wait within a
fifth of a second of what is seen then is told as that of the event, whatever it was for. Targets: medians of
the p99 and of these waits, and no wait of any round beyond the longest that is allowed.

The exit status is 0, or 1 when a page came back wrong or a target was missed.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Coroutine, Mapping
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from bench._command import carry_out, check_rounds, tell
from bench._machine import describe_disk, describe_machine, describe_placement
from bench._moving_report import LoadResult, MovingResult, Period, Round, Span, figures, longest_ms
from bench._pagers import CLIENT
from bench._published import add_options
from bench._toucher import MemoryKind, Pattern, Phase, Toucher, WrongPages, build, waits_of
from farpage.definition.model import Redundancy
from farpage.embedded.control import HypervisorControl
from farpage.embedded.set import EmbeddedSet, SetSettings
from farpage.errors import InvalidInput
from farpage.hypervisor.model import ClientAttach, ClientCreate
from farpage.hypervisor.movement import ENDED, ClientMove, MoveStage
from farpage.terminal.sizes import parse_size

WRITE_PERCENTS: Final = {"reads": 0, "mixed": 33}
POLL_SECONDS: Final = 0.1
MARGIN_SECONDS: Final = 0.2
SLICE_SECONDS: Final = 0.25
"""During a move the load runs in phases of this; threads wait for no page between two of them."""
MOVE_SECONDS: Final = 60.0
DEVICES: Final = ("vios1", "vios2")
"""Names of the VIOSes, and of the folders of their devices."""


@dataclass(frozen=True)
class Settings:
    """What was asked for on the command line."""

    memory_bytes: int
    limit_bytes: int
    rounds: int
    seconds: float
    threads: int
    loads: tuple[str, ...]
    folder: Path

    def __post_init__(self) -> None:
        check_rounds(self.folder, self.rounds)
        if not 0.1 <= self.seconds <= 60:
            raise InvalidInput("--seconds", f"{self.seconds} is not from 0.1 to 60", "two are plenty")
        if self.memory_bytes % (1 << 20) or not 16 << 20 <= self.limit_bytes < self.memory_bytes:
            raise InvalidInput("--limit", "it is not from 16M to below the memory", "a quarter is usual")


@dataclass
class Moved:
    """The client, and the program that is it."""

    hypervisor: HypervisorControl
    toucher: Toucher
    trace: Path
    device: str
    """Name of the device that its volume is on."""
    wrong_pages: int = 0

    async def touch(self, phase: Phase, seconds: float) -> Span:
        """Put the load on for a while."""
        began_ns = time.monotonic_ns()
        self.wrong_pages += (await self.toucher.run(phase, seconds)).wrong_pages
        return Span(began_ns, time.monotonic_ns())

    async def move(self) -> dict[MoveStage, tuple[int, int]]:
        """Move it to the other device.

        Returns for each stage when it was not seen yet, and when it was, by CLOCK_MONOTONIC in ns.

        :raise FarpageError: it does not come to its end.
        """
        target = next(name for name in DEVICES if name != self.device)
        before_ns = time.monotonic_ns()
        info = await self.hypervisor.move(CLIENT, ClientMove(to=target, indirect=True))
        seen = {info.stage: (before_ns, time.monotonic_ns())}
        async with asyncio.timeout(MOVE_SECONDS):
            while info.stage not in ENDED:
                await asyncio.sleep(POLL_SECONDS)
                info = await self.hypervisor.move_progress(CLIENT)
                now_ns = time.monotonic_ns()
                seen.setdefault(info.stage, (before_ns, now_ns))
                before_ns = now_ns
        if info.stage is not MoveStage.DONE:
            raise SystemExit(f"the move is {info.stage}: {info.problem}")
        self.device = target
        return seen


@asynccontextmanager
async def moved(settings: Settings, folder: Path) -> AsyncIterator[Moved]:
    """Run a set with a client that is in its steady state."""
    devices = {vios: folder / vios for vios in DEVICES}
    for path in devices.values():
        path.mkdir()
    # Both of one size, so that which one fits best does not hang on the disk's free room.
    specs = tuple(
        f"{vios}=dir:{path}?size={settings.memory_bytes + (64 << 20)}" for vios, path in devices.items()
    )
    embedded = EmbeddedSet(SetSettings(state_dir=folder / "set", devices=specs, workers=1))
    program = build(folder)
    try:
        await embedded.start()
        hypervisor = embedded.hypervisor
        wanted = ClientCreate(name=CLIENT, memory_bytes=settings.memory_bytes, redundancy=Redundancy.NONE)
        await hypervisor.create_client(wanted)
        definition = await hypervisor.definition()
        (replica,) = definition.clients[CLIENT].volumes[0].replicas
        device = definition.devices[replica.device].name
        started = await Toucher.start(program, MemoryKind.SHARED, settings.memory_bytes, 1, folder)
        async with started as toucher:
            await hypervisor.attach(CLIENT, ClientAttach(pid=toucher.pid, limit_bytes=settings.limit_bytes))
            await toucher.run(Phase(Pattern.POPULATE, 100), settings.seconds)
            yield Moved(hypervisor, toucher, folder / "trace", device)
    finally:
        await embedded.stop()


async def measure(client: Moved, phase: Phase, seconds: float) -> Round:
    """Move the client once under a load."""
    spans = {Period.BEFORE: await client.touch(phase, seconds)}
    moving = asyncio.get_running_loop().create_task(client.move())
    began_ns = ended_ns = time.monotonic_ns()
    try:
        while not moving.done():
            ended_ns = (await client.touch(phase, SLICE_SECONDS)).end_ns
        seen = moving.result()
    finally:
        moving.cancel()
        await asyncio.gather(moving, return_exceptions=True)
    spans[Period.DURING] = Span(began_ns, ended_ns)
    spans[Period.AFTER] = await client.touch(phase, seconds)
    waits = waits_of(client.trace)
    client.trace.unlink()
    await client.toucher.trace(client.trace)
    margin_ns = int(MARGIN_SECONDS * 1e9)
    around = {
        stage: Span(before_ns - margin_ns, seen_ns + margin_ns)
        for stage, (before_ns, seen_ns) in seen.items()
    }
    over = around.get(MoveStage.COPYING, around[MoveStage.DONE])
    switched = around.get(MoveStage.RETIRING, around[MoveStage.DONE])
    switched = Span(switched.begin_ns, around[MoveStage.DONE].end_ns)
    return Round(
        periods={period: figures(waits, span) for period, span in spans.items()},
        going_over_ms=longest_ms(waits, over),
        switch_over_ms=longest_ms(waits, switched),
        move_seconds=(seen[MoveStage.DONE][1] - began_ns) / 1e9,
    )


async def run(settings: Settings) -> MovingResult:
    """Measure; whatever was set up is gone on return, also when it is cancelled.

    :raise FarpageError: the set cannot be run, or gave back wrong pages.
    """
    rounds: Mapping[str, list[Round]] = {load: [] for load in settings.loads}
    with ExitStack() as undo:
        name = undo.enter_context(tempfile.TemporaryDirectory(prefix="fpb-", dir=settings.folder))
        disk = describe_disk(Path(name))
        async with moved(settings, Path(name)) as client:
            await client.toucher.trace(client.trace)
            for number in range(settings.rounds):
                for load in settings.loads:
                    phase = Phase(Pattern.RANDOM, WRITE_PERCENTS[load], settings.threads)
                    found = await measure(client, phase, settings.seconds)
                    rounds[load].append(found)
                    if client.wrong_pages:
                        raise WrongPages("farpage", client.wrong_pages, phase.name)
                    tell(f"round {number + 1} of {settings.rounds}: {load}: {_brief(found)}")
    return MovingResult(
        machine=describe_machine(),
        disk=disk,
        placement=describe_placement(),
        memory_bytes=settings.memory_bytes,
        limit_bytes=settings.limit_bytes,
        threads=settings.threads,
        rounds=settings.rounds,
        loads=tuple(LoadResult.of(load, found) for load, found in rounds.items()),
    )


def _brief(found: Round) -> str:
    p99 = ", ".join(f"{period} {one.p99_us:.0f}" for period, one in found.periods.items())
    return (
        f"p99 {p99} us, longest {found.periods[Period.DURING].longest_ms:.1f} ms, going over "
        f"{found.going_over_ms:.1f} ms, switch-over {found.switch_over_ms:.1f} ms, {found.move_seconds:.1f} s"
    )


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.move", description=str(__doc__).split("\n")[0])
    parser.add_argument("--memory", default="128M", metavar="SIZE", help="memory touched (%(default)s)")
    parser.add_argument("--limit", default="32M", metavar="SIZE", help="most of it resident (%(default)s)")
    parser.add_argument("--rounds", default=5, type=int, help="moves under each load (%(default)s)")
    parser.add_argument("--seconds", default=2.0, type=float, help="before and after each (%(default)s)")
    parser.add_argument("--threads", default=1, type=int, help="that touch pages (%(default)s)")
    parser.add_argument("--load", choices=WRITE_PERCENTS, help="this load alone")
    parser.add_argument("--dir", default=Path("/var/tmp"), type=Path, help="folder on the disk (%(default)s)")
    add_options(parser)
    options = parser.parse_args()

    def begin() -> Coroutine[Any, Any, MovingResult]:
        return run(
            Settings(
                memory_bytes=parse_size(options.memory, field="--memory"),
                limit_bytes=parse_size(options.limit, field="--limit"),
                rounds=options.rounds,
                seconds=options.seconds,
                threads=options.threads,
                loads=(options.load,) if options.load else tuple(WRITE_PERCENTS),
                folder=options.dir,
            )
        )

    return carry_out(options, begin)


if __name__ == "__main__":
    sys.exit(main())
