"""How fast farpage's NBD server is, beside nbdkit, qemu-nbd, nbd-server and qemu-storage-daemon.

    python -m bench.nbd [--rounds 5] [--seconds 0.7] [--peer NAME ...] [--realtime] [--json | --markdown]
                        [--out DIR] [--client fio|load]
    python -m bench.nbd --work read --depth 1 --depth 16 --placement apart

All serve the same file, each from a process of its own, and take turns; fio is the client. Without options
that choose work, a selection of about two minutes is measured; with such options, all their combinations.
Where the file is opened with O_DIRECT, fio with io_uring on the file itself is a further contender; nbdkit
and nbd-server cannot do that and sit it out.

fio needs most of a core for itself. `--client load` is a client that needs a fifth of that (nbd_load.c), so
the servers' own speed is seen; it checks what it reads.

With --realtime all that is measured runs before everything else on the machine.
"""

from __future__ import annotations

import argparse
import itertools
import shutil
import sys
import tempfile
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from bench import _fio, _nbd_load
from bench._command import carry_out, check_rounds
from bench._machine import describe_disk, describe_machine, describe_placement, put_ahead
from bench._nbd_cases import (
    BLOCK_BYTES,
    CHOSEN,
    CLIENTS,
    CORES,
    PLACEMENTS,
    STORAGES,
    TRANSPORTS,
    WORKS,
    Case,
    Client,
)
from bench._nbd_contenders import (
    EXPORT,
    OURS,
    PEERS,
    RAW,
    Place,
    Served,
    command,
    installed,
    make_volume,
    on_core,
    running,
)
from bench._nbd_report import CaseResult, NbdResult, case_result
from bench._published import add_out
from bench._rounds import turns


@dataclass(frozen=True)
class Settings:
    """What the command line says."""

    rounds: int
    seconds: float
    size_bytes: int
    peers: tuple[str, ...]
    cases: tuple[Case, ...]
    folder: Path
    realtime: bool
    client: Client = "fio"


Turn: TypeAlias = Callable[[Case, Place | None, Served, Settings], Awaitable[float]]
"""Returns the commands a second that a client got from a server, or without one from the file."""


def load_turns(program: Path) -> Turn:
    """Return turns of the lean client, the program."""
    seeds = itertools.count(1)

    async def turn(case: Case, place: Place | None, _: Served, settings: Settings) -> float:
        assert place is not None
        load = await _nbd_load.run(
            program,
            place.address,
            EXPORT,
            case.work,
            block_bytes=BLOCK_BYTES[case.work],
            depth=case.depth,
            connections=case.connections,
            seconds=settings.seconds,
            seed=next(seeds),
            before=on_core(CORES[case.placement][0]),
        )
        return load.per_second

    return turn


async def fio_turn(case: Case, place: Place | None, served: Served, settings: Settings) -> float:
    """Have a turn of fio."""
    way = (
        ["--ioengine=nbd", f"--uri={place.uri}"]
        if place is not None
        else ["--ioengine=io_uring", "--direct=1", f"--filename={served.image}"]
    )
    return await _fio.run(
        ["--name=bench", *way, f"--numjobs={case.connections}"],
        case.work,
        depth=case.depth,
        size_bytes=settings.size_bytes,
        seconds=settings.seconds,
        folder=served.folder,
        before=on_core(CORES[case.placement][0]),
    )


async def one_case(case: Case, settings: Settings, folder: Path, turn: Turn) -> CaseResult:
    """Run every contender of a case, round by round; tells of each turn on standard error."""
    served = Served(folder, direct=case.storage == "direct", tcp=case.transport == "tcp")
    names = [OURS, *(name for name in settings.peers if PEERS[name].direct or not served.direct)]
    places: dict[str, Place | None] = {name: Place(served, name) for name in names}
    async with AsyncExitStack() as stack:
        for name, place in places.items():
            assert place is not None
            arguments = command(name, served, place)
            await stack.enter_async_context(running(arguments, place, CORES[case.placement][1]))
        if served.direct and case.transport == "unix" and settings.client == "fio":
            places[RAW] = None
        measured: dict[str, list[float]] = {name: [] for name in places}
        for round_ in range(settings.rounds):
            for name in turns(list(places), round_):
                figure = await turn(case, places[name], served, settings)
                measured[name].append(figure)
                print(f"{case.text}: round {round_ + 1}: {name:20} {figure:>10,.0f}", file=sys.stderr)
    return case_result(case, measured)


async def measure(settings: Settings, folder: Path) -> NbdResult:
    """Run all cases."""
    peers = installed(settings.peers)
    await make_volume(folder, settings.size_bytes)
    turn = fio_turn if settings.client == "fio" else load_turns(_nbd_load.build(folder))
    cases = [await one_case(case, settings, folder, turn) for case in settings.cases]
    return NbdResult(
        machine=describe_machine(),
        placement=describe_placement() + (", measured with SCHED_RR" if settings.realtime else ""),
        disk=describe_disk(settings.folder),
        client=settings.client,
        rounds=settings.rounds,
        seconds=settings.seconds,
        size_bytes=settings.size_bytes,
        missing=tuple(name for name in settings.peers if name not in peers),
        cases=tuple(cases),
    )


def chosen_cases(arguments: argparse.Namespace) -> tuple[Case, ...]:
    """Return the combinations that were asked for; the usual selection if none was."""
    axes = {
        "work": arguments.work,
        "storage": arguments.storage,
        "transport": arguments.transport,
        "connections": arguments.connections,
        "depth": arguments.depth,
        "placement": arguments.placement,
    }
    given = {name: values for name, values in axes.items() if values}
    if not given:
        return CHOSEN
    return tuple(
        Case.model_validate(dict(zip(given, combination, strict=True)))
        for combination in itertools.product(*given.values())
    )


def parse_arguments(words: Sequence[str] | None = None) -> tuple[Settings, argparse.Namespace]:
    """Return the settings, and the arguments for what concerns the output alone."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.nbd", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=5, help="turns of each server (5)")
    parser.add_argument("--seconds", type=float, default=0.7, help="length of one turn (0.7)")
    parser.add_argument("--size-mib", type=int, default=256, help="size of the file (256)")
    parser.add_argument("--peer", choices=PEERS, action="append", help="repeatable (nbdkit and qemu-nbd)")
    parser.add_argument("--work", choices=WORKS, action="append", help="repeatable (read)")
    parser.add_argument("--storage", choices=STORAGES, action="append", help="repeatable (warm)")
    parser.add_argument("--transport", choices=TRANSPORTS, action="append", help="repeatable (unix)")
    parser.add_argument("--connections", type=int, action="append", help="repeatable (1)")
    parser.add_argument("--depth", type=int, action="append", help="on each connection; repeatable (16)")
    parser.add_argument(
        "--placement", choices=PLACEMENTS, action="append", help="of cores; repeatable (free)"
    )
    parser.add_argument("--client", choices=CLIENTS, default="fio", help="fio, or nbd_load.c (fio)")
    parser.add_argument("--dir", type=Path, default=Path("/tmp"), help="where to put the file (/tmp)")
    parser.add_argument("--realtime", action="store_true", help="run before everything else on the machine")
    output = parser.add_mutually_exclusive_group()
    output.add_argument("--json", action="store_true", help="print one JSON object")
    output.add_argument("--markdown", action="store_true", help="print a Markdown table")
    add_out(parser)
    arguments = parser.parse_args(words)
    settings = Settings(
        rounds=arguments.rounds,
        seconds=arguments.seconds,
        size_bytes=arguments.size_mib << 20,
        peers=tuple(arguments.peer or ("nbdkit", "qemu-nbd")),
        cases=chosen_cases(arguments),
        folder=arguments.dir,
        realtime=arguments.realtime,
        client=arguments.client,
    )
    return settings, arguments


async def run(settings: Settings) -> NbdResult:
    """Measure, on files that are gone afterwards."""
    if settings.realtime:
        put_ahead()
    with tempfile.TemporaryDirectory(prefix="fp-bench-", dir=settings.folder) as folder:
        return await measure(settings, Path(folder))


def main() -> int:
    """Run the command line."""
    settings, options = parse_arguments()
    for program in ("fio", "taskset") if settings.client == "fio" else ("taskset",):
        if shutil.which(program) is None:
            raise SystemExit(f"{program} is not installed: apt.txt names the packages")
    text = NbdResult.as_markdown if options.markdown else NbdResult.as_text

    def begin() -> Coroutine[Any, Any, NbdResult]:
        check_rounds(settings.folder, settings.rounds)
        return run(settings)

    return carry_out(options, begin, text=text)


if __name__ == "__main__":
    sys.exit(main())
