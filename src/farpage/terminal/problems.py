"""Words and exit status for everything that can go wrong with a program."""

from __future__ import annotations

import os
import sys
import traceback
from typing import Final

from farpage.errors import ExitStatus, FarpageError

DEBUG_VARIABLE: Final = "FARPAGE_DEBUG"
INTERRUPTED: Final = 130
"""128 + SIGINT, as shells have it."""


def report(problem: BaseException) -> int:
    """Say on stderr what is wrong and what to try; return the exit status.

    The traceback comes only with FARPAGE_DEBUG=1.
    """
    trace(problem)
    if isinstance(problem, KeyboardInterrupt):
        return INTERRUPTED
    if isinstance(problem, FarpageError):
        say(problem.cause, problem.advice)
        return int(problem.exit_status)
    if isinstance(problem, BrokenPipeError):
        # The reader of our output has gone; keep the interpreter from failing on it once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(ExitStatus.FAILURE)
    say(
        f"unexpected {type(problem).__name__}: {problem}",
        f"this is a bug; run the command again with {DEBUG_VARIABLE}=1 and report the traceback",
    )
    return int(ExitStatus.FAILURE)


def trace(problem: BaseException) -> None:
    """Write the traceback to stderr, if FARPAGE_DEBUG asks for it."""
    if os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0"):
        traceback.print_exception(problem)


def say(cause: str, advice: str) -> None:
    """Write what is wrong and what to try, to stderr."""
    print(f"farpage: {cause}", file=sys.stderr)  # noqa: T201
    if advice:
        print(f"  {advice}", file=sys.stderr)  # noqa: T201
