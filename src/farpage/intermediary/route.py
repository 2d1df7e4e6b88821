"""Which move an intermediate client has part in, and the VIOS that it goes over."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final

from farpage.definition.model import Access, Definition, Move, MoveState
from farpage.definition.moving import may, move_of
from farpage.errors import FarpageError, Unreachable
from farpage.intermediary.courier import Courier
from farpage.intermediary.errors import NotGranted, ViosNotNamed
from farpage.intermediary.places import Place
from farpage.vios.names import ExportName

START_SECONDS: Final = 10.0
"""So long the VIOS of the move may take to answer at the start."""
ASK_AGAIN_SECONDS: Final = 0.1


@dataclass(frozen=True)
class Route:
    """A move, with the VIOS that it goes over: `first` has the target, `second` the source."""

    client: str
    move: Move
    first: Place
    second: Place

    @property
    def source(self) -> ExportName:
        """The volume on the source, as the intermediate client reads it."""
        return ExportName(self.move.volume, None, device=self.move.source, principal=self.move.principal)

    @property
    def target(self) -> ExportName:
        """The volume on the target, as the intermediate client fills it."""
        return ExportName(
            self.move.volume,
            None,
            device=self.move.target,
            source=self.move.source,
            principal=self.move.principal,
        )


async def find_route(client: str, courier: Courier) -> Route:
    """Find the move of a client in the newest definition, once the VIOS that it goes over have answered.

    :raise Unreachable: one of them does not.
    :raise ClientMissing: there is no such client.
    :raise MoveMissing: the client is not being moved.
    :raise ViosNotNamed: a VIOS of the move is not among the courier's places.
    :raise NotGranted: the definition does not let the intermediate client at the devices.
    """
    named = {place.name: place for place in courier.places}
    deadline = asyncio.get_running_loop().time() + START_SECONDS
    while True:
        await courier.carry()
        in_time = asyncio.get_running_loop().time() < deadline
        away = [place for place in courier.places if place.problem]
        try:
            if courier.newest is None:
                raise _unreachable(away[0])
            move = move_of(courier.newest, client)
            for vios in (move.target_vios, move.source_vios):
                if vios not in named:
                    raise ViosNotNamed(client, vios, ", ".join(named))
                if named[vios].problem:
                    raise _unreachable(named[vios])
            _check_grants(client, courier.newest, move)
            return Route(client, move, named[move.target_vios], named[move.source_vios])
        except FarpageError:
            # One that has not answered yet may know of the move, or be part of it.
            if not (away and in_time):
                raise
        await asyncio.sleep(ASK_AGAIN_SECONDS)


def _unreachable(place: Place) -> Unreachable:
    return Unreachable(
        f"VIOS {place.name}",
        place.control,
        place.problem,
        "start the intermediate client on a host that reaches both VIOS of the move",
    )


def _check_grants(client: str, definition: Definition, move: Move) -> None:
    if move.state is MoveState.RETIRING:
        return
    for device, access in ((move.source, Access.WRITE), (move.target, Access.FILL)):
        if not may(definition, move.principal, move.volume, device, access):
            raise NotGranted(client, access, definition.devices[device].name)
