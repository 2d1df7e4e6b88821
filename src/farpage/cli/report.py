"""Words and exit status for everything that can go wrong with a command."""

from __future__ import annotations

import os
import sys
import traceback

import typer

from farpage.errors import ExitStatus, FarpageError

DEBUG_VARIABLE = "FARPAGE_DEBUG"
INTERRUPTED = 130
"""128 + SIGINT, as shells have it."""

# Typer has changed where these come from, but not that its own error is one of them.
_COMMAND_LINE_ERROR: type[BaseException] = typer.BadParameter.__mro__[2]


def report(problem: BaseException) -> int:
    """Say on stderr what is wrong and what to try; return the exit status.

    The traceback comes only with FARPAGE_DEBUG=1.
    """
    if os.environ.get(DEBUG_VARIABLE, "0") not in ("", "0"):
        traceback.print_exception(problem)
    if isinstance(problem, KeyboardInterrupt | typer.Abort):
        return INTERRUPTED
    if isinstance(problem, FarpageError):
        _say(problem.cause, problem.advice)
        return int(problem.exit_status)
    if isinstance(problem, BrokenPipeError):
        # The reader of our output has gone; keep the interpreter from failing on it once more at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return int(ExitStatus.FAILURE)
    if isinstance(problem, _COMMAND_LINE_ERROR):
        command = getattr(getattr(problem, "ctx", None), "command_path", "farpage")
        cause = str(getattr(problem, "format_message", lambda: problem)())
        _say(cause.rstrip("."), f"see '{command} --help'")
        return int(ExitStatus.USAGE)
    _say(
        f"unexpected {type(problem).__name__}: {problem}",
        f"this is a bug; run the command again with {DEBUG_VARIABLE}=1 and report the traceback",
    )
    return int(ExitStatus.FAILURE)


def _say(cause: str, advice: str) -> None:
    print(f"farpage: {cause}", file=sys.stderr)  # noqa: T201
    if advice:
        print(f"  {advice}", file=sys.stderr)  # noqa: T201
