"""Changes of the definition that come together, or while another is being stored: made all at once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from farpage.definition.compare import beyond
from farpage.definition.model import Definition

GATHER_SECONDS: Final = 0.003
"""A change waits so long for others that have the same cause: to store one takes ten times as long."""


class WantedChange:
    """A change that somebody waits for."""

    def __init__(self, edit: Callable[[Definition], Definition]) -> None:
        self.ended: asyncio.Future[Definition] = asyncio.get_running_loop().create_future()
        self._edit = edit
        self._changed = Definition()

    def apply(self, now: Definition) -> Definition:
        """Return what the edit makes of a definition; one that fails ends the change and changes nothing."""
        if self.ended.done():
            return now
        try:
            self._changed = self._edit(now)
        except Exception as error:
            self.ended.set_exception(error)
            return now
        return self._changed

    def go_beyond(self, attempted: Definition) -> None:
        """Have it end with a definition that goes before one which nobody has acknowledged."""
        self._changed = beyond(self._changed, attempted)

    def succeed(self) -> None:
        """End it with the definition as its edit has left it."""
        if not self.ended.done():
            self.ended.set_result(self._changed)

    def fail(self, error: Exception) -> None:
        """End it: nothing has changed, or nobody knows."""
        if not self.ended.done():
            self.ended.set_exception(error)


class GatheredChanges:
    """Whoever finds changes that wait when its turn comes makes all of them."""

    def __init__(
        self, turns: asyncio.Lock, store: Callable[[Sequence[WantedChange]], Awaitable[None]]
    ) -> None:
        """`store` applies some changes one after the other and stores the outcome, holding `turns`."""
        self._turns = turns
        self._store = store
        self._waiting: list[WantedChange] = []
        """Those that nobody waits for any more have ended, and are left out when it is their turn."""

    async def change(self, edit: Callable[[Definition], Definition]) -> Definition:
        """Return the definition with a change, when it is stored.

        :raise FarpageError: what `edit` or storing raises.
        """
        wanted = WantedChange(edit)
        self._waiting.append(wanted)
        try:
            async with self._turns:
                if wanted in self._waiting:
                    await asyncio.sleep(GATHER_SECONDS)
                    await self._make_all()
            return await wanted.ended
        finally:
            wanted.ended.cancel()

    async def _make_all(self) -> None:
        made, self._waiting = self._waiting, []
        try:
            await self._store(made)
        except asyncio.CancelledError:
            # The others' changes are made by the next one of them, whatever has become of this attempt.
            self._waiting[:0] = made
            raise
        except Exception as error:
            for wanted in made:
                wanted.fail(error)
        else:
            for wanted in made:
                wanted.succeed()
