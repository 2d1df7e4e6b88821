"""Writes that a full device has refused: one is tried again with growing pauses, the others wait for it."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Final

from farpage.volume.command import Command

FIRST_PAUSE_SECONDS: Final = 0.1
LONGEST_PAUSE_SECONDS: Final = 2.0


class FullDevice:
    """The refused writes of one volume.

    The device counts as full until every one of them has been carried out. Writes of blocks that it has
    allocated already may succeed meanwhile, and say nothing about room for others.
    """

    def __init__(self, again: Callable[[Command], None], changed: Callable[[bool], None]) -> None:
        """`again` starts a command anew; `changed` is told when the device is full, and when no longer."""
        self._again = again
        self._changed = changed
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[Command] = deque()
        self._trying: set[Command] = set()
        self._timer: asyncio.TimerHandle | None = None
        self._pause_seconds = FIRST_PAUSE_SECONDS

    def __bool__(self) -> bool:
        """Tell whether the device is full."""
        return bool(self._waiting or self._trying)

    def refused(self, command: Command) -> None:
        """Keep a write until there is room."""
        was_full = bool(self)
        self._trying.discard(command)
        self._waiting.append(command)
        if self._timer is None:
            self._timer = self._loop.call_later(self._pause_seconds, self._probe)
            self._pause_seconds = min(self._pause_seconds * 2, LONGEST_PAUSE_SECONDS)
        if not was_full:
            self._changed(True)

    def _probe(self) -> None:
        self._timer = None
        if self._waiting:
            self._try(self._waiting.popleft())

    def _try(self, command: Command) -> None:
        self._trying.add(command)
        self._again(command)

    def carried_out(self, command: Command) -> None:
        """Take note of a command that succeeded; if it was one refused before, the others are tried."""
        if command not in self._trying:
            return
        self._trying.discard(command)
        self._pause_seconds = FIRST_PAUSE_SECONDS
        if self._timer:
            self._timer.cancel()
            self._timer = None
        for waiting in [self._waiting.popleft() for _ in range(len(self._waiting))]:
            self._try(waiting)
        if not self:
            self._changed(False)

    @property
    def waiting(self) -> tuple[Command, ...]:
        """The writes that wait for one of them to succeed."""
        return tuple(self._waiting)

    def abandon(self) -> list[Command]:
        """Try nothing any more; returns the writes that wait."""
        if self._timer:
            self._timer.cancel()
            self._timer = None
        was_full, left = bool(self), list(self._waiting)
        self._waiting.clear()
        self._trying.clear()
        self._pause_seconds = FIRST_PAUSE_SECONDS
        if was_full:
            self._changed(False)
        return left
