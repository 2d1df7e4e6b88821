"""Keeps a copier at work while the move wants one, over connections that are made anew when they end."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Final, TypeAlias

from farpage.errors import FarpageError
from farpage.intermediary.copier import Copier
from farpage.log import get_logger
from farpage.nbd.client import Connection

FIRST_PAUSE_SECONDS: Final = 0.05
LONGEST_PAUSE_SECONDS: Final = 1.0
SILENT_SECONDS: Final = 2.0
"""A server that has answered nothing for so long is told of."""

Open: TypeAlias = Callable[[], Awaitable[tuple[Connection, Connection]]]
"""Opens the source to read and the target to fill."""

log = get_logger()


@dataclass
class Copied:
    """Bytes since the start of the process."""

    read_bytes: int = 0
    written_bytes: int = 0
    zeroed_bytes: int = 0


class CopyKeeper:
    """One volume's copying; `run` does the work."""

    def __init__(self, open_both: Open, client_commands: Callable[[], int]) -> None:
        self._open = open_both
        self._client_commands = client_commands
        self._wanted = asyncio.Event()
        self._bandwidth_bytes: int | None = None
        self._copier: Copier | None = None
        self._connections: tuple[Connection, Connection] | None = None
        self._before = Copied()
        self._problem = ""
        self._began_at = 0.0
        self.passes = 0
        """Copiers begun: one more than the times that a connection was lost."""

    # What is wanted, and how far it is

    def want(self, wanted: bool, bandwidth_bytes: int | None) -> None:
        """Copy or pause, within a bandwidth."""
        self._bandwidth_bytes = bandwidth_bytes
        if wanted != self._wanted.is_set():
            log.info("copying" if wanted else "paused", bandwidth_bytes=bandwidth_bytes)
        if wanted:
            self._wanted.set()
        else:
            self._wanted.clear()
        if self._copier is not None:
            self._copier.set_bandwidth(bandwidth_bytes)
            self._copier.set_paused(not wanted)

    def give_way(self, seconds: float) -> None:
        """Give way for so long: the client is at work in a way that its relayed commands do not show."""
        if self._copier is not None:
            self._copier.give_way(seconds)

    @property
    def complete(self) -> bool:
        """Whether everything is present at the target, durably."""
        return self._copier is not None and self._copier.complete

    @property
    def copied(self) -> Copied:
        """What was copied so far."""
        now, before = self._copier, self._before
        if now is None:
            return before
        return Copied(
            before.read_bytes + now.read_bytes,
            before.written_bytes + now.written_bytes,
            before.zeroed_bytes + now.zeroed_bytes,
        )

    def rate(self) -> float:
        """Return the bytes a second of the last seconds."""
        return self._copier.rate() if self._copier is not None else 0.0

    @property
    def problem(self) -> str:
        """What keeps it from going on; empty if nothing does."""
        if self._copier is None or self._connections is None:
            return self._problem
        for connection in self._connections:
            silent = connection.oldest_inflight_seconds
            if silent >= SILENT_SECONDS:
                return f"no answer for {silent:.0f} s from {connection.address} ({connection.export_name})"
        return self._copier.problem

    # The work

    async def run(self) -> None:
        """Copy until cancelled; never raises for what the servers do."""
        pause = FIRST_PAUSE_SECONDS
        loop = asyncio.get_running_loop()
        while True:
            await self._wanted.wait()
            began = loop.time()
            try:
                source, target = await self._open()
            except FarpageError as error:
                self._note(error.cause)
            else:
                self._note("")
                await self._copy(source, target)
            if loop.time() - began > LONGEST_PAUSE_SECONDS:
                pause = FIRST_PAUSE_SECONDS
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE_SECONDS)

    async def _copy(self, source: Connection, target: Connection) -> None:
        """Copy until a connection ends.

        When all is complete that is still waited for: the target's server may come back without some of it.
        """
        lost = asyncio.Event()

        def on_lost(error: Exception) -> None:
            self._note(str(error))
            lost.set()

        def on_complete() -> None:
            elapsed = asyncio.get_running_loop().time() - self._began_at
            log.info("copied", seconds=round(elapsed, 3), **vars(self.copied))

        source.on_lost = target.on_lost = on_lost
        self._began_at = asyncio.get_running_loop().time()
        self.passes += 1
        self._connections = source, target
        copier = self._copier = Copier(
            source,
            target,
            read=source.read_into,
            client_commands=self._client_commands,
            bandwidth_bytes=self._bandwidth_bytes,
            on_complete=on_complete,
            on_lost=lost.set,
        )
        copier.set_paused(not self._wanted.is_set())
        try:
            copier.start()
            if source.ended or target.ended:
                lost.set()
            await lost.wait()
        finally:
            copier.stop()
            source.abort()
            target.abort()
            self._before, self._copier, self._connections = self.copied, None, None

    def _note(self, problem: str) -> None:
        if problem and problem != self._problem:
            log.warning("not_copying", problem=problem)
        self._problem = problem
