"""The page table of a released client, on its way to the VIOS that its adopter reaches."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest

from farpage import handover
from farpage.api.client import ControlClient
from farpage.api.remote import RemoteError
from farpage.definition import moving, rules
from farpage.definition.model import ClientRecord, Definition, Redundancy, Release
from farpage.definition.moving import Claim, Route
from farpage.errors import Unreachable
from farpage.handover import Handover
from farpage.intermediary.handover import MISSING, HandoverCarrier
from farpage.intermediary.places import Place
from tests.unit.definition.test_definition_rules import MIB, A, C, defined, found

OWNER = "00000000000000aa"
PAGES = 64


class Tables(Place):
    """A VIOS that stores page tables, by device."""

    def __init__(self, name: str, **stored: bytes) -> None:
        super().__init__(name, f"unix:/nowhere/{name}")
        self.client = cast(ControlClient, self)
        self.stored = stored
        self.asked = 0
        self.put_as: dict[str, Any] = {}
        self.away = False

    async def request(self, method: str, path: str, *, params: dict[str, str]) -> bytes:
        assert (method, path) == ("GET", "/v1/volumes/vm1/handover")
        self.asked += 1
        if self.away:
            raise Unreachable(self.name, self.control, "it is away", "")
        if params["device"] not in self.stored:
            raise RemoteError(404, MISSING, "it stores none", "")
        return self.stored[params["device"]]

    async def put(self, path: str, encoded: bytes, answer: object, *, params: dict[str, Any]) -> None:  # type: ignore[override]
        self.stored[params["device"]], self.put_as = encoded, params


def table(epoch: int) -> bytes:
    on_device, none = np.ones(PAGES, np.bool_), np.zeros(PAGES, np.bool_)
    return handover.encode(Handover("vm1", epoch, 1, on_device, none, np.full(PAGES, epoch, np.uint32)))


def released_client(of: bytes) -> tuple[Definition, ClientRecord]:
    """A client on its way from C to A that was released with a page table."""
    definition = rules.add_client(
        defined(one=[found(A, "a")], two=[found(C, "c", 2 * MIB)]),
        "vm1",
        memory_bytes=2 * MIB,
        hypervisor="host",
        redundancy=Redundancy.NONE,
    )
    definition = rules.claim(definition, "vm1", OWNER, "host")
    route = Route(source=C, source_vios="two", target=A, target_vios="one")
    definition = moving.begin(definition, "vm1", Claim(OWNER, 0), route, "00000000000000cc")
    digest = handover.check(of, whose="the test").digest
    released = Release(hypervisor="away", epoch=1, digest=digest, adopter="host")
    return definition, definition.clients["vm1"].model_copy(update={"released": released})


async def test_it_is_brought_once_for_the_client_s_owner() -> None:
    definition, client = released_client(table(1))
    first, second = Tables("one"), Tables("two", **{C: table(1)})
    carrier = HandoverCarrier(first, second)
    for _ in range(2):
        await carrier.carry(definition.moves["vm1"], client)
    assert (first.stored, carrier.problem) == ({A: table(1)}, "")
    assert first.put_as == {"epoch": client.epoch, "owner": OWNER, "device": A}
    assert (first.asked, second.asked) == (1, 1)


async def test_one_of_an_earlier_release_is_replaced() -> None:
    definition, client = released_client(table(2))
    first, second = Tables("one", **{A: table(1)}), Tables("two", **{C: table(2)})
    await HandoverCarrier(first, second).carry(definition.moves["vm1"], client)
    assert first.stored == {A: table(2)}


async def test_of_a_client_that_is_attached_there_is_none_to_bring() -> None:
    definition, _ = released_client(table(1))
    first, second = Tables("one"), Tables("two", **{C: table(1)})
    await HandoverCarrier(first, second).carry(definition.moves["vm1"], definition.clients["vm1"])
    assert (first.stored, first.asked, second.asked) == ({}, 0, 0)


@pytest.mark.parametrize("stored", [{}, {C: table(1)}])
async def test_until_the_second_vios_has_it_that_is_told_and_tried_again(stored: dict[str, bytes]) -> None:
    definition, client = released_client(table(2))
    first, second = Tables("one"), Tables("two", **stored)
    carrier = HandoverCarrier(first, second)
    await carrier.carry(definition.moves["vm1"], client)
    assert first.stored == {}
    assert "cannot be carried" in carrier.problem
    second.stored[C] = table(2)
    await carrier.carry(definition.moves["vm1"], client)
    assert (first.stored, carrier.problem) == ({A: table(2)}, "")
