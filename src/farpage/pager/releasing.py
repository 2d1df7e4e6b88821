"""A client that is to go to another hypervisor: frozen, and everything of it paged out.

Frozen means that no access is answered any more: whoever touches a page that is not in memory, or writes to
one that is protected, waits. So the work comes to an end also when the client runs, and at that end the table
is true and stays true: a page that is out changes only through a fault that somebody answers. The memory
stays registered throughout, also when the pager lets go of it: what waits goes on waiting, and never reads
zeros.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final

from farpage.errors import ExitStatus, FarpageError
from farpage.nbd import eventloop
from farpage.pager.eviction import Eviction
from farpage.pager.faults import Faults
from farpage.pager.outage import Outage
from farpage.pager.space import Space
from farpage.pager.states import READING

LOOK_SECONDS: Final = 0.002
PATIENCE_SECONDS: Final = 10.0
"""So long a release waits for a path; a client that is not released is of more use running."""

STANDSTILL_SECONDS: Final = 30.0
"""So long it waits for any page to leave: some wait for a server that is to be fenced."""


@dataclass(eq=False)
class NotPagedOut(FarpageError):
    """Not every page can be brought to the device."""

    code = "not_paged_out"
    template = "client {client!r} cannot be released now: {problem}; it goes on where it is"
    remedy = "{hint}"
    exit_status = ExitStatus.CONFLICT
    client: str
    problem: str
    hint: str


def without_path(client: str) -> NotPagedOut:
    """Return the error for a client none of whose paths works."""
    hint = "see 'farpage path list', and start what is missing"
    return NotPagedOut(client, "no path to its volume works", hint)


class Freeze:
    """Stops the answers to one client's accesses, pages it out, and takes that back."""

    def __init__(self, space: Space, faults: Faults, eviction: Eviction, outage: Outage) -> None:
        self._space = space
        self._faults = faults
        self._eviction = eviction
        self._outage = outage
        self._loop = asyncio.get_running_loop()

    @property
    def frozen(self) -> bool:
        """Whether accesses wait."""
        return self._faults.frozen

    def begin(self) -> None:
        """Answer no access from now on."""
        if not self._faults.frozen:
            self._faults.frozen = True
            eventloop.remove_reader(self._loop, self._space.memory.fileno())
            if self._space.short is not None:
                self._space.short.ask_all()

    def end(self) -> None:
        """Answer accesses again, also those that have waited.

        :raise ClientGone: the client has exited.
        """
        if self._faults.frozen:
            self._faults.frozen = False
            self._eviction.drain(on=False)
            eventloop.add_reader(self._loop, self._space.memory.fileno(), self._faults.on_events)
            # Events that were put off are dropped: who waits shall ask again.
            self._space.memory.wake(0, self._space.table.pages)
            self._faults.admit()

    async def page_out(self, client: str) -> bool:
        """Bring every page to the volume; false when the client has exited meanwhile.

        :raise NotPagedOut: there is no way to do that at the moment.
        """
        self._eviction.drain(on=True)
        before, since_seconds = self._left, self._loop.time()
        while left := self._left:
            if left != before:
                before, since_seconds = left, self._loop.time()
            if problem := self._problem(client, left, self._loop.time() - since_seconds):
                raise problem
            self._eviction.wake()
            await asyncio.sleep(LOOK_SECONDS)
            if not self.frozen and not self._space.closed:
                # By a control process that does not know of it: accesses have been answered since.
                raise NotPagedOut(client, "it was let go on meanwhile", "release it once more")
        return not self._space.closed  # its table is empty then

    @property
    def _left(self) -> int:
        """Pages in memory, on their way out of it or into it."""
        return self._space.table.resident + self._space.table.counts[READING]

    def _problem(self, client: str, left: int, standstill_seconds: float) -> NotPagedOut | None:
        space = self._space
        if reason := space.volume.ownership.fenced:
            return NotPagedOut(client, reason, "ask the hypervisor that has the client now")
        if space.full:
            return NotPagedOut(client, "its device has no room", "make room on the device, then try again")
        if (self._outage.without_path_seconds or 0.0) > PATIENCE_SECONDS:
            return without_path(client)
        if standstill_seconds > STANDSTILL_SECONDS:
            hint = "see 'farpage path list': start the VIOS that hangs, or end its process"
            return NotPagedOut(client, f"no page has left for a while, and {left} are to", hint)
        return None
