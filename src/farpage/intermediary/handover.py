"""Carries the page table of a released client from the second VIOS to the first one.

Who adopts the client reaches the first VIOS alone, and cannot attach it without the table.
"""

from __future__ import annotations

from farpage import handover
from farpage.api.remote import RemoteError
from farpage.definition.model import ClientRecord, Move
from farpage.errors import FarpageError
from farpage.intermediary.errors import OtherHandover
from farpage.intermediary.places import Place
from farpage.log import get_logger
from farpage.vios.model import HandoverInfo

MISSING = "handover_not_found"

log = get_logger()


class HandoverCarrier:
    """Between the two VIOS of a move."""

    def __init__(self, first: Place, second: Place) -> None:
        self._first = first
        self._second = second
        self._there = ""
        """Digest of the table that the first VIOS is known to have."""
        self.problem = ""

    def is_there(self, client: ClientRecord) -> bool:
        """Tell whether the first VIOS is known to have the table that the definition speaks of, if of any."""
        return client.released is None or client.released.digest == self._there

    async def carry(self, move: Move, client: ClientRecord) -> None:
        """Bring the first VIOS the table that the definition speaks of, if it has not got it yet."""
        released = client.released
        if released is None or released.digest == self._there:
            self.problem = ""
            return
        try:
            if await self._digest(self._first, move.volume, move.target) != released.digest:
                encoded = await self._fetch(self._second, move.volume, move.source)
                if handover.check(encoded, whose=f"volume {move.volume!r}").digest != released.digest:
                    raise OtherHandover(move.volume, self._second.name)
                await self._first.client.put(
                    f"/v1/volumes/{move.volume}/handover",
                    encoded,
                    HandoverInfo,
                    params={"epoch": client.epoch, "owner": client.owner, "device": move.target},
                )
                log.info("handover_carried", volume=move.volume, digest=released.digest, bytes=len(encoded))
        except FarpageError as error:
            problem = f"the page table of the released client cannot be carried: {error.cause}"
            if problem != self.problem:
                log.warning("handover_not_carried", problem=error.cause)
            self.problem = problem
            return
        self.problem = ""
        self._there = released.digest

    async def _digest(self, place: Place, volume: str, device: str) -> str:
        """Return the digest of the table that a VIOS stores; empty if it stores none."""
        try:
            encoded = await self._fetch(place, volume, device)
        except RemoteError as error:
            if error.code == MISSING:
                return ""
            raise
        return handover.check(encoded, whose=f"volume {volume!r}").digest

    @staticmethod
    async def _fetch(place: Place, volume: str, device: str) -> bytes:
        return await place.client.request("GET", f"/v1/volumes/{volume}/handover", params={"device": device})
