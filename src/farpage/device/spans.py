"""Order between changes to overlapping byte ranges, without threads that wait.

A change of a part of a block is done by reading, changing and writing the whole block. Another change
of the same block meanwhile, even of other bytes, would be undone by that. So such a change is
exclusive in its span of blocks; ordinary changes share theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class _Waiting:
    token: int
    start: int
    end: int
    exclusive: bool
    run: Callable[[int], None]


class SpanGate:
    """Lets changes begin in their order of arrival where they conflict, at once where they do not."""

    def __init__(self) -> None:
        self._active: dict[int, tuple[int, int, bool]] = {}
        self._waiting: list[_Waiting] = []
        self._exclusive = 0
        self._next_token = 0

    def enter(self, start: int, end: int, run: Callable[[int], None], *, exclusive: bool = False) -> None:
        """Call `run(token)` when nothing conflicting is under way; that may be at once."""
        token = self._next_token
        self._next_token += 1
        if exclusive:
            self._exclusive += 1
        # Without an exclusive change anywhere nothing can conflict: the case of every paging client.
        if self._exclusive and self._conflicts(start, end, exclusive, self._waiting):
            self._waiting.append(_Waiting(token, start, end, exclusive, run))
            return
        self._active[token] = (start, end, exclusive)
        run(token)

    def leave(self, token: int) -> None:
        """End the change that was begun with `token`, and begin those that waited for it."""
        _start, _end, exclusive = self._active.pop(token)
        if exclusive:
            self._exclusive -= 1
        if not self._waiting:
            return
        ready: list[_Waiting] = []
        still: list[_Waiting] = []
        for entry in self._waiting:
            if self._conflicts(entry.start, entry.end, entry.exclusive, still):
                still.append(entry)
            else:
                self._active[entry.token] = (entry.start, entry.end, entry.exclusive)
                ready.append(entry)
        self._waiting = still
        for entry in ready:
            entry.run(entry.token)

    def _conflicts(self, start: int, end: int, exclusive: bool, ahead: list[_Waiting]) -> bool:
        for other_start, other_end, other_exclusive in self._active.values():
            if start < other_end and other_start < end and (exclusive or other_exclusive):
                return True
        return any(
            start < other.end and other.start < end and (exclusive or other.exclusive) for other in ahead
        )
