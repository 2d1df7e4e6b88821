"""Direct reads: those that a volume's own process carries out, past the server that has lent it the storage.

They are a short cut and nothing rests on them. What comes is what the volume held at some time between the
call and the answer, as with a served read; but to an owner whom another one has replaced, and who does not
know yet, it may be the other's. So whoever reads checks it. A read that fails or is late is repeated as a
served one, which waits out everything; until the storage answers again, all reads are served.

Only reads: what changes a volume always goes through a server, which knows who may.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from farpage.blockio import DirectFile, ReadDone
from farpage.volume.link import PathLink
from farpage.volume.shortcut import Place

LATE_SECONDS: Final = 0.25
"""A direct read that takes longer is repeated as a served one; less where the path timeout is short."""
FIRST_PAUSE_SECONDS: Final = 1.0
LONGEST_PAUSE_SECONDS: Final = 30.0
"""Without direct reads, after one has failed."""

Served = Callable[[int, int, ReadDone], None]


class _Read:
    """A direct read on its way, and after it was late the served one beside it: the first answer counts."""

    __slots__ = ("_owner", "done", "length", "offset", "started_seconds")

    def __init__(
        self, owner: DirectReads, offset: int, length: int, done: ReadDone, started_seconds: float
    ) -> None:
        self._owner = owner
        self.offset = offset
        self.length = length
        self.done: ReadDone | None = done
        """None once it is answered."""
        self.started_seconds = started_seconds

    def arrived(self, error: int, payload: memoryview | None) -> None:
        """Take what the storage has answered."""
        path = self._owner.in_flight.pop(self, None)
        if error or path is None:
            self._owner.failed_or_late(self, path, error, payload)
            return
        path.direct_reads += 1
        assert self.done is not None
        self.done(0, payload)

    def served(self, error: int, payload: memoryview | None) -> None:
        """Take what the server has answered."""
        done, self.done = self.done, None
        if done is not None:
            done(error, payload)


class DirectReads:
    """The direct reads of one volume, over the storage that the path in use was lent."""

    def __init__(self, serve: Served, push: Callable[[], None], path_timeout_seconds: float) -> None:
        """`serve` carries a read out in the other way, and `push` sends it."""
        self.ready = False
        """Whether `read` is worth a try."""
        self.on_change: Callable[[bool], None] = lambda _useless: None
        self._serve = serve
        self._push = push
        self._late_seconds = min(LATE_SECONDS, path_timeout_seconds / 4)
        self._loop = asyncio.get_running_loop()
        self._path: PathLink | None = None
        self._file: DirectFile | None = None
        self.in_flight: dict[_Read, PathLink] = {}
        """Those that are not late, with the path that lent what they read; the oldest first."""
        self._late: set[_Read] = set()
        """Those that were repeated as served ones and did not end yet."""
        self._timer: asyncio.TimerHandle | None = None
        self._pause: asyncio.TimerHandle | None = None
        self._pause_seconds = FIRST_PAUSE_SECONDS

    # Hot path

    def read(self, offset: int, length: int, done: ReadDone) -> bool:
        """Read past the server if that can be done now."""
        if not self.ready:
            return False
        assert self._file is not None and self._path is not None
        read = _Read(self, offset, length, done, self._loop.time())
        if not self._file.read(offset, length, read.arrived):
            return False
        self.in_flight[read] = self._path
        if self._timer is None:
            self._timer = self._loop.call_later(self._late_seconds, self._look)
        return True

    def push(self) -> None:
        """Start what was begun in this turn."""
        if self.in_flight and self._file is not None:
            self._file.push()

    def failed_or_late(
        self, read: _Read, path: PathLink | None, error: int, payload: memoryview | None
    ) -> None:
        """Take an answer that is not just what was asked for in time; `path` is None for one that is late."""
        if path is not None:
            path.direct_failures += 1
            self._failed(read)
        elif read in self._late:  # others were given up
            self._late.discard(read)
            self._refresh()
            done = read.done
            if done is not None and not error:  # on an error, what the server answers counts
                read.done = None
                done(0, payload)

    # Reads past this, see `Shortcut`

    @property
    def place(self) -> Place | None:
        """Where the storage is, while `read` is worth a try."""
        place = self._file.place if self.ready and self._file is not None else None
        return place and Place(*place, self._late_seconds)

    def answered(self, reads: int, seconds: float) -> None:
        """Count reads of others."""
        if self._path is not None:
            self._path.direct_reads += reads

    def failed(self) -> None:
        """Count a read of somebody else that failed, and have all served for a while."""
        if self._path is not None:
            self._path.direct_failures += 1
        self._distrust()

    # When they are in use

    def use(self, path: PathLink) -> None:
        """Read what this path was lent from now on; if it was lent nothing, go on with what there is."""
        if path.direct is not None or path.endpoint.source:
            self._take(path)

    def lent(self, path: PathLink) -> None:
        """Take note that a path was opened anew: its server may have lent something, or something else."""
        used = self._path
        if used is None:
            return
        if path is used or (path.direct is not None and self._file is None and not used.endpoint.source):
            self._take(path)

    def _take(self, path: PathLink) -> None:
        if self._pause is not None:
            self._pause.cancel()
            self._pause = None
        self._path, self._file = path, path.direct
        self._refresh()

    def _refresh(self, *, useless: bool = False) -> None:
        self.ready = self._file is not None and not self._late and self._pause is None
        self.on_change(useless)

    # Failing

    def _failed(self, read: _Read) -> None:
        self._distrust()
        self._repeat([read])

    def _distrust(self) -> None:
        if self._pause is None:
            self._pause = self._loop.call_later(self._pause_seconds, self._try_again)
            self._pause_seconds = min(self._pause_seconds * 2, LONGEST_PAUSE_SECONDS)
            self._refresh()

    def _try_again(self) -> None:
        self._pause = None
        self._refresh()

    def _look(self) -> None:
        """Repeat what is late as served reads; one timer for all reads."""
        self._timer = None
        now = self._loop.time()
        late: list[_Read] = []
        for read in self.in_flight:
            age = now - read.started_seconds
            if age < self._late_seconds - 0.001:
                self._timer = self._loop.call_later(self._late_seconds - age, self._look)
                break
            late.append(read)
        if late:
            for read in late:
                self.in_flight.pop(read).direct_failures += 1
            self._late.update(late)
            self._refresh()
            self._repeat(late)

    def _repeat(self, reads: list[_Read]) -> None:
        for read in reads:
            self._serve(read.offset, read.length, read.served)
        self._push()

    def redirect(self, adopt: Callable[[int, int, ReadDone], ReadDone]) -> None:
        """Have somebody else told of what is in flight; `adopt(offset, length, done)` returns who."""
        for read in self.in_flight:
            assert read.done is not None
            read.done = adopt(read.offset, read.length, read.done)

    # Ending

    def stop(self) -> None:
        """Read past the server no more until `use`; what is in flight is asked of the server instead."""
        self._repeat(self._end())

    def give_up(self, error: int) -> None:
        """End what is in flight with an error, and read past the server no more until `use`."""
        for read in self._end():
            read.served(error, None)

    def _end(self) -> list[_Read]:
        """Use what was lent no more, also not what it has yet to answer; returns what no server was asked."""
        reads = list(self.in_flight)
        self.in_flight.clear()
        self._late.clear()
        self._path = self._file = None
        self._refresh(useless=True)
        return reads

    def close(self) -> None:
        """Time nothing any more."""
        for timer in (self._timer, self._pause):
            if timer is not None:
                timer.cancel()
