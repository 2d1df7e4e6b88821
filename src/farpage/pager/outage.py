"""What a client's pager does while its volume cannot serve it: no path, or a device without room.

Without a path accesses wait, by default for as long as it takes. With `no_path_timeout` those that have
waited that long are answered with poison. While the device is full, or the intermediate client of a move is
away, only clean pages leave memory, and stored pages that can be read come in as far as the pool has room.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Final

from farpage.pager.eviction import Eviction
from farpage.pager.faults import Faults
from farpage.pager.space import Space, ends_with_client

SHORTEST_CHECK_SECONDS: Final = 0.05
LONGEST_CHECK_SECONDS: Final = 1.0


class Outage:
    """The outages of one client's volume; its methods are what the volume calls."""

    def __init__(
        self,
        space: Space,
        faults: Faults,
        eviction: Eviction,
        no_path_timeout_seconds: float | None,
        told: Callable[[], None],
    ) -> None:
        """`told` is called at each change of `without_path_seconds` from or to None, and of what waits."""
        self._space = space
        self._faults = faults
        self._eviction = eviction
        self._timeout = no_path_timeout_seconds
        self._told = told
        self._loop = asyncio.get_running_loop()
        self._since_seconds: float | None = None
        self._timer: asyncio.TimerHandle | None = None

    @property
    def without_path_seconds(self) -> float | None:
        """For how long no path has worked; None while one does."""
        return None if self._since_seconds is None else self._loop.time() - self._since_seconds

    @ends_with_client
    def no_path(self, none: bool) -> None:
        """No path is left that works, or one does again."""
        if none == (self._since_seconds is not None):
            return
        if none:
            self._since_seconds = self._loop.time()
            self._space.cut_off = self._space.volume.relayed
            self._watch()
        else:
            waited, self._since_seconds = self.without_path_seconds or 0.0, None
            self.cancel()
            if self._space.cut_off:
                self._space.cut_off = False
                self._eviction.wake()
                self._faults.admit()
            self._space.alarm(
                "path_back",
                f"a path works again after {waited:.1f} s; {self._faults.stalled} accesses that waited go on",
            )
        self._told()

    def _watch(self) -> None:
        if self._timeout is not None:
            pause = min(max(self._timeout / 10, SHORTEST_CHECK_SECONDS), LONGEST_CHECK_SECONDS)
            self._timer = self._loop.call_later(pause, self._check)

    @ends_with_client
    def _check(self) -> None:
        """Answer the accesses that have waited for too long, since when they began or the last path went."""
        assert self._timeout is not None
        if (self.without_path_seconds or 0.0) >= self._timeout:
            why = f"no path worked for {self._timeout:g} s"
            self._faults.give_up_waiting(self._loop.time() - self._timeout, why)
        self._watch()

    @ends_with_client
    def full(self, full: bool) -> None:
        """No device has room for page-outs, or one has again."""
        if full == self._space.full:
            return
        self._space.full = full
        if full:
            self._space.tier.clear()  # its room is for pages that cannot leave
            self._space.alarm(
                "device_full",
                "the device has no room for page-outs; pages stay in memory as far as the pool has room",
            )
        else:
            self._space.alarm("device_room", "the device has room for page-outs again")
            self._eviction.wake()
            self._faults.admit()
        self._told()

    def cancel(self) -> None:
        """Watch no more."""
        if self._timer:
            self._timer.cancel()
            self._timer = None
