"""Keeps the definition's replica states what a mirror wants them to be, durably, one change at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Final, TypeAlias

from farpage.definition.states import ReplicaState
from farpage.errors import FarpageError

FIRST_PAUSE_SECONDS: Final = 0.05
LONGEST_PAUSE_SECONDS: Final = 0.25
"""Accesses may wait for what is to be recorded."""

States: TypeAlias = dict[str, ReplicaState]
"""State of every replica, by the identifier of its device."""

Record: TypeAlias = Callable[[States], Awaitable[None]]
"""`await record(states)` returns when they are stored durably; it raises FarpageError if they may not be."""


class ReplicaRecorder:
    """What is recorded of each replica, and the task that brings it to what is wanted.

    A replica is only ever taken for stale when that is known to be stored and nothing has been sent since
    that could undo it. Where an attempt failed nobody knows what is stored, and the next one settles it.
    """

    def __init__(
        self,
        recorded: Mapping[str, ReplicaState | None],
        wanted: Callable[[], States],
        record: Record,
        on_recorded: Callable[[], None],
    ) -> None:
        """`recorded` has None for a replica of which nobody knows what is stored.

        `wanted` is asked again before each attempt; `on_recorded` is called after each that succeeded.
        """
        self._recorded: dict[str, ReplicaState | None] = dict(recorded)
        self._wanted = wanted
        self._record = record
        self._on_recorded = on_recorded
        self._task: asyncio.Task[None] | None = None
        self.problem = ""
        """Why the latest attempt failed."""

    def of(self, device: str) -> ReplicaState | None:
        """Return what is stored of a replica; None while nobody knows."""
        return self._recorded.get(device)

    def is_stale(self, device: str) -> bool:
        """Tell whether a replica is known to be stale by whoever reads the definition."""
        return self._recorded.get(device) is ReplicaState.STALE

    def enter(self, device: str, state: ReplicaState) -> None:
        """Take a replica that was added to the definition."""
        self._recorded[device] = state

    def leave(self, device: str) -> None:
        """Forget a replica that was taken out of the definition."""
        self._recorded.pop(device, None)

    def wake(self) -> None:
        """Look whether there is something to record; returns at once."""
        if self._task is None and self._behind():
            self._task = asyncio.get_running_loop().create_task(self._run())

    def _behind(self) -> States:
        """Return what is wanted, if it is not what is recorded."""
        wanted = self._wanted()
        return wanted if any(self._recorded.get(device) != wanted[device] for device in wanted) else {}

    async def _run(self) -> None:
        pause_seconds = FIRST_PAUSE_SECONDS
        while wanted := self._behind():
            for device, state in wanted.items():
                if self._recorded.get(device) != state:
                    self._recorded[device] = None
            try:
                await self._record(wanted)
            except FarpageError as error:
                self.problem = error.cause
                await asyncio.sleep(pause_seconds)
                pause_seconds = min(pause_seconds * 2, LONGEST_PAUSE_SECONDS)
                continue
            self.problem = ""
            pause_seconds = FIRST_PAUSE_SECONDS
            for device, state in wanted.items():
                if device in self._recorded:
                    self._recorded[device] = state
            self._on_recorded()
        self._task = None

    async def stop(self) -> None:
        """Record nothing any more."""
        task, self._task = self._task, None
        if task:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
