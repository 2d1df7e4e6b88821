"""The end of a benchmark that is interrupted."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

Result = TypeVar("Result")


@contextmanager
def cancelled_by_signals(task: asyncio.Task[Any]) -> Iterator[None]:
    """Have the first signal end the task in order; more of them must not interrupt its clean-up."""
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def cancel() -> None:
        for number in numbers:
            loop.remove_signal_handler(number)
            signal.signal(number, signal.SIG_IGN)
        print("interrupted; cleaning up", file=sys.stderr, flush=True)
        task.cancel()

    for number in numbers:
        loop.add_signal_handler(number, cancel)
    yield


async def undone_when_interrupted(work: Coroutine[Any, Any, Result]) -> Result:
    """Return what `work` returns; the first signal cancels it, so that it puts everything back as it was.

    :raise asyncio.CancelledError: it was interrupted.
    """
    task = asyncio.get_running_loop().create_task(work)
    with cancelled_by_signals(task):
        return await task
