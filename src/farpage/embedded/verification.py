"""Asks everybody who keeps a copy of the definition for it, and compares."""

from __future__ import annotations

from collections.abc import Mapping

from farpage.definition.compare import compare, diff
from farpage.definition.model import Definition
from farpage.definition.rules import unmet_wishes
from farpage.definition.verification import FoundVolume, volume_problems
from farpage.embedded.control import HypervisorControl, ViosControl
from farpage.embedded.layout import SetDocument
from farpage.embedded.model import CopyInfo, CopyState, DefinitionVerification
from farpage.errors import FarpageError

HYPERVISOR = "hypervisor"


async def verify(document: SetDocument) -> DefinitionVerification:
    """Compare all copies with each other, and the newest one with the volumes that the VIOS have."""
    copies: dict[str, Definition] = {}
    away: dict[str, str] = {}
    problems: list[str] = []
    volumes: dict[str, list[FoundVolume]] = {}
    async with HypervisorControl(document.hypervisor.control, document.tls) as hypervisor:
        try:
            problem = (await hypervisor.info()).definition_problem
            problems += [problem] if problem else []
            copies[HYPERVISOR] = await hypervisor.definition()
        except FarpageError as error:
            away[HYPERVISOR] = error.cause
    for name, record in document.vioses.items():
        async with ViosControl(record.control, name, document.tls) as vios:
            try:
                copies[name] = await vios.definition()
                volumes[name] = [
                    FoundVolume(v.name, v.device, v.size_bytes, v.epoch, v.owner)
                    for v in await vios.volumes()
                ]
            except FarpageError as error:
                away[name] = error.cause
    return _judged(copies, away, problems, volumes)


def _judged(
    copies: Mapping[str, Definition],
    away: Mapping[str, str],
    problems: list[str],
    volumes: Mapping[str, list[FoundVolume]],
) -> DefinitionVerification:
    unknown = tuple(
        CopyInfo(holder=holder, state=CopyState.UNKNOWN, problem=problem) for holder, problem in away.items()
    )
    if not copies:
        return DefinitionVerification(sound=False, revision=None, copies=unknown)
    comparison = compare(copies)
    newest = comparison.newest
    lagging = {one.vios: one for one in comparison.lagging}
    known = []
    for holder, copy in copies.items():
        state = CopyState.NEWEST
        if holder in lagging:
            state = CopyState.CONTRADICTS if lagging[holder].contradicts else CopyState.LAGS
        known.append(
            CopyInfo(
                holder=holder,
                state=state,
                revision=copy.revision,
                epochs={name: client.epoch for name, client in copy.clients.items()},
                differences=diff(copy, newest) if holder in lagging else (),
            )
        )
    wishes = unmet_wishes(newest)
    found = (*problems, *volume_problems(newest, volumes))
    return DefinitionVerification(
        sound=not (away or lagging or wishes or found),
        revision=newest.revision,
        copies=(*known, *unknown),
        unmet_wishes=wishes,
        problems=found,
    )
