"""Simulated time, and processes in it that can be stopped, continued and killed.

Each process has an event loop of its own. All of them share one queue of what happens when, so that one
seed decides the order of everything. A stopped process keeps what comes for it, timers too, as under
SIGSTOP; a killed one drops it. What the kernel and the hardware do (messages under way, commands in a
disk) belongs to the world, and goes on without the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import hashlib
import random
from asyncio.events import _set_running_loop
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context
from heapq import heappop, heappush
from typing import Any, TypeVar, cast

from farpage.errors import FarpageError

Result = TypeVar("Result")

EVENTS_MAX = 400_000
"""More than any scenario needs: beyond it something spins."""


class Violation(AssertionError):
    """An invariant does not hold."""


class ProcessState(enum.Enum):
    """What a process does."""

    RUNNING = enum.auto()
    STOPPED = enum.auto()
    DEAD = enum.auto()


class Work:
    """What the hardware does: a handle without a loop."""

    __slots__ = ("_run", "cancelled")

    def __init__(self, work: Callable[[], None]) -> None:
        self.cancelled = False
        self._run = work


class Turn:
    """What a process does: `asyncio.Handle` without what nobody asks for here, such as its own context."""

    __slots__ = ("_arguments", "_callback", "_context", "_loop", "cancelled", "is_timer")

    def __init__(
        self,
        loop: ProcessLoop,
        callback: Callable[..., object],
        arguments: tuple[Any, ...] = (),
        context: Context | None = None,
        *,
        is_timer: bool = False,
    ) -> None:
        self._loop = loop
        self._callback = callback
        self._arguments = arguments
        self._context = context
        self.is_timer = is_timer
        self.cancelled = False

    def cancel(self) -> None:
        """Do not run; what it refers to may be freed, although it stays in the queue."""
        self.cancelled = True
        self._callback = _nothing
        self._arguments = ()

    def _run(self) -> None:
        try:
            if self._context is None:
                self._callback(*self._arguments)
            else:
                self._context.run(self._callback, *self._arguments)
        except Exception as error:
            self._loop.call_exception_handler({"exception": error})


def _nothing() -> None:
    pass


Due = Turn | Work
"""What is to run at some time."""


class World:
    """One run: the clock, the queue, the trace, and what went wrong."""

    def __init__(self, seed: int, *, trace: Callable[[str], None] | None = None) -> None:
        self.seed = seed
        self.now_seconds = 0.0
        self.events = 0
        self.violations: list[str] = []
        self.processes: list[Process] = []
        self._ready: deque[tuple[Process | None, Due]] = deque()
        self._later: list[tuple[float, int, Process | None, Due]] = []
        self._number = 0
        self.error: BaseException | None = None
        """An error in the code under test, for its traceback."""
        self._trace = trace
        self._digest = hashlib.blake2b(digest_size=8)
        self._running: Process | None = None

    def random(self, use: str) -> random.Random:
        """Return a source of chance of its own for one use, so that uses do not disturb each other."""
        return random.Random(f"{self.seed}/{use}")

    # What happened

    def note(self, text: str) -> None:
        """Add a line to the trace, whose hash tells whether two runs were the same."""
        self._digest.update(f"{self.now_seconds:.6f} {text}\n".encode())
        if self._trace:
            self._trace(f"{self.now_seconds:11.6f} {text}")

    @property
    def digest(self) -> str:
        """Hash of the trace so far."""
        return self._digest.hexdigest()

    def violated(self, text: str) -> None:
        """Record that an invariant does not hold, and end the run."""
        self.note(f"VIOLATION {text}")
        self.violations.append(text)

    # Processes and time

    def process(self, name: str) -> Process:
        """Start a process."""
        process = Process(self, name)
        self.processes.append(process)
        return process

    def soon(self, process: Process | None, handle: Due) -> None:
        """Run a handle in a process (None: the hardware) after what is due already."""
        self._ready.append((process, handle))

    def at(self, when_seconds: float, process: Process | None, handle: Due) -> None:
        """Run a handle in a process at a time of the world."""
        self._number += 1
        heappush(self._later, (when_seconds, self._number, process, handle))

    def after(self, seconds: float, work: Callable[[], None], process: Process | None = None) -> None:
        """Let the hardware, or a process, do something later."""
        self._number += 1
        handle = Turn(process.loop, work) if process else Work(work)
        heappush(self._later, (self.now_seconds + seconds, self._number, process, handle))

    def let(self, process: Process, turn: Turn) -> None:
        """Have a process do something as soon as it runs: at once, unless it is stopped.

        Only the hardware may ask for it, and in what it does last: the process goes on in its place.
        """
        if process.state is not ProcessState.RUNNING:
            process.keep(turn)
            return
        self._switch(process)
        turn._run()

    def _switch(self, process: Process | None) -> None:
        if process is not self._running:
            self._running = process
            _set_running_loop(process.loop if process else None)

    def run_until(self, end_seconds: float, done: Callable[[], bool] = lambda: False) -> bool:
        """Let time pass until `done`, a violation, or the end; returns whether it was `done`."""
        try:
            return self._run_until(end_seconds, done)
        finally:
            self._running = None
            _set_running_loop(None)

    def _run_until(self, end_seconds: float, done: Callable[[], bool]) -> bool:
        ready, later, running = self._ready, self._later, ProcessState.RUNNING
        while not self.violations:
            if not ready:
                if done():
                    return True
                if not later or later[0][0] > end_seconds:
                    self.now_seconds = end_seconds
                    return False
                self.now_seconds = max(self.now_seconds, later[0][0])
                now_seconds = self.now_seconds
                while later and later[0][0] <= now_seconds:
                    _, _, process, handle = heappop(later)
                    ready.append((process, handle))
            process, handle = ready.popleft()
            if handle.cancelled:
                continue
            if process is not None and process.state is not running:
                process.keep(handle)
                continue
            self.events += 1
            if self.events > EVENTS_MAX:
                self.violated(f"more than {EVENTS_MAX} events: something spins")
            if process is not self._running:
                self._switch(process)
            handle._run()
        return False

    def end(self) -> None:
        """Give everything back: coroutines that wait are closed here and not by the garbage collector."""
        for process in self.processes:
            process.loop.end()
        self._ready.clear()
        self._later.clear()


class Process:
    """One simulated process. What it has in memory is its objects; killed, its loop runs nothing more."""

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.pid = len(world.processes) + 1000
        self.state = ProcessState.RUNNING
        self.loop = _loop_of(world, self)
        self.on_killed: list[Callable[[], None]] = []
        """What the kernel does when the process ends: its sockets close."""
        self.on_gone: list[Callable[[], None]] = []
        """Those who wait for a process that is gone, its system calls included."""
        self._kept: list[Turn] = []
        self._system_calls = 0

    @property
    def alive(self) -> bool:
        """Whether it was not killed."""
        return self.state is not ProcessState.DEAD

    @property
    def gone(self) -> bool:
        """Whether no thread of it is left, not even one in a system call."""
        return self.state is ProcessState.DEAD and self._system_calls == 0

    def keep(self, handle: Due) -> None:
        """Keep what cannot run now."""
        if self.state is ProcessState.STOPPED and isinstance(handle, Turn):
            self._kept.append(handle)

    def stop(self) -> None:
        """SIGSTOP."""
        if self.state is ProcessState.RUNNING:
            self.state = ProcessState.STOPPED

    def cont(self) -> None:
        """SIGCONT: descriptors are looked at before timers, as asyncio does."""
        if self.state is ProcessState.STOPPED:
            self.state = ProcessState.RUNNING
            kept, self._kept = self._kept, []
            for handle in sorted(kept, key=lambda turn: turn.is_timer):
                self.world.soon(self, handle)

    def kill(self) -> None:
        """SIGKILL."""
        if self.state is not ProcessState.DEAD:
            self.state = ProcessState.DEAD
            self._kept.clear()
            for callback in self.on_killed:
                callback()
            self._tell_gone()

    def system_call(self, seconds: float, work: Callable[[], Any], done: Callable[[Any], None]) -> None:
        """Let the kernel do something that is done even if the process is stopped or killed meanwhile."""
        self._system_calls += 1

        def finish() -> None:
            result = work()
            self._system_calls -= 1
            self._tell_gone()
            self.world.let(self, Turn(self.loop, done, (result,)))

        self.world.after(seconds, finish)

    def hold(self) -> None:
        """A thread is in a system call that does not come back yet."""
        self._system_calls += 1

    def release(self) -> None:
        """It comes back."""
        self._system_calls -= 1
        self._tell_gone()

    def _tell_gone(self) -> None:
        if self.gone:
            waiting, self.on_gone = self.on_gone, []
            for callback in waiting:
                callback()


class ProcessLoop(asyncio.AbstractEventLoop):
    """The part of asyncio's loop that farpage uses, over a world."""

    def __init__(self, world: World, process: Process) -> None:
        self._world = world
        self._process = process
        self._tasks: list[asyncio.Task[Any]] = []
        self._readers: dict[int, Turn] = {}
        # Clocks of processes do not agree: times must not go from one to the other.
        self._offset = 1000.0 * (len(world.processes) + 1)

    def time(self) -> float:
        return self._world.now_seconds + self._offset

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_soon(  # type: ignore[override]
        self, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Turn:
        turn = Turn(self, callback, args, context)
        self._world._ready.append((self._process, turn))
        return turn

    call_soon_threadsafe = call_soon  # type: ignore[assignment]

    def call_later(  # type: ignore[override]
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Turn:
        turn = Turn(self, callback, args, context, is_timer=True)
        self._world.at(self._world.now_seconds + delay, self._process, turn)
        return turn

    def call_at(  # type: ignore[override]
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> Turn:
        turn = Turn(self, callback, args, context, is_timer=True)
        self._world.at(when - self._offset, self._process, turn)
        return turn

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(  # type: ignore[override]
        self, coro: Coroutine[Any, Any, Result], *, name: object = None, context: Context | None = None
    ) -> asyncio.Task[Result]:
        task = asyncio.Task(coro, loop=self, name=None if name is None else str(name), context=context)
        task.add_done_callback(self._task_done)
        self._tasks.append(task)
        if len(self._tasks) > 1000:
            self._tasks = [task for task in self._tasks if not task.done()]
        return task

    def _task_done(self, task: asyncio.Task[Any]) -> None:
        if not task.cancelled():
            self._check(task.exception())

    def _check(self, error: BaseException | None) -> None:
        """Take errors that nobody has designed for what they are: bugs."""
        if error is not None and not isinstance(error, FarpageError | OSError | TimeoutError):
            self._world.violated(f"{self._process.name}: {type(error).__name__}: {error}")
            self._world.error = error

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        if not self._process.alive:
            return  # an error that a task would have been told of, had it lived on, found by the collector
        error = context.get("exception")
        if isinstance(error, OSError | FarpageError):  # in a callback nobody catches it
            self._world.violated(f"unhandled {type(error).__name__}: {error}")
            self._world.error = error
        self._check(error)

    def run_in_executor(  # type: ignore[override]
        self, executor: object, func: Callable[..., Result], *args: Any
    ) -> asyncio.Future[Result]:
        """Run something in a thread: a little later."""
        future: asyncio.Future[Result] = self.create_future()

        def work() -> None:
            if future.cancelled():
                return
            try:
                future.set_result(func(*args))
            except Exception as error:
                future.set_exception(error)

        self.call_later(0.0001, work)
        return future

    def add_reader(  # type: ignore[override]
        self, fd: Any, callback: Callable[..., Any], *args: Any
    ) -> None:
        self._readers[fd] = Turn(self, callback, args)

    def remove_reader(self, fd: Any) -> bool:
        handle = self._readers.pop(fd, None)
        if handle is not None:
            handle.cancel()
        return handle is not None

    def readable(self, fd: int) -> bool:
        """Let the reader of a descriptor run; False when there is none."""
        if fd not in self._readers:
            return False
        handle = self._readers[fd]
        self._world.soon(self._process, handle)
        return True

    def end(self) -> None:
        """Close the coroutines that still wait."""
        _set_running_loop(self)
        try:
            for task in self._tasks:
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                if not task.done():
                    with contextlib.suppress(Exception):
                        cast(Coroutine[Any, Any, Any], task.get_coro()).close()
        finally:
            _set_running_loop(None)
        self._tasks.clear()
        self._readers.clear()


_loop_of = cast("Callable[[World, Process], ProcessLoop]", ProcessLoop)
"""Makes a loop; asyncio's abstract one has more methods than farpage needs."""
