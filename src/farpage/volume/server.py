"""Knowing that a server's process is gone: then none of its I/O can still reach a device."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable

from farpage.kernel.process import is_gone


class ServerProcess:
    """The process behind a UNIX-socket connection, watched through a pidfd.

    A pidfd becomes readable when the whole thread group has exited (pidfd_open(2)), and a
    thread exits only after the system call it is in, so no write of the process is still under way.
    """

    def __init__(self, pid: int) -> None:
        """Watch `pid`.

        :raise OSError: ESRCH when there is no such process.
        """
        self.pid = pid
        self._descriptor = os.pidfd_open(pid)
        self._watched = False

    @property
    def gone(self) -> bool:
        """Whether the process has exited."""
        return self._descriptor >= 0 and is_gone(self._descriptor)

    def when_gone(self, callback: Callable[[], None]) -> None:
        """Call back once, from the running loop, when the process has exited."""
        loop = asyncio.get_running_loop()

        def exited() -> None:
            self.close()
            callback()

        if self._descriptor >= 0:
            self._watched = True
            loop.add_reader(self._descriptor, exited)

    def close(self) -> None:
        """Stop watching."""
        if self._descriptor < 0:
            return
        if self._watched:
            asyncio.get_running_loop().remove_reader(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = -1
