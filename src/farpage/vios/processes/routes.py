"""Which data process a volume belongs to. Pure.

A volume belongs to one process from when it is first asked for until it is deleted, so what must not be split
- claims, fencing, drains, fairness, what a copying volume shares - stays within one process.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager


class Routes:
    """The table of one front. A process that is started in a lost one's place has its number."""

    def __init__(self, processes: int) -> None:
        self._volumes = [0] * processes
        self._process: dict[str, int] = {}
        self._uses: Counter[str] = Counter()

    def __contains__(self, volume: str) -> bool:
        return volume in self._process

    def of(self, volume: str) -> int:
        """Return a volume's process; one that has none yet gets the one with the fewest volumes."""
        if volume not in self._process:
            index = self._volumes.index(min(self._volumes))
            self._volumes[index] += 1
            self._process[volume] = index
        return self._process[volume]

    @contextmanager
    def using(self, volume: str) -> Iterator[int]:
        """Keep a volume where it is while its process is asked something about it."""
        self._uses[volume] += 1
        try:
            yield self.of(volume)
        finally:
            self._uses[volume] -= 1
            if not self._uses[volume]:
                del self._uses[volume]

    def deleted(self, volume: str) -> None:
        """Forget a volume that nobody has open, unless its process is asked something else about it now.

        Called by one who is `using` it. One of the same name that is made later may go to another process.
        """
        if self._uses[volume] == 1 and volume in self._process:
            self._volumes[self._process.pop(volume)] -= 1
