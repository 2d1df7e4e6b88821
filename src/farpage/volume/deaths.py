"""Knowing that a server's process has begun to die, before its connections end.

A process that is killed closes its sockets after it has let go of its memory (kernel/exit.c, do_exit), and
with contexts of kernel AIO that waits for an RCU grace period, some 40 ms (fs/aio.c, exit_aio). All but the
last of its threads end at once, and a pidfd of a thread tells so (pidfd_open(2), PIDFD_THREAD, since Linux
6.9).

That a server is dying does not say that what it was sent is over: for that, `ServerProcess`.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from typing import Final

from farpage.kernel.process import is_exiting, open_thread, read_threads

WATCHED_THREADS: Final = 2
"""One of them may be the last one, which ends with the process."""
LOOK_SECONDS: Final = 0.001
"""Pause before a process is looked at again of which a thread has ended: the others are told at the same time
that they shall, but may take a moment for it."""
LOOKS: Final = 5


class ServerDeaths:
    """The servers that are watched by one event loop, each once.

    Where the kernel cannot watch threads, or a server has one alone, nothing is told.
    """

    def __init__(self) -> None:
        self._servers: dict[int, _Server] = {}

    def watch(self, pid: int, dying: Callable[[], None]) -> Callable[[], None]:
        """Call back once, from the running loop, when a process begins to die.

        Returns what takes that back.
        """
        server = self._servers.get(pid)
        if server is None:
            server = self._servers[pid] = _Server(pid, lambda: self._servers.pop(pid, None))
        return server.add(dying)


class _Server:
    def __init__(self, pid: int, forget: Callable[[], object]) -> None:
        self._pid = pid
        self._forget = forget
        """Nobody wants to know of it any more."""
        self._loop = asyncio.get_running_loop()
        self._dying: dict[object, Callable[[], None]] = {}
        self._threads: list[int] = []
        """Pidfds."""
        self._timer: asyncio.TimerHandle | None = None
        self._watch()

    def add(self, dying: Callable[[], None]) -> Callable[[], None]:
        key = object()
        self._dying[key] = dying

        def take_back() -> None:
            if self._dying.pop(key, None) is not None and not self._dying:
                self._stop()
                self._forget()

        return take_back

    def _watch(self) -> None:
        """Watch threads that it has now."""
        try:
            for thread in read_threads(self._pid)[1 : 1 + WATCHED_THREADS]:
                self._threads.append(open_thread(thread))
        except OSError:  # it or the thread has ended, or the kernel is too old; its connections will tell
            pass
        for descriptor in self._threads:
            self._loop.add_reader(descriptor, self._look, LOOKS)

    def _stop(self) -> None:
        for descriptor in self._threads:
            self._loop.remove_reader(descriptor)
            os.close(descriptor)
        self._threads.clear()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _look(self, looks: int) -> None:
        """A thread has ended: see whether that is because the process does."""
        self._stop()
        if is_exiting(self._pid):
            self._forget()
            told, self._dying = list(self._dying.values()), {}
            for dying in told:
                dying()
        elif looks > 1:
            self._timer = self._loop.call_later(LOOK_SECONDS, self._look, looks - 1)
        else:
            self._watch()
