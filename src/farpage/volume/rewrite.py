"""Keeps writes behind the repair of the same pages: NBD gives no order between commands in flight. No I/O."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

Start: TypeAlias = Callable[[], None]


@dataclass(eq=False)
class Rewrite:
    """A repair under way, and the writes that wait for it."""

    begin: int
    end: int
    behind: list[tuple[int, int, Start]] = field(default_factory=list)


class RewriteGate:
    """The repairs of one replica; empty nearly always, so a write asks `active` first."""

    def __init__(self) -> None:
        self._rewrites: list[Rewrite] = []

    @property
    def active(self) -> bool:
        """Whether a repair is under way."""
        return bool(self._rewrites)

    def enter(self, offset: int, length: int) -> Rewrite:
        """Begin a repair; the caller has no other command for its range in flight."""
        rewrite = Rewrite(offset, offset + length)
        self._rewrites.append(rewrite)
        return rewrite

    def leave(self, rewrite: Rewrite) -> None:
        """End a repair, and start what waited for it and for no other one."""
        if rewrite not in self._rewrites:
            return
        self._rewrites.remove(rewrite)
        for offset, length, start in rewrite.behind:
            self.pass_or_wait(offset, length, start)

    def pass_or_wait(self, offset: int, length: int, start: Start) -> None:
        """Start a write now, or when the repairs that it overlaps are done."""
        for rewrite in self._rewrites:
            if rewrite.begin < offset + length and offset < rewrite.end:
                rewrite.behind.append((offset, length, start))
                return
        start()
