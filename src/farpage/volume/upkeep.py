"""Keeps one path connected: connects it again and again when it has failed, probes it when it is idle."""

from __future__ import annotations

import asyncio
from typing import Final, Protocol

from farpage.errors import FarpageError
from farpage.volume.link import PathLink
from farpage.volume.ownership import Ownership
from farpage.volume.path import PathEvent
from farpage.volume.state import PathState

FIRST_PAUSE_SECONDS: Final = 0.05
LONGEST_PAUSE_SECONDS: Final = 1.0


class UpkeepOwner(Protocol):
    """Who decides what becomes of the path."""

    @property
    def epoch(self) -> int:
        """What the path has to be opened with to be of use."""

    async def open(self, path: PathLink) -> None:
        """Open the volume over the path under the present epoch.

        :raise FarpageError: when the server cannot be reached, or refuses.
        :raise OSError: when it gives no lease.
        """

    async def probe(self, path: PathLink) -> None:
        """Read the volume's first bytes over the path.

        :raise OSError: when the server answers with an error or the connection is lost.
        :raise TimeoutError: when no answer comes in time.
        """

    async def borrow(self, path: PathLink) -> None:
        """Have the storage lent that the path leads to, if that could not be when it was opened."""

    def stands_by(self) -> None:
        """The path is connected and answers: it may take over."""

    def answered(self, path: PathLink) -> None:
        """A suspect path has answered."""

    def overdue(self, path: PathLink, reason: str) -> None:
        """The path carries commands and does not answer."""

    def fail(self, path: PathLink, reason: str) -> None:
        """The path is of no use any more."""

    def unreachable(self, path: PathLink) -> None:
        """The path cannot be opened."""


class Upkeep:
    """The upkeep of one path."""

    def __init__(
        self, path: PathLink, owner: UpkeepOwner, ownership: Ownership, probe_interval_seconds: float
    ) -> None:
        self._path = path
        self._owner = owner
        self._ownership = ownership
        self._probe_interval = probe_interval_seconds
        self._loop = asyncio.get_running_loop()

    async def run(self) -> None:
        """Go on until another owner has the volume."""
        path, pause = self._path, FIRST_PAUSE_SECONDS
        while not self._ownership.fenced:
            if path.machine.state is PathState.FAILED:
                await path.wanted.wait()
                try:
                    await self._owner.open(path)
                    await self._owner.probe(path)
                except (FarpageError, OSError) as error:
                    path.disconnect()
                    reason = self._ownership.fenced or path.left or cause_of(error)
                    path.machine.apply(PathEvent.LOST, self._loop.time(), reason)
                    self._owner.unreachable(path)
                    await asyncio.sleep(pause)
                    pause = min(pause * 2, LONGEST_PAUSE_SECONDS)
                    continue
                if path.connection is None or path.epoch < self._owner.epoch:
                    path.disconnect()  # another path took over meanwhile: only its epoch fences this server
                    continue
                if not path.wanted.is_set():
                    path.disconnect()
                    continue
                path.left = path.untold = ""
                pause = FIRST_PAUSE_SECONDS
                path.failed.clear()
                path.machine.apply(PathEvent.PROBED, self._loop.time())
                self._owner.stands_by()
            if not await self._fails_within(self._probe_interval):
                await self._owner.borrow(path)
                await self._probe_idle()

    async def _fails_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                await self._path.failed.wait()
        except TimeoutError:
            return False
        self._path.failed.clear()
        return True

    async def _probe_idle(self) -> None:
        path, connection = self._path, self._path.connection
        if connection is None or path.in_flight:
            return
        try:
            await self._owner.probe(path)
        except OSError as error:
            if path.connection is not connection:
                return  # it failed or took over meanwhile
            if path.machine.carries and isinstance(error, TimeoutError):
                self._owner.overdue(path, str(error))
            else:
                self._owner.fail(path, str(error))
        else:
            if path.machine.state is PathState.SUSPECT and not path.in_flight:
                self._owner.answered(path)


def cause_of(error: Exception) -> str:
    """Say what went wrong without the remedy: a path's reason is one line of a table."""
    return error.cause if isinstance(error, FarpageError) else str(error)
