"""Logs of the daemons: one JSON object a line on standard error.

    log = get_logger()
    log.info("volume_opened", volume="vm1", epoch=3)

It is farpage's own because every process loads it before it serves anybody, and a guest may wait for that:
the usual libraries load their consoles too, which takes longer than all of a data worker's own code.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, TypeAlias

Line: TypeAlias = dict[str, Any]
"""One line: `event`, `level`, `timestamp` (ISO 8601, UTC), `exception` where there is one, and the fields."""

_fields: dict[str, str] = {}
"""What every line of this process tells."""


def _write(line: Line) -> None:
    # In one call, so that lines of several threads do not mix.
    sys.stderr.write(json.dumps(line, default=str) + "\n")
    sys.stderr.flush()


_sink: Callable[[Line], None] = _write


@contextmanager
def diverted(sink: Callable[[Line], None]) -> Iterator[None]:
    """Give the lines of this process to `sink` for a while, instead of to standard error."""
    global _sink  # noqa: PLW0603
    before, _sink = _sink, sink
    try:
        yield
    finally:
        _sink = before


class Logger:
    """Writes lines; `fields` are anything, and told by their `str` where JSON has no word for it."""

    def info(self, event: str, **fields: object) -> None:
        """Tell of something that is as it should be."""
        _emit("info", event, None, fields)

    def warning(self, event: str, **fields: object) -> None:
        """Tell of something that is seen to, but should not be."""
        _emit("warning", event, None, fields)

    def error(self, event: str, *, exc_info: BaseException | None = None, **fields: object) -> None:
        """Tell of something that went wrong, with its traceback where one is given."""
        _emit("error", event, exc_info, fields)

    def exception(self, event: str, **fields: object) -> None:
        """Tell of the exception that is being handled, with its traceback."""
        _emit("error", event, sys.exception(), fields)


def _emit(level: str, event: str, problem: BaseException | None, fields: dict[str, object]) -> None:
    line: Line = {**_fields, **fields, "event": event, "level": level}
    line["timestamp"] = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    if problem is not None:
        line["exception"] = "".join(traceback.format_exception(problem))
    _sink(line)


_logger = Logger()


def get_logger() -> Logger:
    """Return the logger, which all modules share."""
    return _logger


class _StandardLibrary(logging.Handler):
    """Writes what libraries log as lines of the same kind."""

    def emit(self, record: logging.LogRecord) -> None:
        problem = record.exc_info[1] if record.exc_info else None
        fields: dict[str, object] = {"logger": record.name}
        _emit(record.levelname.lower(), record.getMessage(), problem, fields)


def configure_logging(**fields: str) -> None:
    """Add `fields` to every line, and write the libraries' logs as lines too; once, at a daemon's start."""
    _fields.update(fields)
    root = logging.getLogger()
    root.handlers[:] = [_StandardLibrary()]
    root.setLevel(logging.INFO)
    # They repeat what the daemons say themselves.
    for chatty in ("uvicorn", "httpx"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
