"""The states of a mirror's replicas as the definition keeps them: stored sooner, later, or nobody knows."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from farpage.definition.errors import NotTheOwner
from farpage.definition.model import ReplicaState
from farpage.errors import Unreachable
from farpage.volume.recorder import States
from tests.simulation.world import World


class SimulatedDefinition:
    """What is recorded of each replica, at VIOS of which one must be up to record more."""

    def __init__(self, world: World, devices: list[str], reachable: Callable[[], bool]) -> None:
        self.states: States = dict.fromkeys(devices, ReplicaState.IN_SYNC)
        self.on_attempt: Callable[[], None] = lambda: None
        """Called when an attempt to store something begins."""
        self.refuses: Callable[[], bool] = lambda: False
        """Whether the VIOS answer that another owner has claimed the client."""
        self._world = world
        self._reachable = reachable
        self._chance = world.random("definition")

    async def record(self, states: States) -> None:
        """Store states; an attempt that fails may be stored all the same.

        :raise Unreachable: no VIOS said that they are stored.
        :raise NotTheOwner: another owner has claimed the client.
        """
        chance = self._chance
        self.on_attempt()
        await asyncio.sleep(0.001 + chance.choice((0.0, 0.0, 0.05, 1.0)) * chance.random())
        if self.refuses():
            raise NotTheOwner("vm1", 0)
        fails = not self._reachable() or chance.random() < 0.05
        if self._reachable() and (not fails or chance.random() < 0.5):
            self._world.note("recorded " + ", ".join(f"{device} {state}" for device, state in states.items()))
            self.states.update(states)
            if ReplicaState.IN_SYNC not in self.states.values():
                self._world.violated("no replica is recorded in sync")
        await asyncio.sleep(0.001)
        if fails:
            raise Unreachable("VIOS", "definition", "no answer", "start one")


class KeptDefinition(SimulatedDefinition):
    """What control processes, one after the other, find and change, one change at a time.

    A change that no VIOS has acknowledged may be stored at one all the same. While the control process that
    made it lives, the next change goes before it; another control process may find it.
    """

    def __init__(self, world: World, devices: list[str], reachable: Callable[[], bool]) -> None:
        super().__init__(world, devices, reachable)
        self._attempted: States | None = None

    def found_again(self) -> None:
        """Let another control process find it."""
        attempted, self._attempted = self._attempted, None
        if attempted is not None and self._chance.random() < 0.5:
            self._keep(attempted)

    async def change(self, edit: Callable[[States], States]) -> None:
        """Store what `edit` makes of it; for callers who hold each other off.

        :raise Unreachable: no VIOS said that it is stored.
        """
        changed = edit(dict(self.states))
        if changed == self.states and self._attempted is None:
            return
        self.on_attempt()
        self._attempted = changed
        await asyncio.sleep(0.001 + self._chance.choice((0.0, 0.0, 0.05, 1.0, 4.0)) * self._chance.random())
        if not self._reachable() or self._chance.random() < 0.05:
            await asyncio.sleep(0.001)
            raise Unreachable("VIOS", "definition", "no answer", "start one")
        self._attempted = None
        self._keep(changed)
        await asyncio.sleep(0.001)

    def _keep(self, states: States) -> None:
        self._world.note("defined " + ", ".join(f"{device} {state}" for device, state in states.items()))
        self.states = states
        if ReplicaState.IN_SYNC not in states.values():
            self._world.violated("no replica is recorded in sync")
