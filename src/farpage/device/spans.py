"""Order between changes to overlapping byte ranges, without threads that wait.

A change of a part of a block is done by reading, changing and writing the whole block. Another change
of the same block meanwhile, even of other bytes, would be undone by that. So such a change is
exclusive in its span of blocks; ordinary changes share theirs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial


def _nothing(token: int) -> None:
    pass


class _Change:
    """One change, waiting or under way."""

    __slots__ = ("blockers", "end", "exclusive", "give_way", "run", "start", "waiting")

    def __init__(
        self,
        start: int,
        end: int,
        exclusive: bool,
        run: Callable[[int], None],
        give_way: Callable[[], None] | None = None,
    ) -> None:
        self.start = start
        self.end = end
        self.exclusive = exclusive
        self.run = run
        self.give_way = give_way
        self.blockers = 0
        """How many earlier changes must end first."""
        self.waiting: list[int] = []
        """Later changes that this one blocks."""


class SpanGate:
    """Lets changes begin in their order of arrival where they conflict, at once where they do not."""

    def __init__(self) -> None:
        self._changes: dict[int, _Change] = {}
        self._exclusive = 0
        self._next_token = 0

    def enter(self, start: int, end: int, run: Callable[[int], None], *, exclusive: bool = False) -> None:
        """Call `run(token)` when nothing conflicting is under way; that may be at once."""
        token = self._next_token
        self._next_token += 1
        change = _Change(start, end, exclusive, run)
        if exclusive:
            self._exclusive += 1
        # Without an exclusive change anywhere nothing can conflict: the case of every paging client.
        if self._exclusive:
            for other in self._changes.values():
                if start < other.end and other.start < end and (exclusive or other.exclusive):
                    other.waiting.append(token)
                    change.blockers += 1
                    if other.give_way is not None:
                        other.give_way()
        self._changes[token] = change
        if not change.blockers:
            run(token)

    def share(self, give_way: Callable[[], None]) -> Callable[[], None] | None:
        """Let somebody make ordinary changes anywhere, unseen, until what is returned is called.

        None when an exclusive change is under way or waits. When one comes, `give_way` is called, maybe more
        than once: it is to end soon then.
        """
        if self._exclusive:
            return None
        token = self._next_token
        self._next_token += 1
        self._changes[token] = _Change(0, sys.maxsize, False, _nothing, give_way)
        return partial(self.leave, token)

    def leave(self, token: int) -> None:
        """End the change that was begun with `token`, and begin those that waited for it alone."""
        ended = self._changes.pop(token)
        if ended.exclusive:
            self._exclusive -= 1
        for waiting in ended.waiting:
            change = self._changes[waiting]
            change.blockers -= 1
            if not change.blockers:
                change.run(waiting)
