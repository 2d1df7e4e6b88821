"""What an intermediate client finds to do, or says is in the way."""

from __future__ import annotations

import asyncio

import pytest

from farpage.definition import moving
from farpage.definition.errors import ClientMissing, MoveMissing
from farpage.definition.model import Access, Definition
from farpage.errors import FarpageError, Unreachable
from farpage.intermediary.courier import Courier
from farpage.intermediary.errors import NotGranted, ViosNotNamed
from farpage.intermediary.route import START_SECONDS, Route, find_route
from tests.support.places import StoredPlace
from tests.support.simulated_loop import run_simulated
from tests.unit.definition.test_moving import CLAIM, PRINCIPAL, ROUTE, begun, client_on_c


def _find(definition: Definition, client: str = "vm1", *, names: str = "one two", away: str = "") -> Route:
    async def main() -> Route:
        places = [StoredPlace(name, definition) for name in names.split()]
        for place in places:
            place.away = place.name == away
        return await find_route(client, Courier(places))

    return run_simulated(main)


def test_the_targets_vios_is_the_first_and_the_sources_the_second() -> None:
    route = _find(begun(), names="two one three")
    assert (route.first.name, route.second.name) == ("one", "two")
    assert str(route.source) == f"vm1/{ROUTE.source}+{PRINCIPAL}"
    assert str(route.target) == f"vm1/{ROUTE.target}<{ROUTE.source}+{PRINCIPAL}"


def _without_fill() -> Definition:
    definition = begun()
    left = tuple(grant for grant in definition.grants if grant.access is not Access.FILL)
    return definition.model_copy(update={"grants": left})


@pytest.mark.parametrize(
    ("definition", "client", "names", "kind"),
    [
        (begun(), "vm2", "one two", ClientMissing),
        (client_on_c(), "vm1", "one two", MoveMissing),
        (begun(), "vm1", "one three", ViosNotNamed),
        (_without_fill(), "vm1", "one two", NotGranted),
    ],
)
def test_what_is_in_the_way_is_said_at_once(
    definition: Definition, client: str, names: str, kind: type[FarpageError]
) -> None:
    with pytest.raises(kind):
        _find(definition, client, names=names)


def test_a_finished_move_needs_no_grants() -> None:
    assert _find(moving.finish(begun(), "vm1", CLAIM)).client == "vm1"


def test_a_vios_that_does_not_answer_is_waited_for_and_then_named() -> None:
    async def main() -> None:
        places = [StoredPlace(name, begun()) for name in ("one", "two")]
        places[1].away = True
        began = asyncio.get_running_loop().time()
        with pytest.raises(Unreachable, match="VIOS two"):
            await find_route("vm1", Courier(places))
        assert START_SECONDS <= asyncio.get_running_loop().time() - began <= START_SECONDS + 1
        asyncio.get_running_loop().call_later(2, setattr, places[1], "away", False)
        assert (await find_route("vm1", Courier(places))).second is places[1]

    run_simulated(main)


def test_a_move_that_just_the_vios_that_is_away_knows_of_is_waited_for() -> None:
    async def main() -> None:
        places = [StoredPlace("one", client_on_c()), StoredPlace("two", begun())]
        places[1].away = True
        asyncio.get_running_loop().call_later(2, setattr, places[1], "away", False)
        assert (await find_route("vm1", Courier(places))).move.principal == PRINCIPAL

    run_simulated(main)
