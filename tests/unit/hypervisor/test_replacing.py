"""Several clients are moved to another device at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest

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
        self.run = SimpleNamespace(record=lambda client: None)
        self.unproven = None
        self.records = self
        self.copying: set[str] = set()
        self.volumes: set[str] = set()
        """Clients with a volume on the new device."""
        self.using: set[str] = set(NAMES)
        """Clients whose worker uses the old device."""
        device = SimpleNamespace
        self.current = SimpleNamespace(
            clients=self.states, devices={"old": device(name="old"), "new": device(name="new")}
        )
        self.replacements = DeviceReplacements(
            cast(Clients, self), cast(ClientReplicas, self), cast(DefinitionKeeper, self), self.alarm
        )

    def alarm(self, client: str, kind: str, message: str) -> None:
        assert kind in ("device_replaced", "client_moved")

    def plan_replacement(self, old: str, new: str, only: str | None = None) -> tuple[str, str, list[str]]:
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
        self.volumes.add(client)

    async def add(self, client: str, attached: object, device: str) -> None:
        assert client in self.volumes
        self.copying.add(client)

    async def retire(self, client: str, attached: object, device: str) -> None:
        self.states[client][device] = ReplicaState.RETIRED
        self.using.discard(client)

    async def remove_retired(self, client: str, device: str) -> None:
        assert client not in self.using or client not in self.attached
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


@pytest.mark.parametrize("attached", [True, False])
def test_a_retired_replica_stays_while_a_worker_may_use_it(attached: bool) -> None:
    async def main() -> None:
        clients = Set()
        name = NAMES[0]
        clients.current.clients = {name: None}
        # As a control process leaves it that dies before the worker has heard that this is recorded.
        clients.states[name] = {"old": ReplicaState.RETIRED, "new": ReplicaState.IN_SYNC}
        if not attached:
            clients.attached = {}
        await clients.replacements.start_one(name, "old", "new")
        while clients.replacements.is_busy_with(name):
            await asyncio.sleep(0.1)
        assert clients.states[name] == {"new": ReplicaState.IN_SYNC}

    run_simulated(main)


def test_a_replacement_cut_short_before_there_was_a_volume_makes_it() -> None:
    async def main() -> None:
        clients = Set()
        name = NAMES[0]
        clients.states[name]["new"] = ReplicaState.STALE
        await clients.replacements.start_one(name, "old", "new")
        while name not in clients.copying:
            await asyncio.sleep(0.1)
        clients.copied(name)
        while clients.replacements.is_busy_with(name):
            await asyncio.sleep(0.1)
        assert clients.states[name] == {"new": ReplicaState.IN_SYNC}

    run_simulated(main)
