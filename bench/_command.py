"""The command line of a benchmark, from its options to its exit status: the same for all of them."""

from __future__ import annotations

import argparse
import asyncio
import sys
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, TypeVar

from bench._interrupts import undone_when_interrupted
from bench._published import BenchResult, check_options, publish
from farpage.cli.report import report
from farpage.errors import FarpageError, InvalidInput

Result = TypeVar("Result", bound=BenchResult)


def check_rounds(folder: Path, rounds: int) -> None:
    """Refuse a folder that is none, and less than one round.

    :raise InvalidInput:
    """
    if not folder.is_dir():
        raise InvalidInput("--dir", f"{folder} is not a folder", "name one on the disk to measure")
    if rounds < 1:
        raise InvalidInput("--rounds", f"{rounds} is not a count", "five make a steady median")


def carry_out(
    options: argparse.Namespace,
    begin: Callable[[], Coroutine[Any, Any, Result]],
    *,
    text: Callable[[Result], str] = lambda result: result.as_text(),
) -> int:
    """Run what `begin` returns, publish its result and return the exit status.

    What `begin` and the work raise as a FarpageError is reported; an interrupted run cleans up first.
    """
    try:
        check_options(options)
        result = asyncio.run(undone_when_interrupted(begin()))
    except asyncio.CancelledError:
        return report(KeyboardInterrupt())
    except FarpageError as problem:
        return report(problem)
    publish(result.summary(), text(result), result.model_dump_json(indent=2), options)
    return result.status


def tell(message: str) -> None:
    """Say on standard error how far the run is."""
    print(message, file=sys.stderr, flush=True)
