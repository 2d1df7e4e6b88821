"""One data process as its front has it: started, watched, asked, started again when it ends, stopped.

Another one is started in its place only when the process has ended wholly, which its pidfd says: with it its
system calls have, so whoever opens a volume at the new one finds nothing of the old one's under way.
"""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, TypeVar

from farpage.errors import FarpageError
from farpage.kernel.ending import until_gone
from farpage.log import get_logger
from farpage.message import Message
from farpage.pager.channel import Channel, Handler, PeerGone, PeerSilent
from farpage.vios.figures import Figures, merged
from farpage.vios.processes.errors import DataProcessAway, DataProcessLost, DataProcessSilent
from farpage.vios.processes.messages import Alive, Begin, Nothing, Outcome, file_of

log = get_logger()

UP_SECONDS: Final = 10.0
"""So long a client waits for its volume's process to be started again."""
START_SECONDS: Final = 60.0
"""So long a process may take to begin, and the VIOS' start waits for it."""
SILENT_SECONDS: Final = 3.0
"""A process that has not answered by then hangs and is killed: leases of its clients, which the front gives,
would not end by themselves."""
TICK_SECONDS: Final = 1.0
"""Between two looks whether a process answers."""
KILL_SECONDS: Final = 5.0
"""So long a killed process is waited for, before a request fails for it."""
ANSWER_SECONDS: Final = 1.0
"""So long the control API waits for what a process tells of itself; then what it told last counts."""
STEADY_SECONDS: Final = 1.0
"""A process that has lived so long is started again at once."""
FIRST_PAUSE_SECONDS: Final = 0.1
LONGEST_PAUSE_SECONDS: Final = 5.0

Result = TypeVar("Result")


@dataclass(frozen=True)
class Start:
    """What a process is told to begin with; the files' contents go with it."""

    begin: Begin
    files: tuple[bytes, ...]
    descriptors: tuple[int, ...]


class DataProcess:
    """One place among the data processes; in the event loop of the front's main thread.

    It has to be that thread: when the one that started a process ends, the kernel kills the process.
    """

    def __init__(self, vios: str, index: int, lock: int, on_request: Handler) -> None:
        """`lock` is inherited by the process, and so held until that has ended too."""
        self.index = index
        self.restarts = 0
        self.open_exports = 0
        """Connections that have a volume open, as of the last answer."""
        self.up = asyncio.Event()
        """Set while it serves."""
        self._decided = asyncio.Event()
        """Set while it serves, and when it will not any more."""
        self.on_up: Callable[[DataProcess], None] = lambda process: None
        """Called when one that was started again serves."""
        self._vios = vios
        self._lock = lock
        self._on_request = on_request
        self._loop = asyncio.get_running_loop()
        self._start: Callable[[], Start] | None = None
        self._may_begin = asyncio.Event()
        self.begun = False
        """Whether it was told what to serve."""
        self._stopping = False
        self._child: subprocess.Popen[bytes] | None = None
        self._pidfd = -1
        self._channel: Channel | None = None
        self._gone = asyncio.Event()
        self._gone.set()
        self._now, self._past = Figures(), Figures()
        self._life = self._loop.create_task(self._live())

    @property
    def pid(self) -> int | None:
        """The process, while there is one."""
        return self._child.pid if self._child is not None else None

    @property
    def figures(self) -> Figures:
        """What it has counted as of the last `refresh`, with those that had its place before."""
        return merged((self._past, self._now))

    def begin(self, start: Callable[[], Start]) -> None:
        """Let it serve, now and whenever it is started again; `start` is asked each time."""
        self._start = start
        self._may_begin.set()

    # Life

    async def _live(self) -> None:
        pause = 0.0
        while not self._stopping:
            began = self._loop.time()
            try:
                self._spawn()
            except OSError as error:
                log.error("data_process_not_started", process=self.index, problem=str(error))
            else:
                serving = self._loop.create_task(self._serve())
                await until_gone(self._pidfd)
                serving.cancel()
                self._ended()
            if self._stopping:
                return
            self.restarts += 1
            steady = self._loop.time() - began >= STEADY_SECONDS
            pause = 0.0 if steady else min(max(2 * pause, FIRST_PAUSE_SECONDS), LONGEST_PAUSE_SECONDS)
            await asyncio.sleep(pause)

    def _spawn(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            arguments = (theirs.fileno(), self._lock, os.getpid(), self._vios, self.index)
            try:
                child = subprocess.Popen(
                    [sys.executable, "-m", "farpage.vios.processes", *map(str, arguments)],
                    pass_fds=(theirs.fileno(), self._lock),
                    stdin=subprocess.DEVNULL,
                )
            except OSError:
                ours.close()
                raise
        try:
            self._pidfd = os.pidfd_open(child.pid)
        except OSError:
            ours.close()
            child.kill()
            child.wait()
            raise
        self._child = child
        self._gone = asyncio.Event()
        self._channel = Channel(ours, on_request=self._on_request, on_closed=self.kill)

    async def _serve(self) -> None:
        """Have it begin, and watch it from then on."""
        await self._may_begin.wait()
        assert self._start is not None
        start = self._start()
        self.begun = True
        try:
            await self.ask(
                "begin",
                start.begin,
                Nothing,
                descriptors=start.descriptors,
                files=start.files,
                seconds=START_SECONDS,
            )
        except FarpageError as error:
            log.error("data_process_does_not_begin", process=self.index, problem=str(error))
            self.kill()
            return
        self.up.set()
        self._decided.set()
        log.info("data_process_up", process=self.index, pid=self.pid)
        if self.restarts:
            self.on_up(self)
        while True:
            await asyncio.sleep(TICK_SECONDS)
            began = self._loop.time()
            # Unless this process was held up itself, and has not come to the answer.
            if not await self.look() and self._loop.time() - began < SILENT_SECONDS + TICK_SECONDS:
                self._hangs()

    async def look(self, seconds: float = SILENT_SECONDS) -> bool:
        """Ask how many have a volume open; returns whether it answers in time, or is gone."""
        if self.up.is_set():
            try:
                self.open_exports = (await self.ask("ping", Nothing(), Alive, seconds=seconds)).open_exports
            except DataProcessSilent:
                return False
            except DataProcessLost:
                pass
        return True

    def _hangs(self) -> None:
        log.error("data_process_silent", process=self.index, pid=self.pid, seconds=SILENT_SECONDS)
        self.kill()

    def _ended(self) -> None:
        assert self._child is not None and self._channel is not None
        status, pid = self._child.wait(), self._child.pid
        os.close(self._pidfd)
        self._pidfd, self._child = -1, None
        self.up.clear()
        if not self._stopping:
            self._decided.clear()
        self.begun = False
        self._past, self._now = merged((self._past, self._now.past)), Figures()
        self.open_exports = 0
        channel, self._channel = self._channel, None
        channel.close()
        self._gone.set()
        if not self._stopping:
            log.error("data_process_lost", process=self.index, pid=pid, status=status)

    def kill(self) -> None:
        """Kill the process; another one is started."""
        if self._pidfd >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    async def stop(self) -> None:
        """Have it finish what is in flight and end, and wait for that."""
        self._stopping = True
        self._decided.set()
        if self.up.is_set():
            with suppress(FarpageError):
                await self.ask("stop", Nothing(), Nothing)
        else:
            self.kill()
        await self._gone.wait()

    async def end(self) -> None:
        """Kill it if it runs yet, and wait until it has ended wholly, however long a device takes."""
        self._stopping = True
        self.kill()
        await self._gone.wait()
        self._life.cancel()

    # Questions

    async def ask(
        self,
        method: str,
        parameters: Message,
        kind: type[Result],
        *,
        descriptors: Sequence[int] = (),
        files: Sequence[bytes] = (),
        seconds: float | None = None,
    ) -> Result:
        """Ask for something; `files` go as descriptors before the others.

        :raise FarpageError: in the process' own words.
        :raise DataProcessLost: it has ended, and may have done it.
        :raise DataProcessSilent: it has not answered within `seconds`.
        """
        if self._channel is None:
            raise DataProcessLost(self.index, method)
        own: list[int] = []
        try:
            own += map(file_of, files)
            outcome, received = await self._channel.take(
                method, parameters, Outcome, (*own, *descriptors), timeout_seconds=seconds
            )
        except PeerGone as error:
            raise DataProcessLost(self.index, method) from error
        except PeerSilent as error:
            raise DataProcessSilent(self.index, method, error.seconds) from error
        finally:
            for descriptor in own:
                os.close(descriptor)
        return outcome.read(kind, received)

    async def until_up(self, seconds: float = UP_SECONDS) -> None:
        """Wait until it serves.

        :raise DataProcessAway: it takes too long, or is to end.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._decided.wait()
        if not self.up.is_set():
            raise DataProcessAway(self.index)

    async def tell_definition(self, definition: bytes) -> None:
        """Have it go by a definition from now on; one that does not answer is killed, and so goes by none.

        What it is asked later it does by this one, so one that does not serve yet is not waited for.

        :raise DataProcessSilent: it cannot be killed: a device hangs.
        """
        if not self.begun:
            return
        up, gone = self.up.is_set(), self._gone
        telling = self.ask("definition", Nothing(), Nothing, files=[definition], seconds=SILENT_SECONDS)
        task = self._loop.create_task(telling)
        if not up:
            task.add_done_callback(lambda done: done.cancelled() or done.exception())
            return
        try:
            await task
        except DataProcessLost:
            pass
        except DataProcessSilent:
            self._hangs()
            try:
                async with asyncio.timeout(KILL_SECONDS):
                    await gone.wait()
            except TimeoutError:
                seconds = SILENT_SECONDS + KILL_SECONDS
                raise DataProcessSilent(self.index, "definition", seconds) from None

    async def refresh(self) -> None:
        """Ask for its figures; one that does not tell in time leaves them as they were."""
        if self.up.is_set():
            with suppress(FarpageError):
                self._now = await self.ask("figures", Nothing(), Figures, seconds=ANSWER_SECONDS)
                self.open_exports = self._now.open_exports
