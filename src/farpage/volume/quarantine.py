"""The writes of failed servers: kept with their data until no server can carry them out any more."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from farpage.volume.command import Command
from farpage.volume.link import Held, PathLink


class Quarantine:
    """What the paths of one volume hold back."""

    def __init__(
        self,
        links: Sequence[PathLink],
        replay: Callable[[list[Command]], None],
        empty: Callable[[], None],
    ) -> None:
        """`replay` gets the writes of a fenced server; `empty` is called when nothing is held any more."""
        self._links = links
        self._replay = replay
        self._empty = empty
        self.bytes = 0

    def __bool__(self) -> bool:
        """Tell whether a failed server can still carry something out."""
        return any(path.held for path in self._links)

    def admit(self, path: PathLink, writes: list[Command]) -> list[Command]:
        """Hold the writes of a path that fails; returns those that may be repeated at once."""
        repeated = path.hold(writes, self._release)
        if not repeated:
            self.bytes += sum(command.length_bytes for command in writes)
        return repeated

    def opened(self, path: PathLink) -> None:
        """Replay what a path's server had under an older epoch than the one that it is open under now."""
        for earlier in self._links:
            if earlier.place == path.place:
                for held in list(earlier.held):
                    if held.epoch < path.epoch:
                        self._release(earlier, held)

    def _release(self, path: PathLink, held: Held) -> None:
        """Replay held writes: the server that had them is fenced."""
        if held in path.held:
            path.forget(held)
            self.bytes -= sum(command.length_bytes for command in held.commands)
            self._replay(held.commands)
            if not self:
                self._empty()

    def release_all(self, path: PathLink) -> list[Command]:
        """Return every write of a path that is held, for the caller to repeat: the server is fenced."""
        left: list[Command] = []
        for held in list(path.held):
            path.forget(held)
            self.bytes -= sum(command.length_bytes for command in held.commands)
            left += held.commands
        return left

    def commands(self) -> list[Command]:
        """Return the writes that are held."""
        return [command for path in self._links for held in path.held for command in held.commands]

    def take(self) -> list[Command]:
        """Take the writes out, without ending them; their servers are watched on."""
        left = self.commands()
        for path in self._links:
            for held in path.held:
                held.commands.clear()
        self.bytes = 0
        return left
