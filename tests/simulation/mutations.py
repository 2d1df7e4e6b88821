"""Faults built into the code under test, one at a time, to show that the simulation finds them.

Each takes one protection away, by replacing a method of the shipped code while a run lasts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

from farpage.blockio import Done, Lent
from farpage.definition import verification
from farpage.definition.model import Definition
from farpage.definition.verification import Promotion
from farpage.device.claim import Claims
from farpage.hypervisor import definitions, replicas
from farpage.hypervisor.replicas import ClientReplicas
from farpage.pager import eviction, faults, salvage
from farpage.pager.releasing import Freeze
from farpage.pager.table import PAGE_BYTES
from farpage.vios.copying.copies import Copying
from farpage.vios.copying.copy import FillRun, VolumeCopy
from farpage.vios.copying.volume import Begin, CopyingVolume
from farpage.vios.exports import VolumeExport, VolumeExports
from farpage.vios.leases import Lease
from farpage.vios.names import ExportName
from farpage.vios.volumes import Volumes
from farpage.volume.command import Command
from farpage.volume.link import Held, PathLink
from farpage.volume.predecessors import Predecessors
from farpage.volume.recorder import ReplicaRecorder
from tests.simulation.disk import SimulatedVolume


def _replace(stack: ExitStack, owner: object, name: str, replacement: Any) -> None:
    stack.enter_context(mock.patch.object(owner, name, replacement))


def _quarantine_off(stack: ExitStack) -> None:
    """Repeat the writes of a failed path at once, whatever its server may still do with them."""

    def hold(
        link: PathLink, writes: list[Command], on_gone: Callable[[PathLink, Held], None]
    ) -> list[Command]:
        return writes

    _replace(stack, PathLink, "hold", hold)


def _epoch_checks_off(stack: ExitStack) -> None:
    """Let any owner in and cut nobody off, at the servers and at the devices."""

    async def fence(exports: VolumeExports, volume_id: str, epoch: int | None) -> None:
        del exports, volume_id, epoch

    _replace(stack, Volumes, "refuse", lambda *_: None)
    _replace(stack, Claims, "refuses", lambda *_: False)
    _replace(stack, VolumeExports, "fence", fence)
    _replace(stack, SimulatedVolume, "superseded", False)


def _checksums_off(stack: ExitStack) -> None:
    """Take every page that comes from a device for what was paged out."""

    def same(content: memoryview) -> list[int]:
        return [0] * (len(content) // PAGE_BYTES)

    for module in (faults, salvage):
        _replace(stack, module, "page_checksums", same)
    _replace(stack, eviction, "checksums_of", lambda pages: [0] * len(pages))


def _leases_off(stack: ExitStack) -> None:
    """Let a server write after the end of the lease under which a volume is open."""
    _replace(stack, Lease, "over", lambda *_: False)


def _stale_after_ack(stack: ExitStack) -> None:
    """Acknowledge what a lost replica misses at once, and record it stale thereafter."""
    _replace(stack, ReplicaRecorder, "is_stale", lambda *_: True)


def _predecessors_off(stack: ExitStack) -> None:
    """Let a new owner, and a pager in the place of a killed one, write before older writes cannot arrive."""
    _replace(stack, Predecessors, "gone", lambda *_: True)


def _fills_over_present(stack: ExitStack) -> None:
    """Let what is copied replace pages that are present, which may be newer."""

    def fill(copy: VolumeCopy, start: int, end: int, fill: FillRun, done: Done) -> None:
        def ended(error: int) -> None:
            if not error:
                copy._add(start, end)
            done(error)

        fill(start, end, ended)

    _replace(stack, VolumeCopy, "_fill", fill)


def _relay_not_awaited(stack: ExitStack) -> None:
    """Acknowledge a change of a volume that is copied when its new device has it, and not the old one too."""

    def both(volume: CopyingVolume, on_target: Begin, on_relay: Begin, recording: bool, ended: Done) -> None:
        del volume, recording
        on_relay(lambda _error: None)
        on_target(ended)

    _replace(stack, CopyingVolume, "_both", both)


def _relays_side_by_side(stack: ExitStack) -> None:
    """Let a relay's new connection in while an older one may still change the volume."""

    async def replace(*_: object) -> None:
        pass

    _replace(stack, VolumeExports, "_replace_relay", replace)


def _copying_lent(stack: ExitStack) -> None:
    """Lend the owner a volume that is copied, whose absent pages read as zeros."""
    opened = VolumeExports._open_copying

    async def open_copying(
        exports: VolumeExports, name: str, wanted: ExportName, copying: Copying
    ) -> VolumeExport:
        export = await opened(exports, name, wanted, copying)
        export.lend = never_asked
        return export

    async def never_asked() -> Lent | None:
        return None

    _replace(stack, VolumeExports, "_open_copying", open_copying)


def _attempts_forgotten(stack: ExitStack) -> None:
    """Let a change of the definition that was not acknowledged go before a later one that was."""
    _replace(stack, definitions, "beyond", lambda definition, _attempted: definition)


def _promotions_off(stack: ExitStack) -> None:
    """Compare a promoted definition with others as if nobody had promoted it."""
    as_others = {"promoted_ms": 0}

    def not_promoted(definition: Definition, *others: Any, **how: Any) -> Promotion:
        plan = verification.promote(definition, *others, **how)
        return replace(plan, definition=plan.definition.model_copy(update=as_others))

    _replace(stack, definitions, "promote", not_promoted)


def _dead_workers_heard(stack: ExitStack) -> None:
    """Record what a dead worker has asked for after the next one was started, and do not tell that."""
    _replace(stack, ClientReplicas, "_is_replaced", lambda *_: False)
    _replace(stack, replicas, "_with_doubts", lambda order, _states: order)


def _freeze_off(stack: ExitStack) -> None:
    """Answer the accesses of a client that is released until its worker lets go of it."""
    _replace(stack, Freeze, "begin", lambda _freeze: None)
    _replace(stack, Freeze, "frozen", True)


MUTATIONS: dict[str, Callable[[ExitStack], None]] = {
    "quarantine_off": _quarantine_off,
    "epoch_checks_off": _epoch_checks_off,
    "checksums_off": _checksums_off,
    "leases_off": _leases_off,
    "stale_after_ack": _stale_after_ack,
    "predecessors_off": _predecessors_off,
    "fills_over_present": _fills_over_present,
    "relay_not_awaited": _relay_not_awaited,
    "relays_side_by_side": _relays_side_by_side,
    "copying_lent": _copying_lent,
    "attempts_forgotten": _attempts_forgotten,
    "promotions_off": _promotions_off,
    "dead_workers_heard": _dead_workers_heard,
    "freeze_off": _freeze_off,
}


@contextmanager
def mutated(name: str | None) -> Iterator[None]:
    """Take a protection away while the context lasts; none without a name."""
    with ExitStack() as stack:
        if name is not None:
            MUTATIONS[name](stack)
        yield
