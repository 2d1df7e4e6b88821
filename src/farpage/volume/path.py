"""One path's state machine: which event may follow which, and what users see. No I/O."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

from farpage.volume.state import PathState


class PathEvent(enum.Enum):
    """What can happen to a path."""

    PROBED = enum.auto()
    """Connected, and a read of the device came back."""
    ACTIVATED = enum.auto()
    """Chosen to carry the client's commands."""
    OVERDUE = enum.auto()
    """Its oldest command is older than the path timeout."""
    ANSWERED = enum.auto()
    """A command finished."""
    LOST = enum.auto()
    """The connection ended, was refused, or was given up."""
    LEFT = enum.auto()
    """Given up on purpose: its VIOS is about to stop."""


_TRANSITIONS: dict[tuple[PathState, PathEvent], PathState] = {
    (PathState.FAILED, PathEvent.PROBED): PathState.STANDBY,
    (PathState.FAILED, PathEvent.LOST): PathState.FAILED,
    (PathState.FAILED, PathEvent.LEFT): PathState.FAILED,
    (PathState.STANDBY, PathEvent.ACTIVATED): PathState.ACTIVE,
    (PathState.STANDBY, PathEvent.ANSWERED): PathState.STANDBY,
    (PathState.STANDBY, PathEvent.LOST): PathState.FAILED,
    (PathState.STANDBY, PathEvent.LEFT): PathState.FAILED,
    (PathState.ACTIVE, PathEvent.OVERDUE): PathState.SUSPECT,
    (PathState.ACTIVE, PathEvent.ANSWERED): PathState.ACTIVE,
    (PathState.ACTIVE, PathEvent.LOST): PathState.FAILED,
    (PathState.ACTIVE, PathEvent.LEFT): PathState.FAILED,
    (PathState.SUSPECT, PathEvent.OVERDUE): PathState.SUSPECT,
    (PathState.SUSPECT, PathEvent.ANSWERED): PathState.ACTIVE,
    (PathState.SUSPECT, PathEvent.LOST): PathState.FAILED,
    (PathState.SUSPECT, PathEvent.LEFT): PathState.FAILED,
}


class InvalidTransition(RuntimeError):
    """An event that cannot happen in the path's state: a bug of the caller."""


@dataclass
class PathMachine:
    """State of one path, since when (loop seconds) and why."""

    since_seconds: float
    state: PathState = PathState.FAILED
    reason: str = "not connected yet"
    losses: int = field(default=0)
    """How often the path failed while it carried commands."""

    def apply(self, event: PathEvent, now_seconds: float, reason: str = "") -> bool:
        """Take one event and return whether the state changed.

        :raise InvalidTransition: when the event cannot happen in the present state.
        """
        new = _TRANSITIONS.get((self.state, event))
        if new is None:
            raise InvalidTransition(f"{event.name} in state {self.state}")
        if event is PathEvent.LOST and self.carries:
            self.losses += 1
        if new is not self.state or event in (PathEvent.LOST, PathEvent.LEFT):
            self.reason = reason
        if new is self.state:
            return False
        self.state = new
        self.since_seconds = now_seconds
        return True

    @property
    def carries(self) -> bool:
        """Whether the client's commands go over this path."""
        return self.state in (PathState.ACTIVE, PathState.SUSPECT)
