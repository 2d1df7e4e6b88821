"""What processes of one host share: messages to each other, and the run folder."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, cast

from farpage.errors import FarpageError
from farpage.pager.attachmentrecord import AttachmentRecord
from farpage.pager.channel import PeerGone
from tests.simulation.world import Process, World

Result = TypeVar("Result")

CLIENT = VOLUME = "vm1"
HOST = "host1"
LOST_SECONDS = 0.0002
"""From the end of a process to the moment at which those connected with it know."""


async def call(
    world: World,
    chance: random.Random,
    caller: Process,
    callee: Process,
    work: Callable[[], Coroutine[Any, Any, Result]],
    *,
    connected: Callable[[], bool] = lambda: True,
) -> Result:
    """Have another process of the host do something, which it does whatever becomes of the caller.

    What has not been read when the two are not `connected` any more is dropped.

    :raise PeerGone: it has ended.
    """
    answer: asyncio.Future[Result] = caller.loop.create_future()

    def settle(result: Result | None, error: FarpageError | None) -> None:
        if answer.done():
            return
        if error is None:
            answer.set_result(cast(Result, result))
        else:
            answer.set_exception(error)

    async def serve() -> None:
        result, problem = None, None
        try:
            result = await work()
        except FarpageError as error:
            problem = error
        world.after(delay_seconds(chance), lambda: settle(result, problem), caller)

    def ended() -> None:
        world.after(2 * LOST_SECONDS, lambda: settle(None, PeerGone("a request")), caller)

    def begin() -> None:
        if connected():
            callee.loop.create_task(serve())

    if callee.alive:
        callee.on_killed.append(ended)
        world.after(delay_seconds(chance), begin, callee)
    else:
        ended()
    return await answer


def delay_seconds(chance: random.Random) -> float:
    return 0.0001 + 0.003 * chance.random() ** 3


class SimulatedFolder:
    """The run folder: the client's record, and the lock."""

    def __init__(self) -> None:
        self.kept: AttachmentRecord | None = None
        self._holder: Process | None = None

    def try_lock(self, process: Process) -> bool:
        """Take the lock, which goes with the process that has it."""
        if self._holder is None or not self._holder.alive:
            self._holder = process
        return self._holder is process

    def unlock(self) -> None:
        """Let another have it."""
        self._holder = None

    def record(self, client: str) -> AttachmentRecord | None:
        """Read the record."""
        return self.kept

    def records(self) -> list[AttachmentRecord]:
        """Read all of them."""
        return [self.kept] if self.kept else []

    def save(self, record: AttachmentRecord) -> None:
        """Store the record."""
        self.kept = record
