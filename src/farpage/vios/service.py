"""What the control API does, as calls into the data plane."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Coroutine, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from farpage import __version__
from farpage.blockio import BlockIO, Feature, wait_done
from farpage.definition.compare import diff
from farpage.definition.model import PAGE_BYTES, Definition
from farpage.definition.rules import claims
from farpage.definition.store import DefinitionStore
from farpage.device.base import Admit, PagingDevice, Usage, admit_all, refuse_relabelling
from farpage.device.claim import Claim
from farpage.device.errors import DeviceUnusable, VolumeFenced, VolumeMissing
from farpage.device.open import open_device
from farpage.device.spec import parse_spec
from farpage.errors import FarpageError
from farpage.handover import most_bytes
from farpage.log import get_logger
from farpage.vios.copying.copies import Copies
from farpage.vios.errors import DeviceNameTaken
from farpage.vios.exports import VolumeExports
from farpage.vios.figures import ViosState
from farpage.vios.handovers import HandoverMissing, Handovers
from farpage.vios.model import (
    CopyOrders,
    CopyStatus,
    DeviceAdd,
    DeviceInfo,
    HandoverInfo,
    Health,
    IntermediaryReport,
    VolumeCreate,
    VolumeInfo,
)
from farpage.vios.remembered import RememberedDevice, RememberedDevices
from farpage.vios.volumes import Located, Volumes, if_it_answers

log = get_logger()

Result = TypeVar("Result")

DRAIN_SECONDS = 10.0
"""So long commands in flight may take when the process stops; a device that hangs must not keep it."""

FIRST_TRY_SECONDS = 2.0
"""So long each device may hold up the VIOS's start."""
FIRST_PAUSE_SECONDS = 0.1
LONGEST_PAUSE_SECONDS = 5.0
"""Between two tries of a device that cannot be used."""


@dataclass
class ViosService:
    """One VIOS, for its API. The coroutines may be awaited in any loop; they do their work in `loop`."""

    name: str
    loop: asyncio.AbstractEventLoop
    volumes: Volumes
    exports: VolumeExports
    definitions: DefinitionStore
    remembered: RememberedDevices
    handovers: Handovers
    started_at: float = field(default_factory=time.monotonic)
    told_to_stop: asyncio.Event = field(default_factory=asyncio.Event)
    """Set in `loop`; ends the process."""
    _adding: dict[str, asyncio.Lock] = field(default_factory=dict)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def _on_data(self, work: Coroutine[Any, Any, Result]) -> Result:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, self.loop))

    async def begin(self) -> None:
        """Have others serve the volumes, where there are others."""

    async def look(self) -> None:
        """Bring what `health` tells up to date, where other processes serve."""

    async def refresh(self) -> None:
        """Bring what `state` tells up to date, where other processes serve."""

    @property
    def data_processes(self) -> tuple[int, ...]:
        """The processes that serve volumes in this one's place."""
        return ()

    def state(self) -> ViosState:
        """Say what metrics tell beside the devices. Safe to call from any thread."""
        return ViosState(
            self.exports.figures(), self.exports.leases.alive, self.definitions.current().revision
        )

    def health(self) -> Health:
        """Say how things are; needs no answer from the data plane or a device."""
        return Health(
            vios=self.name,
            version=__version__,
            pid=os.getpid(),
            uptime_seconds=time.monotonic() - self.started_at,
            definition_revision=self.definitions.current().revision,
            data=tuple(map(str, self.exports.server.addresses)),
            devices=len(self.volumes.devices),
            open_exports=self.exports.open_exports,
            lease_seconds=self.exports.leases.lease_seconds,
            leases=self.exports.leases.alive,
            data_processes=self.data_processes,
        )

    def stop(self) -> Health:
        """Begin to end the process, as SIGTERM does: what is in flight finishes."""
        log.info("told_to_stop", open_exports=self.exports.open_exports)
        self.loop.call_soon_threadsafe(self.told_to_stop.set)
        return self.health()

    # Devices

    async def devices(self) -> tuple[DeviceInfo, ...]:
        """List the devices; those that do not answer without what is on them."""
        return await self._on_data(self._devices())

    async def _devices(self) -> tuple[DeviceInfo, ...]:
        devices = self.volumes.devices
        usages = await asyncio.gather(*(if_it_answers(device, device.usage) for device in devices))
        return tuple(map(self._device_info, devices, usages))

    def _device_info(self, device: PagingDevice, usage: Usage | None) -> DeviceInfo:
        return DeviceInfo(
            id=device.id,
            name=device.name,
            kind=device.kind,
            spec=device.spec,
            access=device.access,
            allocate=device.allocate,
            size_bytes=device.size_bytes,
            provisioned_bytes=usage.provisioned_bytes if usage else None,
            used_bytes=usage.used_bytes if usage else None,
            volumes=usage.volumes if usage else None,
            commands=self.volumes.commands(device),
        )

    async def add_device(self, wanted: DeviceAdd) -> DeviceInfo:
        """Serve a device from now on, also after a restart; one that is served already stays as it is.

        :raise InvalidInput: the specification cannot be read.
        :raise DeviceUnusable: the storage is not there, in use by something else, or not as asked for.
        :raise DeviceNameTaken: another device that is served has its name.
        """
        return await self._on_data(self._add_device(wanted))

    async def _add_device(self, wanted: DeviceAdd) -> DeviceInfo:
        remembered = RememberedDevice(wanted.spec, wanted.name, wanted.size_bytes)
        admit = partial(self._refuse_taken_name, wanted.spec)
        device = await self.serve_device(remembered, force=wanted.force, admit=admit)
        refuse_relabelling(wanted.spec, device, name=wanted.name, size_bytes=wanted.size_bytes)
        await asyncio.to_thread(self.remembered.add, remembered)
        return self._device_info(device, await device.run(device.usage))

    def _refuse_taken_name(self, spec: str, identifier: str, name: str) -> None:
        for other in self.volumes.devices:
            if other.name == name and other.id != identifier:
                raise DeviceNameTaken(spec, self.name, name, other.spec)

    async def serve_device(
        self, wanted: RememberedDevice, *, force: bool = False, admit: Admit = admit_all
    ) -> PagingDevice:
        """Open a device, if it is not open yet; in the data plane's loop."""
        spec = wanted.spec
        async with self._adding.setdefault(spec, asyncio.Lock()):
            for known in self.volumes.devices:
                if known.spec == spec:
                    return known
            device = await open_device(
                spec, name=wanted.name, size_bytes=wanted.size_bytes, force=force, admit=admit
            )
            for known in self.volumes.devices:
                if known.id == device.id:
                    await device.close()
                    return known
            self.volumes.add_device(device)
        log.info(
            "device_added", device=device.name, id=device.id, spec=spec, access=device.access,
            size_bytes=device.size_bytes,
        )  # fmt: skip
        return device

    async def serve_from_start(self, device: RememberedDevice) -> DeviceUnusable | None:
        """Open a device at the VIOS's start; one that cannot be used is tried again in the background.

        Returns the first problem; None if there is none, or none within `FIRST_TRY_SECONDS`: a remote server
        that hangs must not keep the other devices from being served. In the data plane's loop.

        :raise InvalidInput: the specification cannot be read.
        """
        parse_spec(device.spec)
        first: asyncio.Future[DeviceUnusable | None] = self.loop.create_future()
        task = self.loop.create_task(self._serve_when_usable(device, first))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await asyncio.wait({first}, timeout=FIRST_TRY_SECONDS)
        return first.result() if first.done() else None

    async def _serve_when_usable(
        self, device: RememberedDevice, first: asyncio.Future[DeviceUnusable | None]
    ) -> None:
        pause, reported = FIRST_PAUSE_SECONDS, ""
        while True:
            try:
                await self.serve_device(device)
            except DeviceUnusable as error:
                if str(error) != reported:
                    reported = str(error)
                    log.error("device_unusable", spec=device.spec, problem=reported)
                if not first.done():
                    first.set_result(error)
            else:
                if not first.done():
                    first.set_result(None)
                return
            await asyncio.sleep(pause)
            pause = min(pause * 2, LONGEST_PAUSE_SECONDS)

    # Volumes

    async def list_volumes(self) -> tuple[VolumeInfo, ...]:
        """List the volumes of the devices that answer."""
        return await self._on_data(self._list_volumes())

    async def _list_volumes(self) -> tuple[VolumeInfo, ...]:
        return tuple(map(self._volume_info, await self.volumes.list()))

    def _volume_info(self, located: Located) -> VolumeInfo:
        stat = located.stat
        return VolumeInfo(
            name=stat.name,
            device=located.device.id,
            size_bytes=stat.size_bytes,
            used_bytes=stat.used_bytes,
            epoch=self.volumes.claim_of(located).epoch,
            owner=self.volumes.claim_of(located).owner,
            open_connections=self.exports.connections(stat.id),
        )

    async def volume(self, name: str) -> VolumeInfo:
        """Describe a volume.

        :raise VolumeMissing: there is none.
        """
        return await self._on_data(self._volume(name))

    async def _volume(self, name: str) -> VolumeInfo:
        return self._volume_info(await self.volumes.find(name))

    async def create_volume(self, wanted: VolumeCreate) -> VolumeInfo:
        """Make a volume.

        :raise DeviceMissing: this VIOS does not reach the device.
        :raise VolumeExists: the name is taken.
        :raise VolumeBeingMade: the name is about to be taken.
        :raise CapacityExceeded: it does not fit.
        """
        return await self._on_data(self._create_volume(wanted))

    async def _create_volume(self, wanted: VolumeCreate) -> VolumeInfo:
        located = await self.volumes.create(wanted.name, wanted.device, wanted.size_bytes)
        return self._volume_info(located)

    async def open_volume(self, name: str, epoch: int, owner: str, device: str = "") -> VolumeInfo:
        """Make `epoch` the owner; on return no command of an older one can reach the device.

        :raise VolumeMissing: there is none.
        :raise VolumeFenced: a newer epoch owns it, or another owner.
        """
        return await self._on_data(self._open_volume(name, epoch, owner, device))

    async def _open_volume(self, name: str, epoch: int, owner: str, device: str) -> VolumeInfo:
        await self.volumes.claim(name, Claim(epoch, owner), device)
        return self._volume_info(await self.volumes.find(name, device))

    async def delete_volume(self, name: str, epoch: int | None, device: str = "") -> None:
        """Delete a volume; see `Volumes.delete`."""
        await self._on_data(self._delete_volume(name, epoch, device))

    async def _delete_volume(self, name: str, epoch: int | None, device: str) -> None:
        await self.volumes.delete(name, epoch, device)

    # Handovers

    async def handover_room(self, name: str, device: str, epoch: int, owner: str) -> int:
        """Return how long a handover of a volume may be, for an owner who may store one.

        :raise VolumeMissing: there is no such volume.
        :raise VolumeFenced: somebody else owns it, or the epoch is not the newest.
        """
        return await self._on_data(self._handover_room(name, device, Claim(epoch, owner)))

    async def _handover_room(self, name: str, device: str, claim: Claim) -> int:
        located = await self.owned(name, device, claim)
        return most_bytes(located.stat.size_bytes // PAGE_BYTES)

    async def put_handover(
        self, name: str, device: str, epoch: int, owner: str, encoded: bytearray
    ) -> HandoverInfo:
        """Store the page table of a released client beside its volume, after what was written to that.

        :raise VolumeMissing: there is no such volume.
        :raise VolumeFenced: somebody else owns it, or the epoch is not the newest.
        :raise HandoverDamaged: the bytes are not a handover of this volume.
        :raise HandoverOutdated: one of a later release is stored.
        :raise HandoverNotStored: there is no room.
        """
        return await self._on_data(self._put_handover(name, device, Claim(epoch, owner), encoded))

    async def _put_handover(self, name: str, device: str, claim: Claim, encoded: bytearray) -> HandoverInfo:
        located = await self.flushed(name, device, claim)
        summary = await located.device.run(self.handovers.store, name, located.stat.id, encoded)
        log.info("handover_stored", volume=name, device=located.device.name, digest=summary.digest)
        return HandoverInfo(
            volume=name,
            device=located.device.id,
            epoch=summary.epoch,
            pages=summary.pages,
            on_device_pages=summary.on_device_pages,
            digest=summary.digest,
        )

    async def handover(self, name: str, device: str) -> bytes:
        """Return the stored page table of a released client.

        :raise VolumeMissing: there is no such volume.
        :raise HandoverMissing: none is stored here.
        """
        return await self._on_data(self._handover(name, device))

    async def _handover(self, name: str, device: str) -> bytes:
        located = await self.volumes.find(name, device)
        encoded = await located.device.run(self.handovers.load, located.stat.id)
        if encoded is None:
            raise HandoverMissing(self.name, name)
        return encoded

    async def delete_handover(self, name: str, device: str, epoch: int, owner: str) -> None:
        """Forget a stored page table, if there is one: it is not that of the client any more.

        :raise VolumeMissing: there is no such volume.
        :raise VolumeFenced: somebody else owns it, or the epoch is not the newest.
        """
        await self._on_data(self._delete_handover(name, device, Claim(epoch, owner)))

    async def _delete_handover(self, name: str, device: str, claim: Claim) -> None:
        located = await self.owned(name, device, claim)
        await located.device.run(self.handovers.remove, located.stat.id)

    async def owned(self, name: str, device: str, claim: Claim) -> Located:
        """Find a volume for its owner.

        :raise VolumeFenced: somebody else owns it, or the epoch is not the newest.
        """
        located = await self.volumes.find(name, device)
        self.volumes.refuse(located, claim)
        return located

    async def flushed(self, name: str, device: str, claim: Claim) -> Located:
        """Find a volume for its owner, and flush what was written to it."""
        located, volume = await self.volumes.open(name, claim, device_id=device)
        try:
            await _flushed(volume, located.device)
        finally:
            await volume.close()
        return located

    # Moves

    async def intermediary(self, name: str, device: str, report: IntermediaryReport) -> CopyOrders:
        """Take note of what an intermediate client says, and tell it what to do.

        :raise InvalidInput: the address of its relay cannot be read.
        :raise IntermediaryDisplaced: another one has taken over.
        """
        return await self._on_data(self._intermediary(name, device, report))

    async def _intermediary(self, name: str, device: str, report: IntermediaryReport) -> CopyOrders:
        return await self._copies.report(name, device, report)

    async def copy_status(self, name: str, device: str) -> CopyStatus:
        """Say how far the copying of a volume is.

        :raise NotCopied: it is not copied to that device here.
        """
        return await self._on_data(self._copy_status(name, device))

    async def _copy_status(self, name: str, device: str) -> CopyStatus:
        return await self._copies.status(name, device)

    @property
    def _copies(self) -> Copies:
        assert self.exports.copies is not None
        return self.exports.copies

    # Definition

    async def put_definition(self, expected_revision: int, definition: Definition) -> Definition:
        """Store a definition, and begin to cut off the owners that it takes volumes from.

        It does not wait for their commands: a device that hangs must not keep the definition from
        being stored. Whoever needs to know that they are gone opens the volume.

        :raise RevisionConflict: another one is stored than expected.
        :raise InvalidDefinition: it contradicts itself.
        :raise CopyIncomplete: it ends a move whose pages are not all here.
        """
        before = self.definitions.current()
        if self.exports.copies is not None and before.moves:
            await self._on_data(self._refuse_early_end(definition))
        stored = await asyncio.to_thread(self.definitions.compare_and_swap, expected_revision, definition)
        if before.revision != stored.revision:
            log.info("definition_stored", revision=stored.revision, changes=diff(before, stored))
            self.loop.call_soon_threadsafe(self.exports.follow_definition)
        await self._told()
        if taken := _taken(claims(before), claims(stored)):
            self.loop.call_soon_threadsafe(self.begin_claims, taken)
        return stored

    async def _refuse_early_end(self, definition: Definition) -> None:
        await self._copies.refuse_early_end(definition)

    async def _told(self) -> None:
        """Tell other processes the definition, which is not acknowledged before they go by it."""

    def begin_claims(self, wanted: dict[str, tuple[int, str]]) -> None:
        """Give volumes to the owners in the definition, in the background; in the data plane's loop."""
        task = self.loop.create_task(self.claim_all(wanted))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def claim_all(self, wanted: dict[str, tuple[int, str]]) -> None:
        """Give volumes to the owners in the definition; what fails is logged. In the data plane's loop."""
        replicas = [
            (volume, Claim(*claim), device.id)
            for volume, claim in wanted.items()
            for device in self.volumes.candidates(volume)
        ]
        for volume, claim, device in replicas:
            try:
                await self.volumes.claim(volume, claim, device)
            except VolumeMissing:
                continue
            except VolumeFenced as error:
                log.warning("definition_is_older", volume=volume, epoch=claim.epoch, current=error.current)
            except FarpageError as error:
                log.error("claim_failed", volume=volume, epoch=claim.epoch, problem=str(error))

    @contextlib.asynccontextmanager
    async def draining(self) -> AsyncIterator[None]:
        """At the end disconnect everybody, finish what is in flight and close the devices."""
        try:
            yield
        finally:
            try:
                async with asyncio.timeout(DRAIN_SECONDS):
                    await self.close()
                    await self.exports.close()
                    for device in self.volumes.devices:
                        await device.close()
            except TimeoutError:
                log.error(
                    "not_drained", problem="commands are still in flight at a device; they are given up"
                )

    async def close(self) -> None:
        """Stop what is done in the background."""
        for task in tuple(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


def _taken(
    before: Mapping[str, tuple[int, str]], now: Mapping[str, tuple[int, str]]
) -> dict[str, tuple[int, str]]:
    """Return the volumes that have another owner now.

    An owner that raises its epoch opens each volume anew where it has to: what it has open beside that it
    goes on with. One without a token may be another one.
    """
    return {
        volume: (epoch, owner)
        for volume, (epoch, owner) in now.items()
        if before.get(volume) != (epoch, owner) and not (owner and owner == before.get(volume, (0, ""))[1])
    }


async def _flushed(volume: BlockIO, device: PagingDevice) -> None:
    """Wait until all that was written to a volume is where a power failure leaves it.

    :raise DeviceUnusable: the device does not say so.
    """
    if Feature.FLUSH in volume.features and (error := await wait_done(volume.flush)):
        problem = f"what was written may be lost: {os.strerror(error)}"
        raise DeviceUnusable(device.spec, problem, "look after the storage, then try again")
