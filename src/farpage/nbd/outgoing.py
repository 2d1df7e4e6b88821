"""Bytes on their way to a socket that must never block.

Replies are written straight into one area and leave in one send. Only what does not fit, because the other
end reads slowly or a payload is large, goes to a queue behind the area.
"""

from __future__ import annotations

import socket
from collections import deque
from typing import Final

AREA_BYTES: Final = 512 << 10
"""Room for the answers to a whole receive buffer of 4 KiB reads at queue depth 64, twice over."""
DIRECT_MIN_BYTES: Final = 64 << 10
"""Payloads from this size on are sent from where they are, if the socket takes them now."""
UNIX_SEND_BYTES: Final = 1 << 20
"""Send buffer of a UNIX socket: it does not grow by itself as TCP's do, and each time that it is full costs
both ends a wake-up. The kernel gives at most net.core.wmem_max (socket(7))."""
_SEGMENTS_MAX: Final = 64


class Outgoing:
    """An area of bytes to send and the queue of what comes after it.

    The server's hot path writes into `area` itself: it makes sure of the room first and then moves `end`.
    """

    __slots__ = ("_queue", "_socket", "area", "end", "queued_bytes", "start", "view")

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self.area = bytearray(AREA_BYTES)
        self.view = memoryview(self.area)
        self.start = 0
        self.end = 0
        self._queue: deque[memoryview] = deque()
        self.queued_bytes = 0
        """Bytes behind the area; while there are any, nothing may be added to the area."""

    def __bool__(self) -> bool:
        """Whether anything is left to send."""
        return self.end > self.start or self.queued_bytes > 0

    def room(self, length: int) -> bool:
        """Whether the area takes `length` bytes now."""
        return not self.queued_bytes and self.end + length <= AREA_BYTES

    def add(self, data: bytes | memoryview) -> None:
        """Send a copy of `data` later."""
        length = len(data)
        if self.room(length):
            self.area[self.end : self.end + length] = data
            self.end += length
        else:
            self._queue.append(memoryview(bytes(data)))
            self.queued_bytes += length

    def add_payload(self, header: bytes, payload: memoryview) -> None:
        """Send header and payload; what the socket does not take at once is copied.

        :raise OSError: when the connection is broken.
        """
        if len(payload) >= DIRECT_MIN_BYTES and self.push():
            try:
                sent = self._socket.sendmsg((header, payload))
            except BlockingIOError:
                sent = 0
            if sent < len(header):
                self.add(header[sent:])
                sent = len(header)
            payload = payload[sent - len(header) :]
            if not payload:
                return
        else:
            self.add(header)
        self.add(payload)

    def push(self) -> bool:
        """Send what the socket takes; return whether nothing is left.

        :raise OSError: when the connection is broken.
        """
        try:
            if self.end > self.start:
                self.start += self._socket.send(self.view[self.start : self.end])
                if self.start < self.end:
                    return False
                self.start = self.end = 0
            while self._queue:
                segments = [self._queue[i] for i in range(min(len(self._queue), _SEGMENTS_MAX))]
                self._drop(self._socket.sendmsg(segments))
        except BlockingIOError:
            return False
        return True

    def clear(self) -> None:
        """Forget everything."""
        self.start = self.end = self.queued_bytes = 0
        self._queue.clear()

    def _drop(self, sent: int) -> None:
        self.queued_bytes -= sent
        while sent:
            first = self._queue[0]
            if sent < len(first):
                self._queue[0] = first[sent:]
                return
            sent -= len(first)
            self._queue.popleft()
