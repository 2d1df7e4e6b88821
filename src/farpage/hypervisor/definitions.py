"""The hypervisor's copy of the device interface definition, kept the same in every VIOS."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import structlog

from farpage.api.remote import RemoteError
from farpage.definition.compare import compare, is_newer
from farpage.definition.model import Definition
from farpage.errors import ExitStatus, FarpageError
from farpage.hypervisor.vioses import Vios

log = structlog.get_logger()

CONFLICT = 409
ATTEMPTS = 5


@dataclass(eq=False)
class NoVios(FarpageError):
    """No VIOS took the change, so it was not made."""

    code = "no_vios"
    template = "no VIOS could store the change of the definition: {problems}"
    remedy = "start a VIOS; 'farpage vios list' shows which answer"
    exit_status = ExitStatus.UNREACHABLE
    problems: str


@dataclass(eq=False)
class DefinitionContended(FarpageError):
    """Somebody else kept changing the definition."""

    code = "definition_contended"
    template = "the definition was changed by somebody else {attempts} times in a row"
    remedy = "try again; only one hypervisor should own these VIOS"
    exit_status = ExitStatus.CONFLICT
    attempts: int


class DefinitionKeeper:
    """Reads the newest definition, changes it by compare-and-swap, and repairs VIOS that lag."""

    def __init__(self, vioses: Mapping[str, Vios]) -> None:
        self.current = Definition()
        self._vioses = vioses
        self._lock = asyncio.Lock()

    async def load(self) -> None:
        """Take the newest definition among the reachable VIOS and give it to the others."""
        async with self._lock:
            await self._load()

    async def _load(self) -> None:
        stored: dict[str, Definition] = {}
        for vios in self._vioses.values():
            try:
                stored[vios.name] = await vios.definition()
            except FarpageError as error:
                log.warning("definition_not_read", vios=vios.name, problem=error.cause)
        if not stored:
            return
        newest = compare(stored).newest
        if is_newer(newest, self.current):
            self.current = newest
        for name, definition in stored.items():
            if definition != self.current:
                await self._repair(self._vioses[name], definition.revision)

    async def _repair(self, vios: Vios, found_revision: int) -> None:
        try:
            await vios.put_definition(found_revision, self.current)
        except FarpageError as error:
            log.warning("definition_not_repaired", vios=vios.name, problem=error.cause)
        else:
            log.info(
                "definition_repaired",
                vios=vios.name,
                from_revision=found_revision,
                to_revision=self.current.revision,
            )

    async def change(self, edit: Callable[[Definition], Definition]) -> Definition:
        """Apply a pure edit and store the result in every reachable VIOS.

        :raise NoVios: when none took it; nothing has changed then.
        :raise FarpageError: what `edit` raises; nothing has changed then.
        """
        async with self._lock:
            for _ in range(ATTEMPTS):
                changed = edit(self.current)
                if changed == self.current:
                    return self.current
                if await self._store(changed):
                    return self.current
                await self._load()
        raise DefinitionContended(ATTEMPTS)

    async def _store(self, changed: Definition) -> bool:
        """Store a successor of `current` in every VIOS that answers; False when one has a newer document.

        A VIOS that did not answer when it was last asked is left out: it is repaired when it is back.
        """
        asked = [vios for vios in self._vioses.values() if vios.reachable]
        outcomes = await asyncio.gather(
            *(vios.put_definition(self.current.revision, changed) for vios in asked), return_exceptions=True
        )
        taken: list[str] = []
        refused: list[Vios] = []
        problems = [f"{vios.name}: {vios.problem}" for vios in self._vioses.values() if not vios.reachable]
        for vios, outcome in zip(asked, outcomes, strict=True):
            if outcome is None:
                taken.append(vios.name)
                continue
            if not isinstance(outcome, FarpageError):
                raise outcome
            problems.append(f"{vios.name}: {outcome.cause}")
            if isinstance(outcome, RemoteError) and outcome.http_status == CONFLICT:
                refused.append(vios)
        if not taken:
            if refused:
                return False
            raise NoVios("; ".join(problems))
        self.current = changed
        for vios in refused:
            await self._repair(vios, await self._revision(vios))
        for problem in problems:
            log.warning("definition_not_stored", problem=problem, revision=changed.revision)
        return True

    @staticmethod
    async def _revision(vios: Vios) -> int:
        try:
            return (await vios.definition()).revision
        except FarpageError:
            return -1

    async def repair(self, vios: Vios) -> None:
        """Bring a VIOS that came back up to date, or learn from it what is newer."""
        async with self._lock:
            try:
                found = await vios.definition()
            except FarpageError:
                return
            if found == self.current:
                return
            if is_newer(found, self.current):
                await self._load()
            else:
                await self._repair(vios, found.revision)
