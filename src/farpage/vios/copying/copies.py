"""The volumes that are copied to devices of this VIOS: who may open them how, and what their moves say.

What a volume's copying has in memory is made when it is first asked for, and goes when the definition says
that the move is over: finished, upon which the new device serves alone, or cancelled, upon which it serves no
more.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from farpage.address import parse_address
from farpage.blockio import BlockIO
from farpage.definition.model import PAGE_BYTES, Definition, Move, MoveState, ReplicaState
from farpage.device.base import EPOCH_MAX
from farpage.device.claim import Claim
from farpage.device.errors import VolumeFenced, VolumeTaken
from farpage.log import get_logger
from farpage.vios.copying.copy import PresenceStore, VolumeCopy
from farpage.vios.copying.errors import CopyIncomplete, IntermediaryDisplaced, NotCopied, ReplicaIncomplete
from farpage.vios.copying.fill import FillVolume
from farpage.vios.copying.presence import Presence, PresenceKey
from farpage.vios.copying.presencefile import (
    FOLDER_NAME,
    PresenceFile,
    remove_other_moves,
    remove_presence,
)
from farpage.vios.copying.relay import Dial, Relay, dial_nbd
from farpage.vios.copying.volume import CopyingVolume
from farpage.vios.figures import CopyFigures
from farpage.vios.model import CopyOrders, CopyState, CopyStatus, IntermediaryReport
from farpage.vios.names import ExportName
from farpage.vios.volumes import Definitions, Located, Volumes
from farpage.volume.refusal import Refusal, RefusalKind

log = get_logger()

SILENT_SECONDS = 5.0
"""So long after it was displaced is an intermediate client told to end; later it counts as a new one."""

FILL_EPOCH = EPOCH_MAX - 1
"""Fills go on whoever owns the volume; only that it is deleted stops them."""


class PresenceKeeper(PresenceStore, Protocol):
    """Where the presence of one volume is kept, from one process to the next."""

    def load(self) -> Presence:
        """Return what is stored.

        :raise OSError:
        """

    def remove(self) -> None:
        """Close and remove it."""


OpenStore = Callable[[Path, PresenceKey], PresenceKeeper]


class CutOff(Protocol):
    """Ends connections: answers further commands with ESHUTDOWN, waits for the device, and disconnects."""

    async def __call__(self, copying: Copying, claim: Claim | None) -> None:
        """Cut off the owner's connections under `claim`; with None everybody's, of owner and fillers."""


@dataclass(eq=False)
class Intermediary:
    """The intermediate client of a move, as it was last heard of."""

    report: IntermediaryReport
    seconds: float
    displaced: dict[str, float] = field(default_factory=dict)
    """When others were, by the addresses of their relays."""


@dataclass(eq=False)
class Copying:
    """One volume that is copied here."""

    move: Move
    located: Located
    copy: VolumeCopy
    keeper: PresenceKeeper
    relays: dict[Claim, Relay] = field(default_factory=dict)
    refusals: list[tuple[Claim, Refusal]] = field(default_factory=list)
    """What the old device's VIOS has said to owners who came over the relay."""
    over: bool = False

    def refuse(self, claim: Claim) -> None:
        """Refuse an owner whom the old device's VIOS has refused.

        :raise VolumeFenced: with its words.
        """
        for refused, refusal in self.refusals:
            taken = refusal.kind is RefusalKind.ANOTHER_OWNER
            if claim.owner == refused.owner and (taken or claim.epoch < refusal.epoch):
                kind = VolumeTaken if taken else VolumeFenced
                raise kind(self.move.volume, claim.epoch, refusal.epoch)

    def figures(self) -> CopyFigures:
        """Return what there is to say of it. Safe to call from any thread."""
        copy = self.copy
        return CopyFigures(
            volume=self.move.volume,
            present_bytes=copy.presence.count * PAGE_BYTES,
            total_bytes=copy.presence.pages * PAGE_BYTES,
            relay_connected=self.relay_connected,
            waiting_commands=self.waiting_commands,
            relayed_reads=copy.counters.relayed_reads,
            kept_pages=copy.counters.kept_pages,
            filled_pages=copy.counters.filled_pages,
        )

    @property
    def relay_connected(self) -> bool:
        """Whether the owner has a way to the old device."""
        return any(relay.connected for relay in self.relays.values())

    @property
    def waiting_commands(self) -> int:
        """Commands of the owner that wait for that way."""
        return sum(relay.waiting for relay in self.relays.values())


class Copies:
    """The volumes that are copied; used in the data plane's event loop unless something else is said."""

    def __init__(
        self,
        vios: str,
        volumes: Volumes,
        definitions: Definitions,
        state_dir: Path,
        *,
        dial: Dial = dial_nbd,
        open_store: OpenStore = PresenceFile,
        run: Callable[..., Awaitable[object]] = asyncio.to_thread,
        tidies: bool = True,
    ) -> None:
        """`run` calls what blocks on the state folder.

        One that `tidies` removes what moves that are over have left there; of several processes one does.
        """
        self._vios = vios
        self._volumes = volumes
        self._definitions = definitions
        self._folder = state_dir / FOLDER_NAME
        self._dial = dial
        self._open_store = open_store
        self._run = run
        self._tidies = tidies
        self._copies: dict[str, Copying] = {}
        """By the token of the move."""
        self._intermediaries: dict[str, Intermediary] = {}
        self._locks: dict[str, asyncio.Lock] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.cut_off: CutOff = _nobody
        self.client_in_flight: Callable[[str], int] = lambda volume: 0
        """Counts the commands of a volume's client that are under way."""
        self.client_commands: Callable[[str], int] = lambda volume: 0
        """Counts those that it has begun so far."""

    @property
    def all(self) -> tuple[Copying, ...]:
        """Return those that are in memory. Safe to call from any thread."""
        return tuple(self._copies.copy().values())

    # What the definition says

    def move_to(self, volume: str, device: str, definition: Definition | None = None) -> Move | None:
        """Return the move that brings a volume to a device over this VIOS, if there is one."""
        definition = definition or self._definitions.current()
        for move in definition.moves.values():
            if (move.volume, move.target, move.target_vios) == (volume, device, self._vios):
                return move
        return None

    def copied(self, wanted: ExportName) -> Move | None:
        """Return the move that an export's name asks for part in; None if its replica has everything already.

        :raise NotCopied: neither is so.
        """
        definition = self._definitions.current()
        move = self.move_to(wanted.volume, wanted.device, definition)
        if move is not None and move.source == wanted.source and move.state is not MoveState.RETIRING:
            return move
        if _state(definition, wanted.volume, wanted.device) is ReplicaState.IN_SYNC:
            return None
        raise NotCopied(wanted.volume, wanted.device, wanted.source, self._vios)

    def lacks_pages(self, volume: str) -> bool:
        """Tell whether a volume has a replica that does, somewhere."""
        return any(
            replica.state is ReplicaState.COPYING
            for client in self._definitions.current().clients.values()
            for record in client.volumes
            if record.name == volume
            for replica in record.replicas
        )

    def refuse_plain(self, volume: str, device: str) -> None:
        """Refuse a replica that lacks pages: they would read as zeros.

        :raise ReplicaIncomplete:
        """
        if _state(self._definitions.current(), volume, device) is ReplicaState.COPYING:
            raise ReplicaIncomplete(volume, device)

    def early_ends(self, definition: Definition) -> list[Move]:
        """Return the moves to here that would end with a definition."""
        return [
            move
            for move in self._definitions.current().moves.values()
            if move.target_vios == self._vios
            and move.state is not MoveState.RETIRING
            and _state(definition, move.volume, move.target) is ReplicaState.IN_SYNC
        ]

    async def refuse_early_end(self, definition: Definition, volume: str | None = None) -> None:
        """Refuse a definition in which a replica has everything that lacks pages here; only that of `volume`.

        :raise CopyIncomplete: naming the volume.
        """
        for move in self.early_ends(definition):
            if volume in (None, move.volume):
                copy = (await self.of(move)).copy
                if copy.stored_pages < copy.presence.pages:
                    raise CopyIncomplete(move.volume, copy.stored_pages, copy.presence.pages)

    def follow(self) -> None:
        """Do as the definition says now; what takes time is done in the background."""
        definition = self._definitions.current()
        moves = {move.principal: move for move in definition.moves.values()}
        for principal, copying in tuple(self._copies.items()):
            move = moves.get(principal)
            state = _state(definition, copying.move.volume, copying.move.target)
            if move is not None and move.state is not MoveState.RETIRING:
                copying.move = move
                copying.copy.recording = move.state is MoveState.COPYING
            else:
                self._end(copying, finished=state is ReplicaState.IN_SYNC)
        for principal in set(self._intermediaries) - set(moves):
            del self._intermediaries[principal]
        if self._tidies:
            self._begin(self._tidy())

    def _not_over(self) -> set[str]:
        moves = self._definitions.current().moves.values()
        return {move.principal for move in moves if move.state is not MoveState.RETIRING} | set(self._copies)

    async def _tidy(self) -> None:
        try:
            await self._run(remove_other_moves, self._folder, self._not_over)
        except OSError as error:
            log.error("presence_not_removed", problem=str(error))

    def _end(self, copying: Copying, *, finished: bool) -> None:
        del self._copies[copying.move.principal]
        copying.over = True
        log.info("copying_ended", volume=copying.move.volume, finished=finished)
        if finished:
            # Between two commands: what is on its way over the relay needs it no more.
            copying.copy.finished = True
            for relay in copying.relays.values():
                relay.drop()
        self._begin(self._close(copying, finished=finished))

    async def _close(self, copying: Copying, *, finished: bool) -> None:
        if not finished:
            await self.cut_off(copying, None)
        await copying.copy.close(store=False)
        try:
            await self._run(copying.keeper.remove)
        except OSError as error:
            log.error("presence_not_removed", volume=copying.move.volume, problem=str(error))

    def _begin(self, work: Awaitable[None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Opening

    async def of(self, move: Move) -> Copying:
        """Return what is shared by all who have a move's volume open.

        :raise VolumeMissing: the volume is not there.
        :raise DeviceUnusable: its device does not answer as it should.
        """
        async with self._locks.setdefault(move.principal, asyncio.Lock()):
            if move.principal in self._copies:
                return self._copies[move.principal]
            located = await self._volumes.find(move.volume, move.target)
            stat = located.stat
            key = PresenceKey(stat.id, move.principal, stat.size_bytes // PAGE_BYTES)
            keeper = self._open_store(self._folder, key)
            presence = await self._load(keeper)
            target = await located.device.open_volume(move.volume, FILL_EPOCH)
            copy = VolumeCopy(
                key,
                presence,
                keeper,
                target,
                self._run,
                client_in_flight=lambda: self.client_in_flight(move.volume),
            )
            copy.recording = move.state is MoveState.COPYING
            copying = self._copies[move.principal] = Copying(move, located, copy, keeper)
            log.info("copying", volume=move.volume, present=presence.count, pages=presence.pages)
        # The definition may have gone on meanwhile.
        self.follow()
        if copying.over:
            raise NotCopied(move.volume, move.target, move.source, self._vios)
        return copying

    async def _load(self, keeper: PresenceKeeper) -> Presence:
        loaded: list[Presence] = []

        def load() -> None:
            loaded.append(keeper.load())

        await self._run(load)
        return loaded[0]

    def owners_view(self, copying: Copying, claim: Claim, target: BlockIO) -> CopyingVolume:
        """Return the volume as its owner sees it, over its own way to the new device.

        :raise NotCopied: the move has ended.
        :raise VolumeFenced: the old device's VIOS has refused the owner.
        """
        move = copying.move
        if copying.over:
            raise NotCopied(move.volume, move.target, move.source, self._vios)
        copying.refuse(claim)
        relay = copying.relays.get(claim)
        if relay is None or relay.ended:
            name = ExportName(
                move.volume, claim.epoch, claim.owner, device=move.source, principal=move.principal
            )
            refused = partial(self._refused, copying, claim)
            relay = copying.relays[claim] = Relay(str(name), target.size_bytes, refused, self._dial)
            relay.on_ended = partial(self._relay_ended, copying, claim, relay)
            intermediary = self._intermediaries.get(move.principal)
            if intermediary is not None:
                relay.announce(parse_address(intermediary.report.relay))
        return CopyingVolume(copying.copy, target, relay.port())

    def fillers_view(self, copying: Copying) -> FillVolume:
        """Return the volume as the intermediate client fills it.

        :raise NotCopied: the move has ended, or the pages are not to be copied yet.
        """
        move = copying.move
        if copying.over or not copying.copy.fillable:
            raise NotCopied(move.volume, move.target, move.source, self._vios)
        return FillVolume(copying.copy, copying.located.device.limits)

    def _relay_ended(self, copying: Copying, claim: Claim, relay: Relay) -> None:
        if copying.relays.get(claim) is relay:
            del copying.relays[claim]

    def _refused(self, copying: Copying, claim: Claim, refusal: Refusal) -> None:
        copying.refusals.append((claim, refusal))
        self._begin(self.cut_off(copying, claim))

    # The intermediate client

    async def report(self, volume: str, device: str, report: IntermediaryReport) -> CopyOrders:
        """Take note of what an intermediate client says, and tell it what to do.

        :raise InvalidInput: its relay's address cannot be read.
        :raise IntermediaryDisplaced: another one has taken over.
        """
        address = parse_address(report.relay, field="relay")
        move = self.move_to(volume, device)
        if move is None or move.principal != report.principal:
            return CopyOrders(state=CopyState.GONE, present_bytes=0, total_bytes=0)
        self._take_note(move, report)
        if move.state is MoveState.RETIRING:
            total = (await self._volumes.find(volume, device)).stat.size_bytes
            return CopyOrders(state=CopyState.RETIRING, present_bytes=total, total_bytes=total)
        copying = await self.of(move)
        for relay in tuple(copying.relays.values()):
            relay.announce(address)
        waits = copying.move.paused or not copying.copy.recording
        return CopyOrders(
            state=CopyState.PAUSED if waits else CopyState.COPYING,
            bandwidth_bytes=copying.move.bandwidth_bytes,
            present_bytes=copying.copy.stored_pages * PAGE_BYTES,
            total_bytes=copying.copy.presence.pages * PAGE_BYTES,
            client_commands=self.client_commands(volume),
        )

    def _take_note(self, move: Move, report: IntermediaryReport) -> None:
        """The last to come does the work: one that was put in another's place is told to end.

        :raise IntermediaryDisplaced:
        """
        now = asyncio.get_running_loop().time()
        known = self._intermediaries.get(move.principal)
        if known is None:
            known = self._intermediaries[move.principal] = Intermediary(report, now)
        elif known.report.relay != report.relay:
            if now - known.displaced.get(report.relay, -SILENT_SECONDS) < SILENT_SECONDS:
                raise IntermediaryDisplaced(move.volume, known.report.relay)
            known.displaced[known.report.relay] = now
        known.report, known.seconds = report, now

    async def status(self, volume: str, device: str) -> CopyStatus:
        """Say how far a volume's copying is.

        :raise NotCopied: it is not copied there, and was not.
        """
        move = self.move_to(volume, device)
        if move is None or move.state is MoveState.RETIRING:
            if _state(self._definitions.current(), volume, device) is not ReplicaState.IN_SYNC:
                raise NotCopied(volume, device, "", self._vios)
            pages = (await self._volumes.find(volume, device)).stat.size_bytes // PAGE_BYTES
            return self._status(move, pages, pages)
        copying = await self.of(move)
        copy = copying.copy
        return self._status(move, copy.stored_pages, copy.presence.pages).model_copy(
            update={
                "relay_connected": copying.relay_connected,
                "waiting_commands": copying.waiting_commands,
                "relayed_reads": copy.counters.relayed_reads,
                "kept_pages": copy.counters.kept_pages,
                "filled_pages": copy.counters.filled_pages,
            }
        )

    def _status(self, move: Move | None, present_pages: int, total_pages: int) -> CopyStatus:
        intermediary = self._intermediaries.get(move.principal) if move else None
        now = asyncio.get_running_loop().time()
        return CopyStatus(
            principal=move.principal if move else None,
            present_pages=present_pages,
            total_pages=total_pages,
            relay_connected=False,
            intermediary=intermediary.report if intermediary else None,
            seen_seconds_ago=now - intermediary.seconds if intermediary else None,
            waiting_commands=0,
            relayed_reads=0,
            kept_pages=0,
            filled_pages=0,
        )

    # End

    def forget(self, volume_id: str) -> None:
        """Remove what is stored about a volume that was deleted. Blocks; for a thread.

        :raise OSError:
        """
        remove_presence(self._folder, volume_id)

    async def discard(self, volume_id: str) -> None:
        """Let go of a volume that is being deleted; its connections are cut off already."""
        for principal, copying in tuple(self._copies.items()):
            if copying.located.stat.id == volume_id:
                del self._copies[principal]
                copying.over = True
                await copying.copy.close(store=False)

    async def close(self) -> None:
        """Store what is present; every connection has ended."""
        if self._tasks:
            await asyncio.wait(self._tasks)
        for copying in self.all:
            await copying.copy.close()
        self._copies.clear()


async def _nobody(copying: Copying, claim: Claim | None) -> None:
    """There are no connections yet."""


def _state(definition: Definition, volume: str, device: str) -> ReplicaState | None:
    for client in definition.clients.values():
        for record in client.volumes:
            if record.name == volume:
                for replica in record.replicas:
                    if replica.device == device:
                        return replica.state
    return None
