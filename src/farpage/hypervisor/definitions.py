"""The hypervisor's device interface definition: agreed on with the VIOS, and kept the same in all of them.

Which copy is followed: the hypervisor keeps one of its own, which has every change that it has ever
acknowledged. With it the newest of all copies is known to be the newest, however few VIOS answer. Without
it, a VIOS that does not answer may have a newer one than those that do, so nothing is changed until it
answers or an operator promotes a copy. Only a hypervisor that no client belongs to, by the copies at hand,
does not wait for VIOS that it was not started with: they may be out of its reach for good.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from farpage.definition.compare import beyond, compare, diff, is_newer
from farpage.definition.copy import DefinitionCopy
from farpage.definition.model import Definition
from farpage.definition.verification import FoundVolume, promote
from farpage.errors import ExitStatus, FarpageError
from farpage.hypervisor.gathering import GatheredChanges, WantedChange
from farpage.hypervisor.model import DefinitionPromotion
from farpage.hypervisor.vioses import Vios
from farpage.log import get_logger

log = get_logger()

DIFFERENT_COPY = ("revision_conflict", "invalid_definition")
"""What a VIOS answers that has another copy than the change was based on."""
ATTEMPTS = 5
CHANGES_SHOWN = 5

HYPERVISOR = "the hypervisor"
"""Who has a copy besides the VIOS."""


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


@dataclass(eq=False)
class DefinitionUnproven(FarpageError):
    """The definition at hand may be older than the last one that was agreed on."""

    code = "definition_unproven"
    template = (
        "the definition at revision {revision} may be old: "
        "the hypervisor has no copy of its own, and {missing}"
    )
    remedy = (
        "start what is missing; if it is lost for good, see 'farpage definition verify' and promote "
        "a copy with 'farpage definition promote VIOS --force'"
    )
    exit_status = ExitStatus.CONFLICT
    revision: int
    missing: str


@dataclass(eq=False)
class CopyUnknown(FarpageError):
    """The VIOS does not tell its copy."""

    code = "copy_unknown"
    template = "the copy of the definition at VIOS {vios!r} is not known: {problem}"
    remedy = "name a VIOS that answers; 'farpage definition verify' shows them"
    exit_status = ExitStatus.UNREACHABLE
    vios: str
    problem: str


@dataclass(frozen=True)
class KnownCopies:
    """What those who keep the definition have of it; `missing` says why the others' copies are not known."""

    copies: Mapping[str, Definition]
    missing: Mapping[str, str]


class DefinitionKeeper:
    """Reads the newest definition, changes it by compare-and-swap, and repairs VIOS that lag."""

    def __init__(
        self,
        vioses: Mapping[str, Vios],
        own: DefinitionCopy,
        attempted: DefinitionCopy,
        alarm: Callable[[str, str], None],
        *,
        hypervisor: str,
        tls: Path | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        """`own` keeps the copy of the `hypervisor`, `attempted` the change that it makes, or made last.

        `alarm` is called with a kind and a message; `clock` tells Unix seconds.
        `tls` is the folder of certificates for VIOS that only copies of the definition name.
        """
        self.current = Definition()
        self.missing: Mapping[str, str] = {}
        """VIOS that may have a newer copy than `current`, and why it is not known; empty when none may."""
        self.repairs: Counter[str] = Counter()
        """Copies that were brought up to date, by VIOS."""
        self.missed = asyncio.Event()
        """Set when some VIOS has not got a change, or none took it: it is worth another look at once."""
        self._vioses = vioses
        self._hypervisor = hypervisor
        self._tls = tls
        self._copy = own
        self._attempts = attempted
        self._attempted: Definition | None = None
        """A change that was not acknowledged, but may be stored at a VIOS that does not answer.

        Every later change goes before it, so that it is not followed when that VIOS is back.
        """
        self._noted = True
        """Whether a control process in this one's place would know of it."""
        self._own: Definition | None = None
        """The newest definition that was agreed on; from the hypervisor's own copy after a start."""
        self._kept: Definition | None = None
        """What the file of the own copy has."""
        self._alarm = alarm
        self._clock = clock
        self._lock = asyncio.Lock()
        self._changes = GatheredChanges(self._lock, self._make)

    @property
    def unproven(self) -> DefinitionUnproven | None:
        """Why the definition cannot be changed now; None when it can."""
        if not self.missing:
            return None
        missing = "; ".join(f"VIOS {vios} does not tell its own: {why}" for vios, why in self.missing.items())
        return DefinitionUnproven(self.current.revision, missing)

    # Agreeing on one

    async def start(self) -> None:
        """Read the hypervisor's own copy, if it was not yet, then `load`."""
        await self.read_own()
        async with self._lock:
            await self._load()

    async def read_own(self) -> None:
        """Read the hypervisor's own copy: until a VIOS answers it tells what replicas are worth."""
        async with self._lock:
            if self._own:
                return
            try:
                self._own = self._kept = await asyncio.to_thread(self._copy.load)
                attempted = await asyncio.to_thread(self._attempts.load)
                self._attempted = attempted if attempted != self._own else None
            except FarpageError as error:
                log.error("own_definition_not_read", problem=error.cause)
                self._alarm("definition_copy_failed", f"the hypervisor's own copy is not used: {error.cause}")
            if self._own:
                self.current = self._own

    async def load(self) -> None:
        """Take the newest definition among the copies, and give it to the VIOS that have another one."""
        async with self._lock:
            await self._load()

    async def _load(self) -> None:
        known = await self._known_copies()
        if known.copies:
            newest = compare(known.copies)
            if is_newer(newest.newest, self.current):
                if self._own:
                    self._tell_followed(newest.vios, newest.newest)
                self.current = newest.newest
        if missing := self._in_the_way(known):
            if not self.missing:
                self.missing = missing
                log.error("definition_unproven", revision=self.current.revision, missing=dict(missing))
                self._alarm("definition_unproven", str(self.unproven))
            self.missing = missing
            return
        for name, problem in known.missing.items():
            log.warning("definition_not_read", vios=name, problem=problem)
        self.missing = {}
        await self._keep()
        for name, definition in known.copies.items():
            if name in self._vioses and definition != self.current:
                await self._repair(self._vioses[name], definition)

    def _in_the_way(self, known: KnownCopies) -> Mapping[str, str]:
        """Return the VIOS without whose copies nothing may be changed: they may have what this one has made.

        A hypervisor that is new to the definition has made nothing yet. It need not reach more VIOS than it
        was started with: what others change beyond its reach is fenced by the epochs of their volumes.
        """
        if self._own is not None:
            return {}
        records = [record for copy in known.copies.values() for record in copy.clients.values()]
        is_new = not any(record.hypervisor == self._hypervisor for record in records)
        return {vios: why for vios, why in known.missing.items() if vios in self._vioses or not is_new}

    async def _known_copies(self) -> KnownCopies:
        """Ask everybody who keeps a copy: the VIOS, and those that their copies name."""
        copies: dict[str, Definition] = {}
        missing: dict[str, str] = {}
        if self._own is not None:
            copies[HYPERVISOR] = self._own
        await asyncio.gather(*(_read(vios, copies, missing) for vios in self._vioses.values()))
        # A copy may name a VIOS that this hypervisor was not started with, where the newest one may be.
        while others := {
            name: record.control
            for definition in copies.values()
            for name, record in definition.vioses.items()
            if name not in copies and name not in missing
        }:
            for name, control in others.items():
                try:
                    other = Vios(name, control, self._tls)
                except FarpageError as error:
                    missing[name] = error.cause
                    continue
                await _read(other, copies, missing)
                await other.client.close()
        return KnownCopies(copies, missing)

    def _tell_followed(self, holder: str, newer: Definition) -> None:
        changes = _shown(self.current, newer)
        log.warning("definition_followed", holder=holder, revision=newer.revision, changes=changes)
        self._alarm(
            "definition_followed",
            f"{holder} has revision {newer.revision}, which this hypervisor did not make and follows "
            f"instead of {self.current.revision}: {changes}",
        )

    async def _keep(self) -> None:
        """Store the current definition as the hypervisor's own copy.

        Not while a later one may be stored somewhere of which the next control process would not know.
        """
        self._own = self.current
        unknown = not self._noted and self._attempted not in (None, self.current)
        if unknown or self._kept == self.current:
            return
        try:
            await asyncio.to_thread(self._copy.save, self.current)
            self._kept = self.current
        except FarpageError as error:
            self._kept = None
            log.error("own_definition_not_stored", problem=error.cause)
            self._alarm("definition_copy_failed", f"the hypervisor's own copy is not stored: {error.cause}")

    # Promoting

    async def promote(
        self, vios: str, volumes: Sequence[FoundVolume], attached: Collection[str], *, force: bool
    ) -> DefinitionPromotion:
        """Make the copy of a VIOS the newest, for everybody; without `force` just say what that does.

        `volumes` are those that the VIOS report; `attached` are clients whose records stay as they are.

        :raise CopyUnknown: the VIOS does not answer, or is none of this hypervisor's.
        :raise InvalidDefinition: the copy does not go together with the clients that are attached.
        """
        async with self._lock:
            known = await self._known_copies()
            if vios not in known.copies:
                raise CopyUnknown(vios, known.missing.get(vios, "the hypervisor knows no such VIOS"))
            copy = known.copies[vios]
            plan = promote(
                copy,
                [*(other for holder, other in known.copies.items() if holder != vios), self.current],
                volumes=volumes,
                kept={name: self.current.clients[name] for name in attached},
                some_unknown=bool(known.missing),
                now_seconds=self._clock(),
            )
            if force:
                self.current = plan.definition
                self.missing = {}
                log.warning("definition_promoted", vios=vios, revision=self.current.revision, lost=plan.lost)
                self._alarm(
                    "definition_promoted",
                    f"the copy of VIOS {vios} at revision {copy.revision} is followed as "
                    f"{self.current.revision}, by request",
                )
                await self._keep()
                for name, found in known.copies.items():
                    if name in self._vioses:
                        await self._repair(self._vioses[name], found)
            return DefinitionPromotion(
                vios=vios,
                copy_revision=copy.revision,
                revision=plan.definition.revision,
                lost=plan.lost,
                missing=dict(known.missing),
                at_risk=plan.at_risk,
                done=force,
            )

    # Repairing

    async def repair(self, vios: Vios) -> None:
        """Bring a VIOS that came back up to date, or learn from it what is newer."""
        async with self._lock:
            if self.missing:
                await self._load()
                return
            try:
                found = await vios.definition()
            except FarpageError:
                return
            if found == self.current:
                return
            if is_newer(found, self.current):
                await self._load()
            else:
                await self._repair(vios, found)

    async def _repair(self, vios: Vios, found: Definition) -> None:
        """Replace the copy of a VIOS that is older, or contradicts what was agreed on."""
        try:
            await vios.put_definition(found.revision, self.current)
        except FarpageError as error:
            log.warning("definition_not_repaired", vios=vios.name, problem=error.cause)
            return
        self.repairs[vios.name] += 1
        contradicts = found.revision >= self.current.revision
        changes = _shown(found, self.current)
        log.warning(
            "definition_contradiction" if contradicts else "definition_repaired",
            vios=vios.name,
            from_revision=found.revision,
            to_revision=self.current.revision,
            changes=changes,
        )
        if contradicts:
            self._alarm(
                "definition_contradiction",
                f"VIOS {vios.name} had another revision {found.revision} than was agreed on and has "
                f"{self.current.revision} now: {changes}",
            )
        else:
            self._alarm(
                "definition_repaired",
                f"VIOS {vios.name} had missed changes and was brought from revision {found.revision} "
                f"to {self.current.revision}: {changes}",
            )

    # Changing

    async def change(self, edit: Callable[[Definition], Definition]) -> Definition:
        """Apply a pure edit and store the result in every reachable VIOS, and in the hypervisor's own copy.

        Edits that come together are stored together: a VIOS that is lost concerns many clients at once.

        :raise NoVios: when none took it; nothing has changed then.
        :raise DefinitionUnproven: the definition at hand may be old.
        :raise FarpageError: what `edit` raises; nothing has changed then.
        """
        return await self._changes.change(edit)

    async def _make(self, batch: Sequence[WantedChange]) -> None:
        """Make some changes at once."""
        for _ in range(ATTEMPTS):
            if self.unproven:
                raise self.unproven
            changed = self.current
            for wanted in batch:
                changed = wanted.apply(changed)
            if all(wanted.ended.done() for wanted in batch):
                return
            if changed == self.current and not self._may_be_followed():
                return
            if self._attempted:
                changed = beyond(changed, self._attempted)
                for wanted in batch:
                    wanted.go_beyond(self._attempted)
            if not any(vios.reachable for vios in self._vioses.values()):
                self.missed.set()
                raise NoVios("; ".join(self._away()))
            await self._attempt(changed)
            if await self._store(changed):
                self._attempted = None
                return
            await self._load()
        raise DefinitionContended(ATTEMPTS)

    def _may_be_followed(self) -> bool:
        """Tell whether a change that was not acknowledged would be followed if a VIOS came back with it.

        Then even what is as it should be has to be stored anew, to stay so.
        """
        return self._attempted is not None and is_newer(self._attempted, self.current)

    async def _attempt(self, changed: Definition) -> None:
        """Take note of a change before any VIOS can store it: this process may end, or not hear of it."""
        self._attempted = changed
        try:
            await asyncio.to_thread(self._attempts.save, changed)
            self._noted = True
        except FarpageError as error:
            log.error("attempted_change_not_stored", problem=error.cause)
            self._alarm("definition_copy_failed", f"the change under way is not stored: {error.cause}")
            self._noted = False
            self._kept = None
            await asyncio.to_thread(self._copy.discard)

    def _away(self) -> list[str]:
        """Say of each VIOS that did not answer when it was last asked why."""
        return [f"{vios.name}: {vios.problem}" for vios in self._vioses.values() if not vios.reachable]

    async def _store(self, changed: Definition) -> bool:
        """Store a successor of `current` in every VIOS that answers; False when one has a newer document.

        A VIOS that did not answer when it was last asked is left out, since one that hangs would hold up
        every change: it is repaired when it is back.
        """
        asked = [vios for vios in self._vioses.values() if vios.reachable]
        outcomes = await asyncio.gather(
            *(vios.put_definition(self.current.revision, changed) for vios in asked), return_exceptions=True
        )
        taken: list[str] = []
        refused: dict[str, Definition] = {}
        problems = self._away()
        for vios, outcome in zip(asked, outcomes, strict=True):
            if outcome is None:
                taken.append(vios.name)
                continue
            if not isinstance(outcome, FarpageError):
                raise outcome
            problems.append(f"{vios.name}: {outcome.cause}")
            if outcome.code in DIFFERENT_COPY:
                await _read(vios, refused, {})
        refused = {name: found for name, found in refused.items() if found != self.current}
        if any(is_newer(found, changed) for found in refused.values()):
            return False  # acknowledged, the change would be lost to that one as soon as it is followed
        if not taken:
            if refused:
                return False
            self.missed.set()
            raise NoVios("; ".join(problems))
        self.current = changed
        await self._keep()
        for name, found in refused.items():
            await self._repair(self._vioses[name], found)
        for problem in problems:
            log.warning("definition_not_stored", problem=problem, revision=changed.revision)
            self.missed.set()
        return True


async def _read(vios: Vios, copies: dict[str, Definition], missing: dict[str, str]) -> None:
    try:
        copies[vios.name] = await vios.definition()
    except FarpageError as error:
        missing[vios.name] = error.cause


def _shown(old: Definition, new: Definition) -> str:
    changes = diff(old, new)
    more = f"; and {len(changes) - CHANGES_SHOWN} more" if len(changes) > CHANGES_SHOWN else ""
    return "; ".join(changes[:CHANGES_SHOWN]) + more
