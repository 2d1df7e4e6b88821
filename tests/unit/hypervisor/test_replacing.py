"""Several clients are moved to another device at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

from farpage.definition.model import ReplicaState
from farpage.hypervisor.clients import Clients
from farpage.hypervisor.definitions import DefinitionKeeper
from farpage.hypervisor.replacing import AT_ONCE, DeviceReplacements
from farpage.hypervisor.replicas import ClientReplicas
from tests.support.simulated_loop import run_simulated

NAMES = [f"vm{number}" for number in range(AT_ONCE + 2)]


class Set:
    """Attached clients with one replica each, whose copies end when they are told to."""

    def __init__(self) -> None:
        self.hypervisor = "host"
        self.states: dict[str, dict[str, ReplicaState]] = {
            name: {"old": ReplicaState.IN_SYNC} for name in NAMES
        }
        self.attached = {name: object() for name in NAMES}
        self.unrecovered: dict[str, object] = {}
        self.records = self
        self.copying: set[str] = set()
        device = SimpleNamespace
        self.current = SimpleNamespace(
            clients=self.states, devices={"old": device(name="old"), "new": device(name="new")}
        )
        self.replacements = DeviceReplacements(
            cast(Clients, self), cast(ClientReplicas, self), cast(DefinitionKeeper, self), self.alarm
        )

    def alarm(self, client: str, kind: str, message: str) -> None:
        assert kind == "device_replaced"

    def plan_replacement(self, old: str, new: str) -> tuple[str, str, list[str]]:
        return old, new, NAMES

    def replica_states(self, client: str) -> dict[str, ReplicaState]:
        return self.states[client]

    def of(self, client: str) -> Any:
        return SimpleNamespace(hypervisor="host", epoch=1)

    @asynccontextmanager
    async def only(self, client: str, what: str) -> AsyncIterator[None]:
        yield

    async def report(self, client: str) -> None:
        return None

    async def begin_replacing(self, client: str, new: str) -> None:
        self.states[client][new] = ReplicaState.STALE

    async def add(self, client: str, attached: object, device: str) -> None:
        self.copying.add(client)

    async def retire(self, client: str, attached: object, device: str) -> None:
        self.states[client][device] = ReplicaState.RETIRED

    async def remove_retired(self, client: str, device: str) -> None:
        del self.states[client][device]

    def copied(self, client: str) -> None:
        self.copying.discard(client)
        self.states[client]["new"] = ReplicaState.IN_SYNC

    def left(self) -> tuple[str, ...]:
        (left,) = self.replacements.left()
        return left.clients


def test_a_client_whose_copy_waits_does_not_hold_up_the_others() -> None:
    async def main() -> None:
        clients = Set()
        await clients.replacements.start("old", "new")
        first = NAMES[0]
        while clients.left() != (first,):
            await asyncio.sleep(0.1)
            for client in clients.copying - {first}:
                clients.copied(client)
        clients.copied(first)
        while clients.left():
            await asyncio.sleep(0.1)

    run_simulated(main)


def test_no_more_than_so_many_are_moved_at_a_time() -> None:
    async def main() -> None:
        clients = Set()
        await clients.replacements.start("old", "new")
        await asyncio.sleep(5)
        assert clients.copying == set(NAMES[:AT_ONCE])
        clients.copied(NAMES[1])
        await asyncio.sleep(5)
        assert clients.copying == {NAMES[0], *NAMES[2 : AT_ONCE + 1]}
        assert clients.left() == (NAMES[0], *NAMES[2:])
        await clients.replacements.stop()

    run_simulated(main)
