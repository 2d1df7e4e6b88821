"""Whoever used a volume before: may a server still carry out what it was sent then? Pure.

An owner that begins - a new one, or a worker in the place of one that was killed - knows nothing of the
commands of its predecessors. A server has none of them left

- when it has accepted the epoch of this owner: before that it lets its older commands finish;
- or when a lease, with its margin, has passed since the epoch is on the device, where every server looks for
  it before it looks at the lease and then calls the kernel. So what another server may still carry out is a
  command that had looked for the epoch before, and was held up together with its process: that finds its
  lease over, which nobody has renewed meanwhile.

The first server that accepts the epoch puts it on its device. Of a volume that is being moved that is the
target; on the source, where the predecessors have written, it is when something that goes over the relay has
come back: the source's server has then let the relay in under it.
"""

from __future__ import annotations

from collections.abc import Sequence

from farpage.volume.lease import MARGIN
from farpage.volume.link import PathLink


class Predecessors:
    """Those of the owner who opens a volume over some paths."""

    def __init__(self, links: Sequence[PathLink]) -> None:
        self._left: dict[tuple[str, str], float | None] = {}
        """Servers that may have something left, each with its device, and how long their leases last."""
        for link in links:
            end = link.endpoint
            self._left |= {(vios, end.source or link.device): lease for vios, lease in end.others}
        self._left |= {(link.endpoint.vios, link.device): link.endpoint.lease_seconds for link in links}
        self._marked_seconds: float | None = None

    def opened(self, link: PathLink, now_seconds: float) -> None:
        """A server has accepted the owner's epoch."""
        self._left.pop((link.endpoint.vios, link.device), None)
        if not link.endpoint.source:
            self.marked(now_seconds)

    def marked(self, now_seconds: float) -> None:
        """The owner's epoch is on the device that the predecessors have written to."""
        if self._marked_seconds is None:
            self._marked_seconds = now_seconds

    def drained(self, vios: str) -> None:
        """Whatever reaches that server now comes behind what it was sent before: a relay is opened there."""
        self._left = {place: lease for place, lease in self._left.items() if place[0] != vios}

    def only(self, device: str) -> None:
        """What other devices hold counts no more."""
        self._left = {place: lease for place, lease in self._left.items() if place[1] == device}

    def gone(self, now_seconds: float) -> bool:
        """Tell whether no server can carry out an older command any more."""
        marked = self._marked_seconds
        if marked is not None:
            waited = now_seconds - marked
            self._left = {place: lease for place, lease in self._left.items() if not _is_over(lease, waited)}
        return not self._left


def _is_over(lease_seconds: float | None, waited_seconds: float) -> bool:
    return lease_seconds is not None and waited_seconds > lease_seconds * (1 + MARGIN)
