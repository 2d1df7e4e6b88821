"""Notices that a path's oldest command has waited too long, with one timer for all of its commands."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable

from farpage.volume.command import Command

PATIENCE_RESET_SECONDS = 30.0
LARGEST_PATIENCE = 8.0
CLOCK_SLACK_SECONDS = 0.001
"""A timer may come a rounding error early."""


class AgeWatch:
    """Calls `overdue` while the oldest command is older than the path timeout.

    Each time-out that made a path fail doubles the patience for a while: a slow device isn't two dead paths.
    Unless what was overdue is answered in time on another path: then the server was slow, not the device, and
    the next server that hangs is not waited for any longer.
    """

    def __init__(
        self,
        path_timeout_seconds: float,
        oldest_seconds: Callable[[], float | None],
        overdue: Callable[[str], None],
    ) -> None:
        """`oldest_seconds` tells when the oldest command was started; None when none is in flight."""
        self._loop = asyncio.get_running_loop()
        self._path_timeout = path_timeout_seconds
        self._oldest = oldest_seconds
        self._overdue = overdue
        self._timer: asyncio.TimerHandle | None = None
        self._timeouts = 0
        self._last_timeout_seconds = -PATIENCE_RESET_SECONDS
        self.repeated: set[Command] = set()
        """Commands that were overdue and not answered elsewhere yet; `answered` wants to hear of them."""

    def started(self) -> None:
        """A command was started; costs nothing while the timer runs."""
        if self._timer is None:
            self._arm()

    def timed_out(self, in_flight: Iterable[Command]) -> None:
        """A path failed because of the age of its commands: be more patient with the next one."""
        now = self._loop.time()
        self._timeouts += 1
        self._last_timeout_seconds = now
        self.repeated |= {
            command for command in in_flight if now - command.started_seconds > self._path_timeout / 2
        }

    def answered(self, command: Command) -> None:
        """A command of `repeated` was answered: when all are in time, they were not the device's to blame."""
        self.repeated.discard(command)
        if self._loop.time() - command.started_seconds > self._path_timeout:
            self.repeated.clear()
        elif not self.repeated:
            self._timeouts = 0
            self.cancel()
            self._arm()

    def cancel(self) -> None:
        """Stop watching."""
        if self._timer:
            self._timer.cancel()
            self._timer = None

    @property
    def _patience_seconds(self) -> float:
        if self._loop.time() - self._last_timeout_seconds > PATIENCE_RESET_SECONDS:
            self._timeouts = 0
        return self._path_timeout * min(2.0**self._timeouts, LARGEST_PATIENCE)

    def _arm(self) -> None:
        oldest = self._oldest()
        if oldest is not None:
            soonest = self._loop.time() + self._path_timeout / 10
            self._timer = self._loop.call_at(max(oldest + self._patience_seconds, soonest), self._check)

    def _check(self) -> None:
        self._timer = None
        oldest = self._oldest()
        if oldest is not None:
            age = self._loop.time() - oldest
            if age > self._patience_seconds - CLOCK_SLACK_SECONDS:
                self._overdue(f"no answer for {age:.2f} s")
        if self._timer is None:
            self._arm()
