"""The demo's script: which fault comes when, decided from what was observed. No I/O.

The guest writes its memory and checks it in passes. The script limits its memory, kills the VIOS of the
active path with SIGKILL, starts it again, hangs the other with SIGSTOP, lets it go on, and each
time waits until the guest has made a full pass: one that began after the fault.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field

from farpage.volume.state import PathState

PASSES_AFTER = 3
"""Full passes that the guest must make after the last fault."""

RESIDENT_TOLERANCE = 1.05
"""Resident memory may be this many times the limit."""


class Action(enum.StrEnum):
    """What the script asks for next."""

    LIMIT = "limit"
    KILL = "kill"
    RESTART = "restart"
    HANG = "hang"
    CONTINUE = "continue"
    FINISH = "finish"


class Stage(enum.StrEnum):
    """What the demo is waiting for, in words for the display."""

    FILLING = "the guest fills its memory and checks it once"
    SHRINKING = "memory above the limit is paged out"
    BEFORE = "the guest checks all of its memory through the active path"
    KILLED = "the active VIOS is dead; the guest goes on over the other"
    RETURNING = "the killed VIOS starts again and becomes standby"
    RETURNED = "the guest makes a pass with both paths back"
    HUNG = "the active VIOS hangs; the guest goes on over the other"
    AFTER = "the hung VIOS goes on; the guest makes its last passes"
    DONE = "done"


@dataclass(frozen=True)
class Observation:
    """What is known at one moment."""

    filled: bool
    passes: int
    """Passes that the guest has completed, ever."""
    resident_bytes: int
    paths: Mapping[str, PathState]
    """State of the path over each VIOS."""

    @property
    def active(self) -> str | None:
        """The VIOS of the active path."""
        return next((vios for vios, state in self.paths.items() if state is PathState.ACTIVE), None)


@dataclass(frozen=True)
class Passes:
    """Passes with paged memory by when they were made; in `before` and `after` only those that began then."""

    before: int
    during: int
    after: int


@dataclass
class Scenario:
    """The script's place. `next_action` moves it on; the caller does what it returns, and then asks again."""

    limit_bytes: int
    stage: Stage = Stage.FILLING
    killed: str | None = None
    hung: str | None = None
    _began: dict[Stage, int] = field(default_factory=dict)
    """Passes completed when each stage began."""

    def next_action(self, seen: Observation) -> Action | None:
        """Return what to do now, or None to wait."""
        action: Action | None = None
        match self.stage:
            case Stage.FILLING if seen.filled and seen.passes:
                action = self._act(Action.LIMIT, Stage.SHRINKING, seen)
            case Stage.SHRINKING if seen.resident_bytes <= self.limit_bytes:
                self._enter(Stage.BEFORE, seen)
            case Stage.BEFORE if self._made(seen, 1) and seen.active and self._has_standby(seen):
                self.killed = seen.active
                action = self._act(Action.KILL, Stage.KILLED, seen)
            case Stage.KILLED if self._made(seen, 1) and seen.active not in (None, self.killed):
                action = self._act(Action.RESTART, Stage.RETURNING, seen)
            case Stage.RETURNING if self._has_standby(seen):
                self._enter(Stage.RETURNED, seen)
            case Stage.RETURNED if self._made(seen, 1) and seen.active and self._has_standby(seen):
                self.hung = seen.active
                action = self._act(Action.HANG, Stage.HUNG, seen)
            case Stage.HUNG if self._made(seen, 1) and seen.active not in (None, self.hung):
                action = self._act(Action.CONTINUE, Stage.AFTER, seen)
            case Stage.AFTER if self._made(seen, PASSES_AFTER):
                action = self._act(Action.FINISH, Stage.DONE, seen)
        return action

    def passes(self, completed: int) -> Passes:
        """Sort the guest's passes by when they were made."""
        limited = self._began.get(Stage.BEFORE, completed)
        killed = self._began.get(Stage.KILLED, completed)
        continued = self._began.get(Stage.AFTER, completed)
        return Passes(
            before=max(0, killed - limited - 1),
            during=continued - killed,
            after=max(0, completed - continued - 1),
        )

    def _act(self, action: Action, then: Stage, seen: Observation) -> Action:
        self._enter(then, seen)
        return action

    def _enter(self, stage: Stage, seen: Observation) -> None:
        self.stage = stage
        self._began[stage] = seen.passes

    def _made(self, seen: Observation, count: int) -> bool:
        # The pass that was under way when the stage began does not count.
        return seen.passes - self._began.get(self.stage, 0) - 1 >= count

    @staticmethod
    def _has_standby(seen: Observation) -> bool:
        return PathState.STANDBY in seen.paths.values()
