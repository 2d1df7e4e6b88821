"""A thread that serves one connection, for as long as all that it is asked for is in the page cache.

An event loop may not write to a file: even a write to the page cache waits, when too much of it is not on the
device yet or when a journal is full, and with it would all others. To hand each write to a thread and have it
back takes several times as long as to write. So the connection itself is handed over, and comes back with
the first request that is not for `FastPath`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import threading
from collections.abc import Callable
from queue import SimpleQueue
from time import perf_counter
from typing import Final

from farpage.blockio import BlockIO, FileBacked, SharedFile
from farpage.errors import Unsupported
from farpage.kernel.aio import AsyncWrites
from farpage.kernel.io_uring import Ring
from farpage.kernel.scheduling import LONGEST_SLICE_SECONDS, set_slice
from farpage.log import get_logger
from farpage.nbd.directpath import IN_FLIGHT_MAX
from farpage.nbd.export import Counters
from farpage.nbd.fastpath import Outcome, Settings
from farpage.nbd.polling import Polling

try:
    from farpage.nbd._directpath import DirectPath
    from farpage.nbd._fastpath import FastPath
except ImportError:  # there was no compiler
    from farpage.nbd.directpath import DirectPath
    from farpage.nbd.fastpath import FastPath

FAST_PATHS = FastPath, DirectPath
LANES_MAX: Final = 64
"""Further connections are served by the event loop alone."""

DEVICE_POLL_SECONDS: Final = 300e-6
"""The next event is looked for so long while something is in flight: a thread that is woken for each begins
the next ones too late for the device to be busy all the time."""

WRITING_SLEEPS: Final = 8
"""A thread that has had nothing but writes to do before so many sleeps gives way to others from then on."""

log = get_logger()


def open_lane(
    io: BlockIO,
    socket: int,
    buffers: tuple[bytearray, bytearray],
    counters: Counters,
    on_back: Callable[[], None],
    *,
    settings: Settings,
) -> Lane | None:
    """Make a lane for the connection at `socket`, with its receive buffer and outgoing area, if it can be."""
    if not isinstance(io, FileBacked) or Lane.made >= LANES_MAX:
        return None
    fast_path, direct_path = FAST_PATHS
    with contextlib.ExitStack() as undo:
        try:
            storage = io.share_file()
            if storage is None:
                return None
            undo.callback(storage.close)
            if io.read_only:
                storage.refusal = None
            fast: FastPath
            if storage.direct:
                ring = Ring(IN_FLIGHT_MAX)
                undo.callback(ring.close)
                writes = _open_writes() if storage.refusal is not None else None
                if writes is not None:
                    undo.callback(writes.close)
                fast = direct_path(socket, buffers, storage, counters, settings, ring, writes)
            else:
                fast = fast_path(socket, buffers, storage, counters, settings)
            undo.pop_all()
            undo.callback(storage.close)
            undo.callback(fast.close)  # which has taken over ring and writes
            lane = Lane(fast, socket, storage, on_back)
        except (Unsupported, OSError, RuntimeError) as error:  # no io_uring, descriptor, memory or thread
            log.info("no_lane", problem=str(error))
            return None
        undo.pop_all()
        return lane


def _open_writes() -> AsyncWrites | None:
    try:
        return AsyncWrites(IN_FLIGHT_MAX, waits=True)
    except Unsupported as error:  # then the event loop writes
        log.info("no_writes_in_lane", problem=error.cause)
        return None


class Lane:
    """The thread of one connection; made and used by the event loop.

    The loop leaves the connection alone from `enter` until `on_back` is called, in the loop.
    """

    made = 0
    """Lanes that are not closed; of all connections of this process."""

    def __init__(self, fast: FastPath, socket: int, storage: SharedFile, on_back: Callable[[], None]) -> None:
        """Take over `fast` and `storage`; the socket stays its owner's.

        :raise RuntimeError: there can be no thread; both stay the caller's.
        """
        self.fast = fast
        """The connection's; its bounds are set before `enter` and hold after `on_back`."""
        self.direct: Final = storage.direct
        """Whether it serves what is read and written with O_DIRECT, and nothing else."""
        self.writes: Final = fast.write_max_bytes > 0
        """Whether it serves writes."""
        self.entered = False
        """Whether the connection is in the thread's hands."""
        self.failed = False
        """Whether the connection came back in a state that nobody knows."""
        self._loop = asyncio.get_running_loop()
        self._socket = socket
        self._storage = storage
        self._on_back = on_back
        self._written: Callable[[], None] | None = None
        """To be called when nothing is written any more."""
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._orders: SimpleQueue[bool] = SimpleQueue()
        self._polling = Polling()
        self._device_polling = Polling(DEVICE_POLL_SECONDS)
        self._manners = _Manners()
        try:
            threading.Thread(target=self._run, name="nbd-lane", daemon=True).start()
        except RuntimeError:
            os.close(self._wake)
            raise
        Lane.made += 1

    def enter(self) -> bool:
        """Hand the connection over; False when somebody needs the file to himself."""
        if self.direct and self.writes:
            self._written = self._storage.share(self.stop)
            if self._written is None:
                return False
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._wake)
        self.fast.stopped = False
        self.entered = True
        self._orders.put(True)
        return True

    def stop(self) -> None:
        """Have it back as soon as what is being carried out has ended."""
        self.fast.stopped = True
        os.eventfd_write(self._wake, 1)

    def close(self) -> None:
        """End the thread, which has nothing in its hands, and let go of the file."""
        Lane.made -= 1
        self._orders.put(False)
        os.close(self._wake)
        self.fast.close()
        self._storage.close()

    def _run(self) -> None:
        while self._orders.get():
            try:
                self._serve()
            except Exception:
                log.exception("lane_failed")
                self.failed = True
            # The loop is gone when the process ends.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._back)

    def _back(self) -> None:
        self.entered = False
        written, self._written = self._written, None
        if written is not None:
            written()
        self._on_back()

    def _serve(self) -> None:
        """Serve the connection until it is for the loop again."""
        fast = self.fast
        socket, wake = (self._socket, select.POLLIN), (self._wake, select.POLLIN)
        device = tuple((descriptor, select.POLLIN) for descriptor in fast.device_descriptors)
        sleeping: dict[int, select.poll] = {
            Outcome.WAIT_READ: _poll(socket, wake, *device),
            Outcome.WAIT_WRITE: _poll((self._socket, select.POLLOUT), wake),
            Outcome.WAIT_DEVICE: _poll(*device),
        }
        outcome = fast.turn()
        while outcome != Outcome.OVER:
            polling = self._device_polling if fast.in_flight else self._polling
            # Threads that look for events instead of sleeping keep each other from serving theirs.
            if outcome == Outcome.WAIT_READ and polling.worthwhile and Lane.made == 1:
                found = self._look(polling)
                if found is not None:
                    outcome = found
                    continue
            self._manners.before_sleep(fast)
            began = perf_counter()
            sleeping[outcome].poll()
            polling.slept(perf_counter() - began)
            outcome = fast.turn()

    def _look(self, polling: Polling) -> int | None:
        """Have a turn as soon as something comes, for a moment; None when nothing did."""
        fast = self.fast
        served, in_flight = fast.served, fast.in_flight
        end = perf_counter() + polling.seconds
        while perf_counter() < end:
            outcome = fast.turn()
            if outcome != Outcome.WAIT_READ or fast.served != served or fast.in_flight != in_flight:
                polling.found()
                return outcome
        polling.missed()
        return None


class _Manners:
    """Has a thread that only writes give its core at once to whoever wakes up there.

    Nobody waits for a page-out, but a client waits for its page, and wakes on a core where such a thread may
    have taken its place.
    """

    def __init__(self) -> None:
        self._gives_way = False
        self._sleeps = self._served = self._reads = 0

    def before_sleep(self, fast: FastPath) -> None:
        """Go by what was served since the last time."""
        served, reads = fast.served, fast.reads_served
        if reads != self._reads:
            self._sleeps = 0
            if self._gives_way:
                self._give_way(on=False)
        elif served != self._served and not self._gives_way:
            self._sleeps += 1
            if self._sleeps >= WRITING_SLEEPS:
                self._give_way(on=True)
        self._served, self._reads = served, reads

    def _give_way(self, *, on: bool) -> None:
        self._gives_way = on
        with contextlib.suppress(OSError):  # it is as polite as it may be
            set_slice(LONGEST_SLICE_SECONDS if on else 0)


def _poll(*watched: tuple[int, int]) -> select.poll:
    poll = select.poll()
    for descriptor, events in watched:
        poll.register(descriptor, events)
    return poll
