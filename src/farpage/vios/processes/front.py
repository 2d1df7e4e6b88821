"""The front of a VIOS with data processes: it listens, negotiates, keeps the definition and gives leases.

All else about a volume is asked of the process that the volume belongs to.
"""

from __future__ import annotations

import asyncio
import socket
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from farpage.definition.document import canonical_json
from farpage.definition.model import Definition
from farpage.definition.rules import claims
from farpage.definition.store import EpochStore
from farpage.device.base import Admit, PagingDevice, admit_all
from farpage.device.claim import Claim
from farpage.device.errors import DeviceUnusable, VolumeMissing
from farpage.device.spec import MemorySpec, RemoteSpec, parse_spec
from farpage.errors import FarpageError, InvalidInput
from farpage.log import get_logger
from farpage.nbd.errors import ExportRefused
from farpage.nbd.export import ExportInfo, Peer
from farpage.nbd.negotiation import Agreed, Enter
from farpage.nbd.protocol import NBD_REP_ERR_PLATFORM
from farpage.vios.copying.copies import Copies
from farpage.vios.exports import VolumeExports, refusal
from farpage.vios.figures import Figures, ViosState, merged
from farpage.vios.leases import parse_lease_name
from farpage.vios.model import CopyOrders, CopyStatus, IntermediaryReport, VolumeInfo
from farpage.vios.processes import messages as m
from farpage.vios.processes.errors import DataProcessAway, DataProcessLost
from farpage.vios.processes.leasetable import LeaseTable
from farpage.vios.processes.process import DataProcess, Start
from farpage.vios.processes.routing import Routing
from farpage.vios.remembered import RememberedDevice
from farpage.vios.service import ViosService
from farpage.vios.volumes import Located, Volumes

log = get_logger()

EARLY_END_SECONDS = 10.0
"""So long a process may take to say whether a copied volume is whole."""


class FrontExports(VolumeExports):
    """Hands clients over to the processes of the volumes that they ask for; serves leases by itself."""

    def __init__(self, volumes: Volumes, leases: LeaseTable, copies: Copies, routing: Routing) -> None:
        super().__init__(volumes, leases, copies)
        self.server.hand_over = self._hand_over
        self._routing = routing
        self._table = leases

    async def _hand_over(self, sock: socket.socket, step: Enter, agreed: Agreed, peer: Peer) -> bool:
        if parse_lease_name(step.name) is not None:
            return False
        try:
            wanted = self._wanted(step.name)
            if wanted.lease and peer.pid is not None and not step.wants_process:
                raise _needs_process(step.name)
            async with self._routing.using(wanted.volume, wanted.device) as process:
                opened = await _opened(process, m.Open.of(step, agreed), sock)
        except FarpageError as error:
            self.refused += 1
            raise _refusal(step.name, error) from error
        if opened.refusal is not None:
            raise ExportRefused(opened.refusal.reply_type, opened.refusal.message)
        return True

    async def describe(self, name: str, peer: Peer) -> ExportInfo:
        """Have the volume's process describe it.

        :raise ExportRefused: as an open would be.
        """
        if parse_lease_name(name) is not None:
            return await super().describe(name, peer)
        try:
            wanted = self._wanted(name)
            async with self._routing.using(wanted.volume, wanted.device) as process:
                described = await process.ask("describe", m.Volume(name=name), m.Described)
        except FarpageError as error:
            raise _refusal(name, error) from error
        if described.refusal is not None:
            raise ExportRefused(described.refusal.reply_type, described.refusal.message)
        return described.info

    def figures(self) -> Figures:
        """Return what is counted here and, as of the last refresh, in the processes."""
        return merged((super().figures(), *self._routing.figures))

    def connections(self, volume_id: str) -> int:
        """Count the connections that have a volume open, as of the last refresh."""
        return sum(figures.connections.get(volume_id, 0) for figures in self._routing.figures)

    @property
    def open_exports(self) -> int:
        """Count all connections that have a volume open, as of the last look."""
        return self._routing.open_exports

    async def close(self) -> None:
        """Listen no more, and have the processes finish what is in flight."""
        await asyncio.gather(super().close(), self._routing.stop())
        self._table.close()


@dataclass
class FrontService(ViosService):
    """The VIOS for its API, where data processes serve its volumes."""

    routing: Routing | None = None
    epochs: EpochStore | None = None
    leases: LeaseTable | None = None

    @property
    def _processes(self) -> Routing:
        assert self.routing is not None
        return self.routing

    async def begin(self) -> None:
        """Have the processes serve the devices that are open here.

        :raise DataProcessAway: one of them does not come up.
        """
        for process in self._processes.processes:
            process.on_up = self._up_again
        await self._processes.begin(self.volumes, self._start, self._asked)

    def _start(self) -> Start:
        assert self.epochs is not None and self.leases is not None
        devices = [device.spec for device in self.volumes.devices]
        state_dir = str(self.handovers.state_dir)
        return Start(
            m.Begin(
                vios=self.name,
                state_dir=state_dir,
                lease_seconds=self.leases.lease_seconds,
                devices=devices,
            ),
            files=(self._definition(), m.encoded(self.epochs.all())),
            descriptors=(self.leases.descriptor,),
        )

    def _definition(self) -> bytes:
        return canonical_json(self.definitions.current()).encode()

    async def _asked(self, method: str, parameters: Any, _descriptors: list[int]) -> m.Nothing:
        """Answer a data process."""
        assert self.epochs is not None
        about = m.Epoch.model_validate(parameters)
        if method == "epoch":
            await asyncio.to_thread(self.epochs.raise_to, about.volume_id, about.epoch, about.owner)
        else:
            await asyncio.to_thread(self.epochs.forget, about.volume_id)
        return m.Nothing()

    def _up_again(self, process: DataProcess) -> None:
        """Give the volumes of a process that was lost to their owners: claims may have been lost with it."""
        routes = self._processes.routes
        self.begin_claims(
            {
                volume: claim
                for volume, claim in claims(self.definitions.current()).items()
                if volume in routes and routes.of(volume) == process.index
            }
        )

    # What it tells

    async def look(self) -> None:
        """Ask the processes how many are connected."""
        await self._on_data(self._processes.look())

    async def refresh(self) -> None:
        """Ask the processes for what they have counted."""
        await self._on_data(self._processes.refresh())

    @property
    def data_processes(self) -> tuple[int, ...]:
        """The processes that serve volumes."""
        return self._processes.pids

    def state(self) -> ViosState:
        """Say what metrics tell, over all processes."""
        revision = self.definitions.current().revision
        processes, restarts = len(self._processes.pids), self._processes.restarts
        return ViosState(self.exports.figures(), self.exports.leases.alive, revision, processes, restarts)

    async def _list_volumes(self) -> tuple[VolumeInfo, ...]:
        await self._processes.refresh()
        return await super()._list_volumes()

    async def _volume(self, name: str) -> VolumeInfo:
        await self._processes.refresh()
        return await super()._volume(name)

    # Devices

    async def serve_device(
        self, wanted: RememberedDevice, *, force: bool = False, admit: Admit = admit_all
    ) -> PagingDevice:
        """Open a device here and then in the processes.

        :raise InvalidInput: it is of a kind that several processes cannot share.
        """
        _refuse_unshared(wanted.spec)
        device = await super().serve_device(wanted, force=force, admit=admit)
        await self._processes.tell_device(device.spec)
        return device

    async def serve_from_start(self, device: RememberedDevice) -> DeviceUnusable | None:
        """Open a device at the VIOS's start.

        :raise InvalidInput: it is of a kind that several processes cannot share.
        """
        _refuse_unshared(device.spec)
        return await super().serve_from_start(device)

    # Volumes

    async def _open_volume(self, name: str, epoch: int, owner: str, device: str) -> VolumeInfo:
        async with self._processes.using(name, device) as process:
            wanted = m.Volume(name=name, device=device, epoch=epoch, owner=owner)
            await process.ask("claim", wanted, m.Nothing)
            await process.refresh()
            return self._volume_info(await self.volumes.find(name, device))

    async def _delete_volume(self, name: str, epoch: int | None, device: str) -> None:
        async with self._processes.using(name, device) as process:
            wanted = m.Volume(name=name, device=device, epoch=epoch)
            deleted = await process.ask("delete", wanted, m.Deleted)
            if not deleted.open:
                self._processes.routes.deleted(name)

    async def owned(self, name: str, device: str, claim: Claim) -> Located:
        """Find a volume for its owner, whom its process knows."""
        return await self._asked_for("refuse", name, device, claim)

    async def flushed(self, name: str, device: str, claim: Claim) -> Located:
        """Have a volume's process flush what was written to it."""
        return await self._asked_for("flush", name, device, claim)

    async def _asked_for(self, method: str, name: str, device: str, claim: Claim) -> Located:
        async with self._processes.using(name, device) as process:
            wanted = m.Volume(name=name, device=device, epoch=claim.epoch, owner=claim.owner)
            answered = await process.ask(method, wanted, m.VolumeId)
        located = await self.volumes.find(name, answered.device)
        if located.stat.id != answered.volume_id:  # it was deleted since, and made anew
            raise VolumeMissing(name, f"device {located.device.name!r}")
        return located

    async def claim_all(self, wanted: dict[str, tuple[int, str]]) -> None:
        """Have volumes given to the owners in the definition; what fails is logged."""
        shares: dict[DataProcess, dict[str, tuple[int, str]]] = {}
        async with AsyncExitStack() as stack:
            for volume, claim in sorted(wanted.items()):
                try:
                    process = await stack.enter_async_context(self._processes.holding(volume))
                except VolumeMissing:
                    continue
                except FarpageError as error:
                    log.error("claim_failed", volume=volume, epoch=claim[0], problem=str(error))
                else:
                    shares.setdefault(process, {})[volume] = claim
            await asyncio.gather(*(_claim_share(process, share) for process, share in shares.items()))

    # Moves

    async def _intermediary(self, name: str, device: str, report: IntermediaryReport) -> CopyOrders:
        about = m.Report(name=name, device=device, report=report.model_dump_json())
        async with self._processes.using(name, device) as process:
            answer = await process.ask("intermediary", about, m.Document)
        return CopyOrders.model_validate_json(answer.json)

    async def _copy_status(self, name: str, device: str) -> CopyStatus:
        async with self._processes.using(name, device) as process:
            answer = await process.ask("copy_status", m.Report(name=name, device=device), m.Document)
        return CopyStatus.model_validate_json(answer.json)

    async def _refuse_early_end(self, definition: Definition) -> None:
        for move in self._copies.early_ends(definition):
            async with self._processes.using(move.volume, move.target) as process:
                about, files = m.Volume(name=move.volume), [canonical_json(definition).encode()]
                await process.ask("early_end", about, m.Nothing, files=files, seconds=EARLY_END_SECONDS)

    # Definition

    async def _told(self) -> None:
        await self._on_data(self._processes.tell_definition(self._definition))


async def _opened(process: DataProcess, wanted: m.Open, sock: socket.socket) -> m.Opened:
    """Give a client to a process.

    :raise ConnectionAbortedError: the process has ended or failed; it may have answered the client already.
    """
    try:
        return await process.ask("open", wanted, m.Opened, descriptors=[sock.fileno()])
    except FarpageError as error:
        raise ConnectionAbortedError(str(error)) from error


async def _claim_share(process: DataProcess, share: dict[str, tuple[int, str]]) -> None:
    try:
        await process.until_up()
        await process.ask("claims", m.Nothing(), m.Nothing, files=[m.encoded(m.Claims(wanted=share))])
    except (DataProcessAway, DataProcessLost):
        return  # the one that is started in its place is asked again
    except FarpageError as error:
        log.error("claim_failed", volumes=sorted(share), problem=str(error))


def _refuse_unshared(spec: str) -> None:
    """Refuse a device that several processes cannot share as safely as one VIOS does.

    :raise InvalidInput:
    """
    parsed = parse_spec(spec)
    if isinstance(parsed, MemorySpec | RemoteSpec):
        why = "is in the memory of one" if isinstance(parsed, MemorySpec) else "has no locks between several"
        hint = "run the VIOS without --workers for it, or use a dir: or block: device"
        raise InvalidInput("device", f"{spec}: a device of this kind {why} process", hint)


def _refusal(name: str, error: FarpageError) -> ExportRefused:
    if isinstance(error, DataProcessAway):
        return ExportRefused(NBD_REP_ERR_PLATFORM, error.cause)
    return refusal(name, error)


def _needs_process(name: str) -> InvalidInput:
    """Say why an owner is refused who would take the end of the front for that of its writes."""
    problem = f"{name[:80]!r} is served by a data process, which the client does not ask for"
    return InvalidInput("export", problem, "use a hypervisor of the VIOS' version")
