"""The end of other processes, as an event loop waits for it."""

from __future__ import annotations

import asyncio


async def until_gone(pidfd: int) -> None:
    """Return when the process behind a pidfd has ended; a zombie has (pidfd_open(2)).

    Its memory has ended a moment before that. Nobody else may wait for the same descriptor on this loop.
    """
    gone = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(pidfd, gone.set)
    try:
        await gone.wait()
    finally:
        loop.remove_reader(pidfd)
