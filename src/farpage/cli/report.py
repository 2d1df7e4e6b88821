"""Words and exit status for what can go wrong with a command line, beside what can with any program."""

from __future__ import annotations

import typer

from farpage.errors import ExitStatus
from farpage.terminal import problems

# Typer has changed where these come from, but not that its own error is one of them.
_COMMAND_LINE_ERROR: type[BaseException] = typer.BadParameter.__mro__[2]


def report(problem: BaseException) -> int:
    """Say on stderr what is wrong and what to try; return the exit status.

    The traceback comes only with FARPAGE_DEBUG=1.
    """
    if isinstance(problem, typer.Abort):
        problems.trace(problem)
        return problems.INTERRUPTED
    if isinstance(problem, _COMMAND_LINE_ERROR):
        problems.trace(problem)
        command = getattr(getattr(problem, "ctx", None), "command_path", "farpage")
        cause = str(getattr(problem, "format_message", lambda: problem)())
        if cause:  # else it has printed the help already: nothing was asked for
            problems.say(cause.rstrip("."), f"see '{command} --help'")
        return int(ExitStatus.USAGE)
    return problems.report(problem)
