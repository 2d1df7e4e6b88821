"""The end of a benchmark that is interrupted."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


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
