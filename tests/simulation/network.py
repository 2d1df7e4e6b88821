"""Connections between processes: delays, in order each way; cut, half-open, and through partitions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

from tests.simulation.world import Process, Turn, Work, World

USUAL_SECONDS = 0.0003
Message = Callable[[], None]


class Network:
    """How far a message is, and which ways are blocked."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.chance = world.random("network")
        self.slow = 0.02
        """Share of messages that take much longer."""
        self.blocked: set[tuple[str, str]] = set()
        """Ways (from, to) on which nothing arrives; what is sent meanwhile arrives later."""
        self.pipes: list[Pipe] = []

    def delay_seconds(self) -> float:
        """Draw how long a message takes."""
        chance = self.chance.random()
        if chance >= self.slow:
            return USUAL_SECONDS * (0.2 + chance)
        return 0.001 + 0.2 * self.chance.random() ** 3

    def heal(self, ways: Iterable[tuple[str, str]] | None = None) -> None:
        """Let everything through again, on all ways or some."""
        self.blocked.difference_update(list(self.blocked) if ways is None else ways)
        for pipe in list(self.pipes):
            pipe.flush()


class Pipe:
    """A connection of a client process with a server process, below what they say to each other."""

    def __init__(self, network: Network, client: Process, server: Process, *, client_host: str) -> None:
        self._network = network
        self.client = client
        self.server = server
        names = {client: client_host, server: server.name}
        self._ways = {client: (names[server], names[client]), server: (names[client], names[server])}
        self.on_end: dict[Process, Message] = {}
        """What each side does when the other has closed, or the connection is broken."""
        self.closed: set[Process] = set()
        self._last = {client: 0.0, server: 0.0}
        self._held: list[tuple[Process, Message]] = []
        network.pipes.append(self)
        for side in (client, server):
            side.on_killed.append(partial(self.close, side))

    def other(self, side: Process) -> Process:
        """Return the process at the other end."""
        return self.server if side is self.client else self.client

    def send(self, to: Process, message: Message) -> None:
        """Deliver a message in its order, if the connection holds till then."""
        network = self._network
        if self._ways[to] in network.blocked:
            self._held.append((to, message))
            return
        world = network.world
        arrival = max(world.now_seconds + network.delay_seconds(), self._last[to])
        self._last[to] = arrival
        world.at(arrival, None, Work(partial(self._deliver, to, message)))

    def _deliver(self, to: Process, message: Message) -> None:
        if self._ways[to] in self._network.blocked:
            self._held.append((to, message))
        elif to.alive:
            self._network.world.let(to, Turn(to.loop, self._receive, (to, message)))
        else:
            self.reset(self.other(to))

    def _receive(self, to: Process, message: Message) -> None:
        if to not in self.closed:
            message()

    def close(self, side: Process) -> None:
        """Close one end: the other learns of it after what was sent before."""
        if side not in self.closed:
            self.closed.add(side)
            other = self.other(side)
            if other.alive:
                self.send(other, lambda: self._ended(other))
            self._forget()

    def reset(self, side: Process) -> None:
        """Tell one side that the connection is broken."""
        if side.alive and side not in self.closed:
            self.send(side, lambda: self._ended(side))

    def _ended(self, side: Process) -> None:
        if side not in self.closed and side in self.on_end:
            self.on_end[side]()

    def flush(self) -> None:
        """Send what was held back on ways that are open again."""
        held, self._held = self._held, []
        for to, message in held:
            self.send(to, message)

    def _forget(self) -> None:
        if len(self.closed) == 2 and self in self._network.pipes:
            self._network.pipes.remove(self)
