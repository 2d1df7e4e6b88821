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
