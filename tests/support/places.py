"""VIOS of an intermediate client that are no processes."""

from __future__ import annotations

from farpage.api.remote import RemoteError
from farpage.definition.compare import is_newer
from farpage.definition.model import Definition
from farpage.errors import Unreachable
from farpage.intermediary.places import Place


class StoredPlace(Place):
    """A VIOS' store in memory."""

    def __init__(self, name: str, stored: Definition) -> None:
        super().__init__(name, f"unix:/nowhere/{name}")
        self.stored = stored
        self.away = False
        self.asked = 0

    async def refresh(self, *, anew: bool = False) -> Definition:
        self.asked += 1
        if self.away:
            raise Unreachable(self.name, self.control, "it is away", "")
        self.definition = self.stored
        return self.stored

    async def put(self, expected_revision: int, definition: Definition) -> None:
        if expected_revision != self.stored.revision or not is_newer(definition, self.stored):
            raise RemoteError(409, "revision_conflict", "another revision", "")
        self.stored = definition
