"""Whoever used a volume before: may a server still carry out what it was sent then? Pure.

An owner that begins - a new one, or a worker in the place of one that was killed - knows nothing of the
commands of its predecessors. A server has none of them left

- when it has accepted the epoch of this owner: before that it lets its older commands finish;
- or when a lease, with its margin, has passed since the first server accepted that epoch. From then on the
  epoch is on the device, where every server looks for it before it looks at the lease and then calls the
  kernel. So what another server may still carry out is a command that had looked for the epoch before, and
  was held up together with its process: that finds its lease over, which nobody has renewed meanwhile.
"""

from __future__ import annotations

from collections.abc import Sequence

from farpage.volume.lease import MARGIN
from farpage.volume.link import PathLink


class Predecessors:
    """Those of the owner who opens a volume over some paths, first under `epoch`."""

    def __init__(self, links: Sequence[PathLink], epoch: int) -> None:
        self._links = links
        self._epoch = epoch
        self._accepted_seconds: float | None = None
        self._drained: set[str] = set()
        self._gone = False

    def accepted(self, now_seconds: float) -> None:
        """A server has accepted the owner's epoch."""
        if self._accepted_seconds is None:
            self._accepted_seconds = now_seconds

    def drained(self, vios: str) -> None:
        """Whatever reaches that server now comes behind what it was sent before: a relay is opened there."""
        self._drained.add(vios)

    def gone(self, now_seconds: float) -> bool:
        """Tell whether no server can carry out an older command any more."""
        if not self._gone:
            left = [
                link
                for link in self._links
                if link.epoch < self._epoch and link.endpoint.vios not in self._drained
            ]
            accepted = self._accepted_seconds
            self._gone = not left or (
                accepted is not None and all(_is_over(link, now_seconds - accepted) for link in left)
            )
        return self._gone


def _is_over(link: PathLink, waited_seconds: float) -> bool:
    lease = link.endpoint.lease_seconds
    return lease is not None and waited_seconds > lease * (1 + MARGIN)
