"""A connection's way over to its lane (lane.py) and back, and how long it stays in the event loop in between.

To go over and to come back costs two wake-ups. So a connection that came back stays in the loop until enough
requests in a row were for the lane, and for longer each time when it was there for few.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple

from farpage.blockio import FileBacked
from farpage.nbd import protocol as p
from farpage.nbd.directpath import READ_MAX_BYTES, WRITE_MAX_BYTES
from farpage.nbd.export import Export
from farpage.nbd.fastpath import Settings
from farpage.nbd.lane import Lane, open_lane

_LEAST_STAY_REQUESTS: Final = 64
_LONGEST_STAY_REQUESTS: Final = 1 << 16
"""A connection that came back from its lane stays in the loop until so many requests in a row were for it."""


class Held(NamedTuple):
    """What a connection has in its receive buffer and its outgoing area when it comes back."""

    input_start: int
    input_end: int
    output_start: int
    output_end: int


class Crossing:
    """One connection's way over to its lane and back; used by the event loop."""

    def __init__(
        self,
        export: Export,
        socket: int,
        buffers: tuple[bytearray, bytearray],
        settings: Settings,
        on_back: Callable[[Held | None], None],
    ) -> None:
        """Prepare for a connection with this receive buffer and outgoing area; no lane is made yet.

        `on_back` is called in the loop after each `enter` that succeeded, when the connection is the loop's
        again; with None when nobody knows its state.
        """
        self.suited_requests = 0
        """Requests in a row that the lane would have served; the loop counts them."""
        self._export = export
        self._socket = socket
        self._buffers = buffers
        self._settings = settings
        self._on_back = on_back
        self._possible = isinstance(export.io, FileBacked)
        self._lane: Lane | None = None
        self._stay_requests = 0
        self._entered_at = 0

    @property
    def in_lane(self) -> bool:
        """Whether the connection is in the lane's hands."""
        return self._lane is not None and self._lane.entered

    @property
    def in_flight(self) -> int:
        """Requests of the lane that the device has not ended. Safe to look at from any thread."""
        lane = self._lane
        return lane.fast.in_flight if lane is not None and lane.entered else 0

    @property
    def worthwhile(self) -> bool:
        """Whether what is asked for suits a lane, and has for long enough."""
        return self._possible and self.suited_requests >= self._stay_requests

    def suits(self, command: int, length: int) -> bool:
        """Tell whether the lane would have served a command that was not answered at once."""
        lane = self._lane
        if lane is not None and lane.direct:
            if command == p.NBD_CMD_READ:
                return length <= READ_MAX_BYTES
            if not lane.writes:
                return False
        return command == p.NBD_CMD_WRITE and length <= WRITE_MAX_BYTES

    def enter(self, input_start: int, input_end: int, read_max_bytes: int) -> bool:
        """Hand the connection over, with the bounds of what it has received and nothing to send.

        Longer READs than `read_max_bytes` come back. False when there is no lane to be had, or when somebody
        needs the file to himself: then the connection is still the loop's.
        """
        lane = self._lane or self._open()
        if lane is None:
            return False
        fast = lane.fast
        fast.input_start, fast.input_end = input_start, input_end
        fast.output_start = fast.output_end = 0
        fast.read_max_bytes = read_max_bytes
        self._entered_at = fast.served
        return lane.enter()

    def stop(self) -> None:
        """Have the connection back as soon as what is being carried out has ended, if the lane has it."""
        if self._lane is not None and self._lane.entered:
            self._lane.stop()

    def close(self) -> None:
        """Let go of the lane, which has nothing in its hands."""
        if self._lane is not None:
            self._lane.close()
            self._lane = None

    def _open(self) -> Lane | None:
        export = self._export
        self._lane = open_lane(
            export.io, self._socket, self._buffers, export.counters, self._back, settings=self._settings
        )
        if self._lane is None:
            self._stay_requests = max(2 * self._stay_requests, _LONGEST_STAY_REQUESTS)
        return self._lane

    def _back(self) -> None:
        lane = self._lane
        assert lane is not None
        if lane.failed:
            self._on_back(None)
            return
        fast = lane.fast
        soon = fast.served - self._entered_at < _LEAST_STAY_REQUESTS
        longer = min(2 * self._stay_requests, _LONGEST_STAY_REQUESTS) if soon else 0
        self._stay_requests = max(longer, _LEAST_STAY_REQUESTS)
        self.suited_requests = 0
        self._on_back(Held(fast.input_start, fast.input_end, fast.output_start, fast.output_end))
