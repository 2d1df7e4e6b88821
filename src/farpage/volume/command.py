"""One command of a client on its way over a path."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

from farpage.blockio import BlockIO

Finished: TypeAlias = Callable[[int, Any], None]
"""`finished(error, result)`: the shape that every command's completion is brought to."""


class Command:
    """A command that can be started on any path, and again on another."""

    __slots__ = (
        "attempts",
        "finished",
        "length_bytes",
        "mutates",
        "offset",
        "start",
        "started_seconds",
    )

    def __init__(
        self,
        start: Callable[[BlockIO, Finished], None],
        finished: Finished,
        length_bytes: int,
        *,
        mutates: bool,
        offset: int = 0,
    ) -> None:
        self.start = start
        self.finished = finished
        self.length_bytes = length_bytes
        self.mutates = mutates
        self.offset = offset
        self.started_seconds = 0.0
        self.attempts = 0
