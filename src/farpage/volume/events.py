"""What a volume tells its owner, and asks of it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

from farpage.volume.recorder import States


class VolumeEvents(Protocol):
    """What a volume tells its owner."""

    def epoch_raised(self, epoch: int) -> None:
        """Writes go out under a new epoch from now on."""

    def vios_doubted(self, vios: str) -> None:
        """The path that carries the commands has failed or does not answer: its VIOS may answer nobody."""

    def alarm(self, kind: str, message: str) -> None:
        """Something happened that an operator should look at."""


class MirrorEvents(VolumeEvents, Protocol):
    """What a mirror tells its owner, and asks of it."""

    def record_replicas(self, epoch: int, states: States) -> Awaitable[None]:
        """Store the states of all replicas durably.

        :raise FarpageError: they may not be stored.
        """


class ReplicaEvents:
    """Passes on what one replica's paths tell, but not that accesses wait while other replicas answer."""

    def __init__(self, events: VolumeEvents, is_last: Callable[[], bool]) -> None:
        self._events = events
        self._is_last = is_last

    def epoch_raised(self, epoch: int) -> None:
        """Pass it on."""
        self._events.epoch_raised(epoch)

    def vios_doubted(self, vios: str) -> None:
        """Pass it on."""
        self._events.vios_doubted(vios)

    def alarm(self, kind: str, message: str) -> None:
        """Pass on what concerns an operator while other replicas answer, or everything of the last one."""
        if kind in ("path_failed", "fenced") or self._is_last():
            self._events.alarm(kind, message)
