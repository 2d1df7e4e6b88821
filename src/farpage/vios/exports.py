"""What a VIOS serves over NBD: its volumes under the names that `farpage.vios.names` describes."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Final

from farpage.blockio import BlockIO
from farpage.definition.model import Move
from farpage.device.base import never
from farpage.device.claim import Claim
from farpage.device.errors import DeviceUnusable, VolumeMissing
from farpage.errors import FarpageError, InvalidInput
from farpage.log import get_logger
from farpage.nbd.errors import ExportRefused
from farpage.nbd.export import Counters, Export, ExportInfo, Peer
from farpage.nbd.protocol import NBD_REP_ERR_PLATFORM, NBD_REP_ERR_UNKNOWN
from farpage.nbd.server import Server, ServerConnection
from farpage.vios.commands import ConvertedVolume, offered_features
from farpage.vios.copying.copies import Copies, Copying
from farpage.vios.copying.errors import NotCopied, NotGranted
from farpage.vios.copying.fill import FillVolume
from farpage.vios.copying.volume import COPYING_FEATURES, CopyingVolume, page_limits
from farpage.vios.errors import DeviceHangs, LeaseOver
from farpage.vios.figures import Figures
from farpage.vios.grants import authorize
from farpage.vios.leases import GivesLeases, LeaseExport, Leases, parse_lease_name
from farpage.vios.names import ExportName, parse_export_name, place_of, refusal_text
from farpage.vios.volumes import Located, Volumes, if_it_answers

LATE_MAX: Final = 4
"""Clients of a volume that have gone and that its device has not done with: so many, and nobody gets in."""

log = get_logger()


@dataclass(eq=False)
class VolumeExport(Export):
    """One connection's hold on a volume, with what fencing looks at."""

    volume_id: str = ""
    epoch: int | None = None
    wanted: ExportName | None = None
    copying: Copying | None = None
    """What is copied to the volume, and is shared by all who have it open."""


class VolumeExports:
    """The NBD server's `ExportProvider`, and the volumes' `Holders`."""

    def __init__(
        self,
        volumes: Volumes,
        leases: GivesLeases | None = None,
        copies: Copies | None = None,
        *,
        adopts: bool = False,
    ) -> None:
        """Without `copies` nothing is copied to volumes of this VIOS.

        One that `adopts` clients serves those that another process has accepted.
        """
        self._volumes = volumes
        self.copies = copies
        self.leases: GivesLeases = leases or Leases()
        self._holds: set[VolumeExport] = set()
        self._closing: dict[asyncio.Task[None], str] = {}
        self.counters: dict[str, Counters] = {}
        """By volume name, summed over all connections since the start. Safe to look at from any thread."""
        self.refused = 0
        """Opens that were refused."""
        self.fenced = 0
        """Connections that a newer owner has cut off."""
        self.server = Server(self, adopts=adopts)
        volumes.holders = self
        if copies is not None:
            copies.cut_off = self._cut_off
            copies.client_in_flight = lambda volume: self._counters(volume).in_flight
            copies.client_commands = lambda volume: _begun(self._counters(volume))

    # ExportProvider

    async def open(self, name: str, peer: Peer) -> Export:
        """Open a volume; for an owner this raises its epoch first and cuts older owners off.

        :raise ExportRefused: the name, the epoch, or the device does not allow it.
        """
        lease_id = parse_lease_name(name)
        if lease_id is not None:
            return self._open_lease(name, lease_id)
        try:
            wanted = self._wanted(name)
            export = await self._open(name, wanted)
        except FarpageError as error:
            self.refused += 1
            raise refusal(name, error) from error
        # From here to the return nothing is waited for: a fence must not miss it.
        export.on_closed = lambda: self._closed(export)
        self._holds.add(export)
        log.info("opened", volume=wanted.volume, epoch=wanted.epoch, export=name, pid=peer.pid)
        return export

    async def _open(self, name: str, wanted: ExportName) -> VolumeExport:
        move = self._copied(wanted)
        if move is not None and self.copies is not None:
            copying = await self.copies.of(move)
            if wanted.principal:
                return self._open_to_fill(name, wanted, copying)
            return await self._open_copying(name, wanted, copying)
        await self._refuse_incomplete(wanted)
        claim, over = _claim(wanted), self._leave_to_write(wanted)
        if wanted.principal and claim is not None:
            await self._replace_relay(wanted, claim)
        located, volume = await self._volumes.open(wanted.volume, claim, over, wanted.device)
        export = self._export(name, wanted, located, volume, self._counters(wanted.volume))
        if claim is not None and not wanted.principal:
            export.lend = volume.lend
        return export

    def _wanted(self, name: str) -> ExportName:
        """Understand what a client asks for, if it may and if what others have left behind lets it.

        :raise InvalidInput: it is no export name.
        :raise NotGranted: a principal without a grant.
        :raise DeviceHangs: clients who have gone still wait; each that comes would be one more of them.
        """
        wanted = parse_export_name(name)
        authorize(self._volumes.definition, wanted)
        place = place_of(name)
        late = sum(_is_late(connection, place) for connection in self.server.connections)
        if late >= LATE_MAX:
            raise DeviceHangs(wanted.volume, late)
        return wanted

    async def _refuse_incomplete(self, wanted: ExportName) -> None:
        """Refuse a replica that lacks pages, which would read as zeros.

        :raise ReplicaIncomplete:
        """
        if self.copies is not None and self.copies.lacks_pages(wanted.volume):
            located = await self._volumes.find(wanted.volume, wanted.device)
            self.copies.refuse_plain(wanted.volume, located.device.id)

    def _copied(self, wanted: ExportName) -> Move | None:
        """Return the move that a name asks for part in; None if it asks for a volume that is whole.

        :raise NotCopied: there is no such move here.
        """
        if not wanted.source:
            return None
        if self.copies is None:
            raise NotCopied(wanted.volume, wanted.device, wanted.source, "")
        move = self.copies.copied(wanted)
        if move is None and wanted.principal:
            raise NotCopied(wanted.volume, wanted.device, wanted.source, "")
        if wanted.epoch is None and not wanted.principal:
            raise InvalidInput(
                "export", "a volume that is copied has no read-only view", "open it under the owner's epoch"
            )
        return move

    async def _open_copying(self, name: str, wanted: ExportName, copying: Copying) -> VolumeExport:
        assert self.copies is not None
        claim = _claim(wanted) or Claim()
        copying.refuse(claim)
        views: list[CopyingVolume] = []

        def layer(target: BlockIO) -> BlockIO:
            assert self.copies is not None
            views.append(self.copies.owners_view(copying, claim, target))
            return views[0]

        over = self._leave_to_write(wanted)
        located, volume = await self._volumes.open(wanted.volume, claim, over, wanted.device, layer)
        export = self._export(name, wanted, located, volume, self._counters(wanted.volume))
        export.copying, export.on_given_up = copying, views[0].give_up
        return export

    def _open_to_fill(self, name: str, wanted: ExportName, copying: Copying) -> VolumeExport:
        assert self.copies is not None
        located = copying.located
        fill = self.copies.fillers_view(copying)
        volume = ConvertedVolume(fill, self._volumes.commands(located.device))
        # Its commands are not the client's, which copying gives way to.
        export = self._export(name, wanted, located, volume, Counters())
        export.copying = copying
        return export

    async def _replace_relay(self, wanted: ExportName, claim: Claim) -> None:
        """Cut the relay's connection off that is there already, and wait for what it has under way.

        What it was sent may have been repeated over the new one, and must not come after what is sent later.
        """
        located = await self._volumes.find(wanted.volume, wanted.device)
        self._volumes.refuse(located, claim)
        older = [
            hold
            for hold in self._holds
            if hold.volume_id == located.stat.id
            and hold.epoch is not None
            and hold.wanted is not None
            and hold.wanted.principal == wanted.principal
        ]
        if older:
            log.info("relay_replaced", exports=sorted({hold.name for hold in older}))
            await self.server.fence(lambda export: export in older)

    def _export(
        self, name: str, wanted: ExportName, located: Located, volume: BlockIO, counters: Counters
    ) -> VolumeExport:
        return VolumeExport(
            name=name,
            io=volume,
            description=_description(located, wanted),
            counters=counters,
            volume_id=located.stat.id,
            epoch=wanted.epoch,
            wanted=wanted,
        )

    def _counters(self, volume: str) -> Counters:
        return self.counters.setdefault(volume, Counters())

    def _leave_to_write(self, wanted: ExportName) -> Callable[[], bool]:
        """Return what tells when the owner's leave to write is over.

        :raise LeaseOver: it is already.
        """
        if not wanted.lease:
            return never
        lease = self.leases.find(wanted.lease)
        if lease is None:
            raise LeaseOver(wanted.volume, wanted.lease)
        return lease.over

    def _open_lease(self, name: str, identifier: str) -> Export:
        lease = self.leases.begin(identifier)
        if lease is None:
            self.refused += 1
            raise ExportRefused.forbidden(f"lease {identifier} is somebody else's, or there are too many")
        return Export(
            name=name,
            io=lease,
            description="a lease",
            on_closed=lambda: self.leases.end(identifier),
        )

    async def describe(self, name: str, peer: Peer) -> ExportInfo:
        """Describe a volume; nothing is opened, no epoch rises.

        :raise ExportRefused: as `open` would.
        """
        if parse_lease_name(name) is not None:
            return ExportInfo(LeaseExport.size_bytes, description="a lease")
        try:
            wanted = self._wanted(name)
            copied = self._copied(wanted) is not None
            if not copied:
                await self._refuse_incomplete(wanted)
            located = await self._volumes.find(wanted.volume, wanted.device)
            claim = _claim(wanted)
            if claim is not None:
                self._volumes.refuse(located, claim)
        except FarpageError as error:
            raise refusal(name, error) from error
        device, features = located.device, located.device.features
        if copied:
            features = features & COPYING_FEATURES if claim else FillVolume.features
        return ExportInfo(
            size_bytes=located.stat.size_bytes,
            read_only=claim is None and not copied,
            limits=page_limits(device.limits) if copied else device.limits,
            features=offered_features(features, self._volumes.commands(device)),
            description=_description(located, wanted),
        )

    async def names(self, peer: Peer) -> list[tuple[str, str]]:
        """List the read-only names: an owner knows its epoch. A device that does not answer is left out."""
        devices = list(self._volumes.devices)
        listed = await asyncio.gather(*(if_it_answers(device, device.names) for device in devices))
        return sorted(
            (name, f"on device {device.name}")
            for device, names in zip(devices, listed, strict=True)
            for name in names or ()
        )

    # Holders

    async def fence(self, volume_id: str, epoch: int | None) -> None:
        """Cut off who is older, and return when their commands have left the device."""
        older = [
            hold
            for hold in self._holds
            if hold.volume_id == volume_id
            and (epoch is None or (hold.epoch is not None and hold.epoch < epoch))
        ]
        if not older:
            if epoch is None and self.copies is not None:
                await self.copies.discard(volume_id)
            return
        self.fenced += len(older)
        log.warning("fencing", exports=sorted({hold.name for hold in older}), newer_epoch=epoch)
        await self.server.fence(lambda export: export in older)
        log.info("fenced", exports=sorted({hold.name for hold in older}), newer_epoch=epoch)
        if epoch is None and self.copies is not None:
            await self.copies.discard(volume_id)

    async def _cut_off(self, copying: Copying, claim: Claim | None) -> None:
        """Cut off those who have a volume open that is copied: its owner under `claim`, or everybody."""

        def matches(export: Export) -> bool:
            if not isinstance(export, VolumeExport) or export.copying is not copying:
                return False
            return claim is None or (export.wanted is not None and _claim(export.wanted) == claim)

        if any(map(matches, self._holds)):
            log.warning("copying_cut_off", volume=copying.move.volume, epoch=claim.epoch if claim else None)
            await self.server.fence(matches)

    def follow_definition(self) -> None:
        """Do what a new definition asks for: end moves, and cut principals off whose grants are gone."""
        if self.copies is not None:
            self.copies.follow()
        definition, revoked = self._volumes.definition, set()
        for hold in self._holds:
            try:
                if hold.wanted is not None:
                    authorize(definition, hold.wanted)
            except NotGranted as error:
                log.warning("grant_revoked", export=hold.name, principal=error.principal)
                revoked.add(hold)
        if revoked:
            task = asyncio.get_running_loop().create_task(self.server.fence(lambda export: export in revoked))
            self._closing[task] = ""
            task.add_done_callback(self._closing.pop)

    def figures(self) -> Figures:
        """Return what is counted. Safe to call from any thread."""
        counters = {volume: replace(counters) for volume, counters in self.counters.copy().items()}
        for connection in self.server.connections:
            export = connection.export
            if isinstance(export, VolumeExport) and export.wanted and export.wanted.volume in counters:
                counters[export.wanted.volume].in_flight += connection.in_flight_past_counters
        return Figures(
            counters=counters,
            connections=dict(Counter(hold.volume_id for hold in tuple(self._holds))),
            refused=self.refused,
            fenced=self.fenced,
            copies=[copying.figures() for copying in self.copies.all] if self.copies else [],
        )

    async def settle(self, volume_id: str) -> int:
        """Wait for the holds that are about to end, and count the others."""
        ending = [task for task, volume in self._closing.items() if volume == volume_id]
        if ending:
            await asyncio.wait(ending)
        return self.connections(volume_id)

    def connections(self, volume_id: str) -> int:
        """Count the connections that have a volume open. Safe to call from any thread."""
        return sum(hold.volume_id == volume_id for hold in tuple(self._holds))

    def has_open(self, volume: str) -> bool:
        """Tell whether anybody has a volume of that name open, on whichever device."""
        return any(hold.wanted is not None and hold.wanted.volume == volume for hold in self._holds)

    @property
    def open_exports(self) -> int:
        """Count all connections that have a volume open. Safe to call from any thread."""
        return len(self._holds)

    async def close(self) -> None:
        """Disconnect everybody and close the volumes."""
        await self.server.close()
        if self._closing:
            await asyncio.wait(tuple(self._closing))
        if self.copies is not None:
            await self.copies.close()

    def _closed(self, export: VolumeExport) -> None:
        self._holds.discard(export)
        task = asyncio.get_running_loop().create_task(_close(export.io))
        self._closing[task] = export.volume_id
        task.add_done_callback(self._closing.pop)
        log.info("closed", export=export.name)


async def _close(volume: BlockIO) -> None:
    try:
        await volume.close()
    except Exception:
        log.exception("close_failed")


def _is_late(connection: ServerConnection, place: str) -> bool:
    """Tell whether the client has gone and the device at `place` has not done with what it asked for."""
    export = connection.export
    if place_of(export.name if export else connection.asked) != place:
        return False
    if isinstance(export, VolumeExport) and export.copying is not None and not connection.closed:
        return False  # it may be the intermediate client that is waited for, until the socket is closed
    busy = connection.asked or connection.in_flight or connection.in_flight_past_counters
    return bool(busy) and connection.left


def _begun(counters: Counters) -> int:
    return counters.reads + counters.writes + counters.others + counters.errors + counters.in_flight


def _claim(wanted: ExportName) -> Claim | None:
    """Return what an owner claims; None for a read-only view."""
    return None if wanted.epoch is None else Claim(wanted.epoch, wanted.owner)


def _description(located: Located, wanted: ExportName) -> str:
    view = "read-only view" if wanted.epoch is None else f"epoch {wanted.epoch}"
    if wanted.source:
        view += f", copied from device {wanted.source}"
    return f"{wanted.volume} on device {located.device.name}, {view}"


def refusal(name: str, error: FarpageError) -> ExportRefused:
    """Turn an error into the reply that NBD has for it."""
    match error:
        case VolumeMissing():
            return ExportRefused.unknown(name[:80])
        case InvalidInput():
            return ExportRefused(NBD_REP_ERR_UNKNOWN, str(error))
        case DeviceUnusable() | DeviceHangs():
            return ExportRefused(NBD_REP_ERR_PLATFORM, error.cause)
    return ExportRefused.forbidden(refusal_text(error))
