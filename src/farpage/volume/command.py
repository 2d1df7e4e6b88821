"""One command of a client on its way over a path."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from farpage.blockio import BlockIO, Run

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
        "runs",
        "span_bytes",
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
        span_bytes: int | None = None,
        runs: Sequence[Run] = (),
    ) -> None:
        """`span_bytes` reaches from the first byte that it touches to the last, where it leaves some out.

        What it touches is `runs` then.
        """
        self.start = start
        self.finished = finished
        self.length_bytes = length_bytes
        self.mutates = mutates
        self.offset = offset
        self.span_bytes = length_bytes if span_bytes is None else span_bytes
        self.runs = runs
        self.started_seconds = 0.0
        self.attempts = 0
