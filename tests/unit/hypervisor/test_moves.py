"""What a control process has workers do to bring moves to their end, whatever the one before has done."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import Any, cast

import pytest

from farpage.api.client import ControlClient
from farpage.definition import moving, rules
from farpage.definition.model import Definition, Move, Redundancy, ReplicaState
from farpage.definition.moving import Claim, Route
from farpage.errors import Unreachable
from farpage.hypervisor.attached import Attached
from farpage.hypervisor.clients import Clients
from farpage.hypervisor.definitions import DefinitionKeeper
from farpage.hypervisor.intermediaries import Intermediaries
from farpage.hypervisor.moverecords import MoveRecords
from farpage.hypervisor.moves import Moves
from farpage.hypervisor.records import ClientRecords
from farpage.hypervisor.replacing import DeviceReplacements
from farpage.hypervisor.replicas import ClientReplicas
from farpage.hypervisor.vioses import Vios
from farpage.pager.messages import GoOver, ReplicaSpec
from tests.support.simulated_loop import run_simulated
from tests.unit.definition.test_definition_rules import MIB, A, C, defined, found

OWNER, PRINCIPAL = "00000000000000aa", "00000000000000cc"
CLAIM = Claim(OWNER, 0)
ROUTE = Route(source=C, source_vios="three", target=A, target_vios="one")


def resting_client() -> Definition:
    """Client vm1 on C, which VIOS two and three reach; VIOS one reaches A."""
    devices = defined(one=[found(A, "a")], two=[found(C, "c", 2 * MIB)], three=[found(C, "c", 2 * MIB)])
    definition = rules.add_client(
        devices, "vm1", memory_bytes=2 * MIB, hypervisor="host", redundancy=Redundancy.NONE
    )
    return rules.claim(definition, "vm1", OWNER, "host")


def moving_client() -> Definition:
    """The same on its way to A; the relay goes over three."""
    return moving.begin(resting_client(), "vm1", CLAIM, ROUTE, PRINCIPAL)


class StoringVios(Vios):
    """A VIOS that deletes volumes, and says nothing else."""

    def __init__(self, on_delete: Callable[[str], None]) -> None:
        self._on_delete = on_delete
        self.client = cast(ControlClient, self)
        self.devices = ()

    async def get(self, path: str, *_: object, **__: object) -> None:
        raise Unreachable("VIOS", path, "no answer", "start it")

    async def delete(self, path: str, *, params: dict[str, str]) -> None:
        self._on_delete(params["device"])


class Set:
    """A hypervisor with one attached client, whose worker says what it was asked."""

    def __init__(self, definition: Definition, *, reached: Sequence[str] = ("one", "two", "three")) -> None:
        self.current = definition
        self.unproven = False
        vioses: dict[str, Vios] = {name: StoringVios(self._deleted) for name in reached}
        self.records = ClientRecords("host", cast(DefinitionKeeper, self), vioses)
        self.unrecovered: dict[str, object] = {}
        self.refuses = 0
        """So often the worker cannot go over."""
        self.asked: list[GoOver] = []
        self.deleted: list[tuple[str, int]] = []
        """Devices whose volume was deleted, each with how often the worker had been asked by then."""
        self.attached: dict[str, Attached] = {}
        clients, keeper = cast(Clients, self), cast(DefinitionKeeper, self)
        self.move_records = MoveRecords(self.records, keeper, vioses)
        self.moves = Moves(
            clients,
            ClientReplicas(clients),
            keeper,
            self.move_records,
            intermediaries=cast(Intermediaries, self),
            replacements=cast(DeviceReplacements, self),
            alarm=lambda *_: None,
        )

    def attach(self, served: tuple[ReplicaSpec, ...]) -> None:
        """Have the client's worker use these replicas, whatever is stored for the next one."""
        record = SimpleNamespace(order=None, client="vm1")
        self.attached["vm1"] = cast(Attached, SimpleNamespace(record=record, served=served))

    # What the moves have to do with

    async def change(self, edit: Callable[[Definition], Definition]) -> Definition:
        self.current = edit(self.current)
        return self.current

    @asynccontextmanager
    async def only(self, client: str, what: str) -> AsyncIterator[None]:
        yield

    async def command(self, client: str, attached: object, method: str, order: Any) -> None:
        assert method == "go_over"
        self.asked.append(order)
        if self.refuses:
            self.refuses -= 1
            raise Unreachable("VIOS", "three", "no answer", "start it")

    def _deleted(self, device: str) -> None:
        self.deleted.append((device, len(self.asked)))

    def is_busy_with(self, client: str) -> bool:
        return False

    def can_run(self, move: Move) -> bool:
        return True

    def runs(self, client: str) -> bool:
        return False

    def problem(self, client: str) -> str:
        return ""

    async def stop(self, client: str) -> None:
        return None

    async def close(self) -> None:
        return None


def cancelled(*, refuses: int = 0, reached: Sequence[str] = ("one", "two", "three")) -> Set:
    """A control process that is started after another one has cancelled a move and done nothing more."""
    definition = moving_client()
    served = Set(definition).records.replicas("vm1", turn=0)
    found = Set(moving.cancel(definition, "vm1", CLAIM), reached=reached)
    found.refuses = refuses
    found.attach(served)
    return found


def drive(hypervisor: Set, seconds: float = 5.0) -> None:
    async def main() -> None:
        hypervisor.moves.drive()
        await asyncio.sleep(seconds)
        await hypervisor.moves.stop()

    run_simulated(main)


def states(definition: Definition) -> dict[str, ReplicaState]:
    return {replica.device: replica.state for replica in definition.clients["vm1"].volumes[0].replicas}


def test_after_a_crash_a_cancelled_client_goes_back_over_the_vios_that_its_relay_used() -> None:
    hypervisor = cancelled()
    drive(hypervisor)
    (order,) = hypervisor.asked
    assert (order.over, order.fences) == ("three", "one")
    assert [endpoint.vios for endpoint in order.replica.endpoints] == ["three"]
    assert states(hypervisor.current) == {C: ReplicaState.IN_SYNC}
    assert hypervisor.deleted == [(A, 1)]


def test_a_worker_is_told_of_the_vioses_that_reach_its_volume_and_that_it_does_not_use() -> None:
    for definition in (moving_client(), resting_client()):
        lasts = definition.vioses["two"].model_copy(update={"lease_seconds": 7.0})
        known = definition.model_copy(update={"vioses": {**definition.vioses, "two": lasts}})
        over = "" if definition.moves else "three"
        (replica,) = Set(known).records.replicas("vm1", turn=0, over=over)
        assert replica.others == (("two", 7.0),)


def test_what_is_on_the_target_of_a_cancelled_move_stays_until_the_worker_has_gone_back() -> None:
    hypervisor = cancelled(refuses=3)
    drive(hypervisor)
    assert hypervisor.deleted == [(A, 4)]


def test_a_vios_that_the_relay_used_and_that_is_out_of_reach_is_waited_for() -> None:
    hypervisor = cancelled(reached=("one", "two"))
    drive(hypervisor)
    assert hypervisor.asked == []
    assert states(hypervisor.current) == {C: ReplicaState.IN_SYNC, A: ReplicaState.RETIRED}


@pytest.mark.parametrize("refuses", [0, 2])
def test_a_finished_move_is_forgotten_when_the_worker_uses_the_target_alone(refuses: int) -> None:
    definition = moving_client()
    served = Set(definition).records.replicas("vm1", turn=0)
    hypervisor = Set(moving.finish(definition, "vm1", CLAIM))
    hypervisor.attach(served)
    hypervisor.refuses = refuses
    drive(hypervisor)
    assert len(hypervisor.asked) == refuses + 1
    assert hypervisor.asked[-1].replica.source == ""
    assert states(hypervisor.current) == {A: ReplicaState.IN_SYNC}
    assert hypervisor.current.moves == {}
