"""Carries the definition between the VIOS of a move: the client's hypervisor may reach just one of them.

The newer document goes to whoever has an older one, by compare-and-swap, and each VIOS itself refuses what is
not newer; so a courier can make no mistake worse than bringing nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Final

from farpage.definition.compare import compare, is_newer
from farpage.definition.model import Definition
from farpage.errors import FarpageError
from farpage.intermediary.places import Place
from farpage.log import get_logger

FETCH_SECONDS: Final = 10.0
"""After so long documents are fetched whole: a revision says nearly always, not always, what is in them."""

log = get_logger()


class Courier:
    """Between the places that it is given."""

    def __init__(self, places: Sequence[Place]) -> None:
        self.places = tuple(places)
        self.newest: Definition | None = None
        """The newest document that any of them has had; None before any has answered."""
        self.carried = 0
        """Documents brought to a VIOS that had an older one."""
        self._fetched_at = 0.0

    async def carry(self) -> None:
        """Ask every VIOS, and bring the newest document to those that lag; whoever fails has a `problem`."""
        now = asyncio.get_running_loop().time()
        anew = now - self._fetched_at >= FETCH_SECONDS
        if anew:
            self._fetched_at = now
        answers = await asyncio.gather(*(self._ask(place, anew) for place in self.places))
        found = {place.name: answer for place, answer in zip(self.places, answers, strict=True) if answer}
        if any(definition is not self.newest for definition in found.values()):
            newest = compare(found).newest
            if self.newest is None or is_newer(newest, self.newest):
                self.newest = newest
        await asyncio.gather(*(self._bring(place) for place in self.places if place.name in found))

    def has_newest(self, place: Place) -> bool:
        """Tell whether a VIOS answered last time and had the newest document then."""
        return not place.problem and place.definition is self.newest

    async def _ask(self, place: Place, anew: bool) -> Definition | None:
        try:
            definition = await place.refresh(anew=anew)
        except FarpageError as error:
            _note(place, error.cause)
            return None
        _note(place, "")
        return definition

    async def _bring(self, place: Place) -> None:
        has, newest = place.definition, self.newest
        if has is None or newest is None:
            return
        if has == newest:
            place.definition = newest  # the same object: looked at no more
            return
        try:
            await place.put(has.revision, newest)
        except FarpageError as error:
            place.definition = None  # another one than was thought: it is fetched the next time
            log.warning("definition_not_carried", vios=place.name, problem=error.cause)
            return
        place.definition = newest
        self.carried += 1
        log.info(
            "definition_carried", vios=place.name, from_revision=has.revision, to_revision=newest.revision
        )


def _note(place: Place, problem: str) -> None:
    if problem != place.problem:
        if problem:
            log.warning("vios_away", vios=place.name, problem=problem)
        elif place.problem != "not asked yet":
            log.info("vios_back", vios=place.name)
        place.problem = problem
