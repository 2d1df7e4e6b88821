"""How much of a copy may be under way, so that it gives way to the client. No I/O; times are loop seconds.

A copy that is alone makes large requests, many at a time, which is what storage and network like best. As
soon as the client sends anything it falls back to one small request at a time, behind which a page-in waits
for no longer than behind a few others, and it grows again when the client has been quiet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

QUIET_SECONDS: Final = 0.05
"""The client has sent nothing for so long: one step up."""


@dataclass(frozen=True)
class Allowance:
    """The longest request, and the most bytes of all that are under way."""

    run_bytes: int
    in_flight_bytes: int


STEPS: Final = (
    Allowance(128 << 10, 128 << 10),
    Allowance(512 << 10, 1 << 20),
    Allowance(1 << 20, 4 << 20),
    Allowance(2 << 20, 32 << 20),
)
"""From beside a busy client up to alone."""

PACED_SECONDS: Final = 0.05
"""A copy that is held to a bandwidth sends no more at once than it may send in this time."""


class Window:
    """Down to the first step at the client's first command, and up again while it is quiet."""

    def __init__(self) -> None:
        self._step = len(STEPS) - 1
        self._seen = 0
        self._changed_at = 0.0

    def allowance(self, now_seconds: float, client_commands: int) -> Allowance:
        """Return what is allowed now.

        `client_commands` counts all that the client has begun so far.
        """
        if client_commands != self._seen:
            self._seen = client_commands
            self._step = 0
            self._changed_at = now_seconds
        elif self._step < len(STEPS) - 1 and now_seconds - self._changed_at >= QUIET_SECONDS:
            self._step += 1
            self._changed_at = now_seconds
        return STEPS[self._step]

    def disturbed(self, until_seconds: float) -> None:
        """Fall back until then: the client is at work in a way that its commands here do not show."""
        self._step = 0
        self._changed_at = until_seconds
