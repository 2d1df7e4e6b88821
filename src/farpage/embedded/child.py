"""One daemon as a child process: started, watched, started again when it dies, stopped."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from farpage.embedded.backoff import RestartBackoff
from farpage.embedded.parent import PARENT_VARIABLE

LOG_BYTES = 16 << 20
"""A log longer than this is put aside when its daemon starts."""


@dataclass(frozen=True)
class ChildEvent:
    """Something that happened to a daemon; `time_seconds` is CLOCK_MONOTONIC."""

    child: str
    time_seconds: float
    message: str


def describe_exit(status: int) -> str:
    """Say how a process ended, from asyncio's return code."""
    if status >= 0:
        return f"exited with status {status}"
    with contextlib.suppress(ValueError):
        return f"was killed by {signal.Signals(-status).name}"
    return f"was killed by signal {-status}"


class Child:
    """A daemon run as `python -m farpage ARGUMENTS` in a session of its own, its output in `log`.

    `launcher` are words before that command, of a program that becomes it (`nsenter`, `taskset`).
    While `supervised`, an end that nobody asked for leads to a new start, with growing pauses.
    An end with status 0 counts as asked for unless it `restarts_after_success`.
    """

    def __init__(
        self,
        name: str,
        arguments: Sequence[str],
        log: Path,
        notify: Callable[[ChildEvent], None],
        launcher: Sequence[str] = (),
        *,
        restarts_after_success: bool = True,
    ) -> None:
        self.name = name
        self.log = log
        self.supervised = False
        self.last_exit: int | None = None
        self._command = (*launcher, sys.executable, "-m", "farpage", *arguments)
        self._restarts_after_success = restarts_after_success
        self._notify = notify
        self._backoff = RestartBackoff()
        self._process: asyncio.subprocess.Process | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._stopping = False

    @property
    def pid(self) -> int | None:
        """Process id while it runs."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Start the process; one that runs already is left alone.

        :raise OSError: it cannot be started.
        """
        if self._process is not None:
            if self._process.returncode is None:
                return
            self._note_end(self._process.returncode)  # its watcher has not got to it yet
        await self._end_watcher()
        self._stopping = False
        await self._spawn()
        self._watcher = asyncio.get_running_loop().create_task(self._watch(), name=f"watch {self.name}")

    def send_signal(self, number: signal.Signals) -> None:
        """Send a signal; nothing happens to a process that has ended."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    async def exited(self) -> None:
        """Wait until the process that runs now has ended."""
        if self._process is not None:
            await self._process.wait()

    async def stop(self, grace_seconds: float) -> None:
        """Ask the process to end, kill it when it has not after `grace_seconds`; do not start it again."""
        self._stopping = True
        process = self._process
        if process is not None:
            self.send_signal(signal.SIGTERM)
            # A stopped process takes no SIGTERM before it goes on.
            self.send_signal(signal.SIGCONT)
            try:
                await asyncio.wait_for(process.wait(), grace_seconds)
            except TimeoutError:
                self._tell(f"did not end in {grace_seconds:g} s; killed")
                self.send_signal(signal.SIGKILL)
                await process.wait()
        await self._end_watcher()

    def log_tail(self, lines: int = 3) -> str:
        """Return the last lines of the log, for an error message."""
        with contextlib.suppress(OSError):
            with self.log.open("rb") as log:
                log.seek(max(0, os.fstat(log.fileno()).st_size - 4096))
                tail = log.read().decode(errors="replace").strip().splitlines()
            return " / ".join(line.strip() for line in tail[-lines:])
        return ""

    async def _spawn(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            if self.log.stat().st_size > LOG_BYTES:
                self.log.replace(self.log.with_name(self.log.name + ".1"))
        # A session of its own: a Ctrl-C on the terminal reaches the parent alone, which stops all in order.
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**os.environ, PARENT_VARIABLE: str(os.getpid())},
            )
        self._tell(f"started, pid {self._process.pid}")

    async def _watch(self) -> None:
        loop = asyncio.get_running_loop()
        while self._process is not None:
            started = loop.time()
            self._note_end(await self._process.wait())
            if self._stopping or not self.supervised:
                return
            if self.last_exit == 0 and not self._restarts_after_success:
                self._tell("was asked to stop, so it is not started again by itself")
                return
            lifetime_seconds = loop.time() - started
            while self._process is None and self.supervised:
                await asyncio.sleep(self._backoff.pause_after(lifetime_seconds))
                lifetime_seconds = 0.0
                try:
                    await self._spawn()
                except OSError as problem:
                    self._tell(f"cannot be started again: {problem}")

    def _note_end(self, status: int) -> None:
        self.last_exit = status
        self._process = None
        self._tell(describe_exit(status))

    async def _end_watcher(self) -> None:
        watcher, self._watcher = self._watcher, None
        if watcher is not None:
            watcher.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watcher

    def _tell(self, message: str) -> None:
        self._notify(ChildEvent(self.name, asyncio.get_running_loop().time(), message))
