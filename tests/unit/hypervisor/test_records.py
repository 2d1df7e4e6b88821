from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import cast

import pytest

from farpage.definition import rules
from farpage.definition.model import Definition
from farpage.hypervisor.definitions import DefinitionKeeper, NoVios
from farpage.hypervisor.errors import ClientElsewhere
from farpage.hypervisor.records import ClientRecords
from farpage.pager.messages import EpochRaised
from tests.unit.definition.test_definition_rules import MIB, A, defined, found


class Keeper:
    """One copy of the definition, that every change is stored in."""

    def __init__(self) -> None:
        definition = defined(one=[found(A, "a")])
        self.current = rules.add_client(definition, "vm1", memory_bytes=MIB, hypervisor="host")

    async def change(self, edit: Callable[[Definition], Definition]) -> Definition:
        self.current = edit(self.current)
        return self.current


@pytest.fixture
def keeper() -> Keeper:
    return Keeper()


@pytest.fixture
def records(keeper: Keeper) -> ClientRecords:
    """The records of hypervisor `host`, which reaches no VIOS just now."""
    return ClientRecords("host", cast(DefinitionKeeper, keeper), {})


def take_over(keeper: Keeper, hypervisor: str) -> Definition:
    """Have somebody else claim the client."""
    keeper.current = rules.claim(keeper.current, "vm1", "00000000000000bb", hypervisor)
    return keeper.current


def test_each_claim_has_an_epoch_and_a_token_of_its_own(keeper: Keeper, records: ClientRecords) -> None:
    first, second = asyncio.run(records.claim("vm1")), asyncio.run(records.claim("vm1"))
    assert first.epoch < second.epoch
    assert len({first.owner, second.owner, ""}) == 3
    assert keeper.current.clients["vm1"] == second


@pytest.mark.parametrize("hypervisor", ["other", "host"])
def test_a_client_that_somebody_else_has_claimed_is_not_deleted(
    keeper: Keeper, records: ClientRecords, hypervisor: str
) -> None:
    asyncio.run(records.claim("vm1"))
    before = take_over(keeper, hypervisor)
    with pytest.raises(ClientElsewhere, match=f"belongs to hypervisor '{hypervisor}'"):
        asyncio.run(records.delete("vm1"))
    asyncio.run(records.discard("vm1"))
    assert (keeper.current, records.leftovers) == (before, frozenset())


def test_a_claim_from_before_a_restart_counts(keeper: Keeper, records: ClientRecords) -> None:
    mine = asyncio.run(records.claim("vm1"))
    restarted = ClientRecords("host", cast(DefinitionKeeper, keeper), {})
    restarted.claimed_before("vm1", mine.epoch, mine.owner)
    take_over(keeper, "host")
    with pytest.raises(ClientElsewhere):
        asyncio.run(restarted.delete("vm1"))


def test_a_client_of_its_own_is_claimed_before_it_is_deleted(keeper: Keeper, records: ClientRecords) -> None:
    claimed = asyncio.run(records.claim("vm1"))
    with pytest.raises(NoVios):
        asyncio.run(records.delete("vm1"))
    assert keeper.current.clients["vm1"].epoch > claimed.epoch


def test_a_client_made_anew_is_not_taken_for_somebody_else_s(keeper: Keeper, records: ClientRecords) -> None:
    asyncio.run(records.claim("vm1"))
    definition = rules.remove_client(keeper.current, "vm1")
    keeper.current = rules.add_client(definition, "vm1", memory_bytes=MIB, hypervisor="host")
    with pytest.raises(NoVios):
        asyncio.run(records.delete("vm1"))


def test_only_the_owner_s_own_takeovers_are_recorded(keeper: Keeper, records: ClientRecords) -> None:
    claimed = asyncio.run(records.claim("vm1"))
    raised = EpochRaised(client="vm1", epoch=claimed.epoch + 3, owner=claimed.owner)
    asyncio.run(records.epoch_raised(raised))
    assert keeper.current.clients["vm1"].epoch == claimed.epoch + 3
    before = take_over(keeper, "other")
    asyncio.run(records.epoch_raised(raised.model_copy(update={"epoch": claimed.epoch + 30})))
    assert keeper.current == before
