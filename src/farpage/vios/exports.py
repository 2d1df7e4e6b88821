"""What a VIOS serves over NBD: its volumes under the names that `farpage.vios.names` describes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass

from farpage.blockio import BlockIO
from farpage.device.base import never
from farpage.device.claim import Claim
from farpage.device.errors import DeviceUnusable, VolumeMissing
from farpage.errors import FarpageError, InvalidInput
from farpage.log import get_logger
from farpage.nbd.errors import ExportRefused
from farpage.nbd.export import Counters, Export, ExportInfo, Peer
from farpage.nbd.protocol import NBD_REP_ERR_PLATFORM, NBD_REP_ERR_UNKNOWN
from farpage.nbd.server import Server
from farpage.vios.commands import offered_features
from farpage.vios.errors import LeaseOver, NotServed
from farpage.vios.leases import LeaseExport, Leases, parse_lease_name
from farpage.vios.names import ExportName, parse_export_name, refusal_text
from farpage.vios.volumes import Located, Volumes

log = get_logger()


@dataclass(eq=False)
class VolumeExport(Export):
    """One connection's hold on a volume, with what fencing looks at."""

    volume_id: str = ""
    epoch: int | None = None


class VolumeExports:
    """The NBD server's `ExportProvider`, and the volumes' `Holders`."""

    def __init__(self, volumes: Volumes, leases: Leases | None = None) -> None:
        self._volumes = volumes
        self.leases = leases or Leases()
        self._holds: set[VolumeExport] = set()
        self._closing: dict[asyncio.Task[None], str] = {}
        self.counters: dict[str, Counters] = {}
        """By volume name, summed over all connections since the start. Safe to look at from any thread."""
        self.refused = 0
        """Opens that were refused."""
        self.fenced = 0
        """Connections that a newer owner has cut off."""
        self.server = Server(self)
        volumes.holders = self

    # ExportProvider

    async def open(self, name: str, peer: Peer) -> Export:
        """Open a volume; for an owner this raises its epoch first and cuts older owners off.

        :raise ExportRefused: the name, the epoch, or the device does not allow it.
        """
        lease_id = parse_lease_name(name)
        if lease_id is not None:
            return self._open_lease(name, lease_id)
        try:
            wanted = _plain(parse_export_name(name))
            over = self._leave_to_write(wanted)
            located, volume = await self._volumes.open(wanted.volume, _claim(wanted), over, wanted.device)
        except FarpageError as error:
            self.refused += 1
            raise _refusal(name, error) from error
        counters = self.counters.setdefault(wanted.volume, Counters())
        export = VolumeExport(
            name=name,
            io=volume,
            description=_description(located, wanted),
            counters=counters,
            volume_id=located.stat.id,
            epoch=wanted.epoch,
        )
        export.on_closed = lambda: self._closed(export)
        self._holds.add(export)
        log.info("opened", volume=wanted.volume, epoch=wanted.epoch, device=located.device.name, pid=peer.pid)
        return export

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
            raise ExportRefused.forbidden(f"lease {identifier} is somebody else's")
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
            wanted = _plain(parse_export_name(name))
            located = await self._volumes.find(wanted.volume, wanted.device)
            claim = _claim(wanted)
            if claim is not None:
                self._volumes.refuse(located, claim)
        except FarpageError as error:
            raise _refusal(name, error) from error
        device = located.device
        return ExportInfo(
            size_bytes=located.stat.size_bytes,
            read_only=wanted.epoch is None,
            limits=device.limits,
            features=offered_features(device.features, self._volumes.commands(device)),
            description=_description(located, wanted),
        )

    def names(self, peer: Peer) -> list[tuple[str, str]]:
        """List the read-only names: an owner knows its epoch."""
        found: list[tuple[str, str]] = []
        for device in self._volumes.devices:
            try:
                found += [(name, f"on device {device.name}") for name in device.names()]
            except DeviceUnusable as error:
                log.error("device_unusable", device=device.name, problem=error.cause)
        return sorted(found)

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
            return
        self.fenced += len(older)
        log.warning("fencing", exports=sorted({hold.name for hold in older}), newer_epoch=epoch)
        await self.server.fence(lambda export: export in older)
        log.info("fenced", exports=sorted({hold.name for hold in older}), newer_epoch=epoch)

    async def settle(self, volume_id: str) -> int:
        """Wait for the holds that are about to end, and count the others."""
        ending = [task for task, volume in self._closing.items() if volume == volume_id]
        if ending:
            await asyncio.wait(ending)
        return self.connections(volume_id)

    def connections(self, volume_id: str) -> int:
        """Count the connections that have a volume open. Safe to call from any thread."""
        return sum(hold.volume_id == volume_id for hold in tuple(self._holds))

    @property
    def open_exports(self) -> int:
        """Count all connections that have a volume open. Safe to call from any thread."""
        return len(self._holds)

    async def close(self) -> None:
        """Disconnect everybody and close the volumes."""
        await self.server.close()
        if self._closing:
            await asyncio.wait(tuple(self._closing))

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


def _plain(wanted: ExportName) -> ExportName:
    """Return a name that asks for a volume as it is.

    :raise NotServed: it asks for part in a move.
    """
    if wanted.source or wanted.principal:
        raise NotServed(wanted.volume)
    return wanted


def _claim(wanted: ExportName) -> Claim | None:
    """Return what an owner claims; None for a read-only view."""
    return None if wanted.epoch is None else Claim(wanted.epoch, wanted.owner)


def _description(located: Located, wanted: ExportName) -> str:
    view = "read-only view" if wanted.epoch is None else f"epoch {wanted.epoch}"
    return f"{wanted.volume} on device {located.device.name}, {view}"


def _refusal(name: str, error: FarpageError) -> ExportRefused:
    """Turn an error into the reply that NBD has for it."""
    match error:
        case VolumeMissing():
            return ExportRefused.unknown(name[:80])
        case InvalidInput():
            return ExportRefused(NBD_REP_ERR_UNKNOWN, str(error))
        case DeviceUnusable():
            return ExportRefused(NBD_REP_ERR_PLATFORM, error.cause)
    return ExportRefused.forbidden(refusal_text(error))
