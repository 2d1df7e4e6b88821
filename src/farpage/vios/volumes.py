"""The volumes of a VIOS' devices and who owns them: lives in the data plane's event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

from farpage.blockio import BlockIO
from farpage.definition.errors import StoreFailed
from farpage.definition.model import Definition, PagingCommand, ReplicaState
from farpage.definition.rules import claims
from farpage.device.base import PagingDevice, VolumeStat, never
from farpage.device.claim import Claim, Claims
from farpage.device.errors import (
    DeviceUnusable,
    VolumeExists,
    VolumeFenced,
    VolumeInUse,
    VolumeMissing,
    VolumeTaken,
)
from farpage.errors import FarpageError
from farpage.log import get_logger
from farpage.vios.commands import ConvertedVolume, commands_of
from farpage.vios.errors import CommandRefused, DeviceMissing, VolumeOwned

log = get_logger()


Answer = TypeVar("Answer")

ANSWER_SECONDS = 0.5
"""A device that takes longer is waited for no more: well below what those wait who ask for a list."""


class Definitions(Protocol):
    """Where the definition is."""

    def current(self) -> Definition:
        """Return the one that is stored now. Safe to call from any thread."""


class Epochs(Protocol):
    """Where the highest epoch seen of each volume is, by its identifier; fit for any thread."""

    def highest(self, volume_id: str) -> tuple[int, str]:
        """Return the highest epoch seen, 0 for none, and its owner; from memory."""

    def raise_to(self, volume_id: str, epoch: int, owner: str = "") -> None:
        """Record durably that `epoch` was seen.

        :raise StoreFailed: it cannot be stored.
        """

    def forget(self, volume_id: str) -> None:
        """Drop the record of a volume that was deleted.

        :raise StoreFailed: it cannot be stored.
        """


class Holders(Protocol):
    """Those who have volumes open: the connections."""

    async def fence(self, volume_id: str, epoch: int | None) -> None:
        """Cut off everybody at an older epoch; with None everybody, readers too.

        On return no command of theirs can reach the device.
        """

    async def settle(self, volume_id: str) -> int:
        """Return how many have the volume open, once those who are about to let go have done so."""


class Nobody:
    """No holders yet."""

    async def fence(self, volume_id: str, epoch: int | None) -> None:
        """Cut nobody off."""

    async def settle(self, volume_id: str) -> int:
        """Count nobody."""
        return 0


@dataclass(frozen=True)
class Located:
    """A volume and the device that it is on."""

    device: PagingDevice
    stat: VolumeStat


class Volumes:
    """Finds, makes, opens and deletes volumes, and lets only the newest owner write."""

    def __init__(self, vios: str, definitions: Definitions, epochs: Epochs) -> None:
        self._vios = vios
        self._definitions = definitions
        self._epochs = epochs
        self._devices: dict[str, PagingDevice] = {}
        self._seen: dict[str, Claims] = {}
        """By volume identifier: nobody older is let in from the moment that a claim is entered here."""
        self._defined: tuple[Definition, dict[str, tuple[int, str]]] = (Definition(), {})
        self._claims: dict[str, _CountedLock] = {}
        self.holders: Holders = Nobody()
        self.on_deleted: Callable[[str], None] = lambda volume_id: None
        """Called in a thread with the identifier of a volume that was deleted."""

    @property
    def definition(self) -> Definition:
        """The definition that is stored now. Safe to call from any thread."""
        return self._definitions.current()

    # Devices

    @property
    def devices(self) -> tuple[PagingDevice, ...]:
        """The devices, in the order in which they were added. Safe to call from any thread."""
        return tuple(self._devices.values())

    def add_device(self, device: PagingDevice) -> None:
        """Begin to serve a device."""
        self._devices[device.id] = device

    def device(self, identifier: str) -> PagingDevice:
        """Look a device up.

        :raise DeviceMissing: this VIOS does not reach it.
        """
        if identifier not in self._devices:
            raise DeviceMissing(identifier, self._vios)
        return self._devices[identifier]

    def commands(self, device: PagingDevice) -> tuple[PagingCommand, ...]:
        """Return the commands that are accepted for a device: those that the definition configures.

        A device that is not in the definition takes all that it can carry out.
        """
        able = commands_of(device.features)
        record = self._definitions.current().devices.get(device.id)
        return able if record is None else tuple(command for command in able if command in record.commands)

    # Volumes

    async def find(self, name: str, device_id: str = "") -> Located:
        """Look for a volume on one device, or else where the definition says, or else on every device.

        :raise VolumeMissing: it is not there.
        :raise DeviceUnusable: a device where it may be does not answer as it should.
        """
        problem: DeviceUnusable | None = None
        for device in self.candidates(name, device_id):
            try:
                return Located(device, await device.run(device.volume, name))
            except VolumeMissing:
                continue
            except DeviceUnusable as error:
                problem = error
        raise problem or VolumeMissing(name, f"VIOS {self._vios!r}")

    def candidates(self, name: str, device_id: str = "") -> tuple[PagingDevice, ...]:
        """Return the devices where a volume may be: more than one when it has several replicas here."""
        if device_id:
            return (self._devices[device_id],) if device_id in self._devices else ()
        defined = _devices_of(self._definitions.current(), name)
        found = tuple(self._devices[device] for device in defined if device in self._devices)
        return found or self.devices

    async def list(self) -> list[Located]:
        """List the volumes of every device that answers."""
        devices = self.devices
        listed = await asyncio.gather(*(if_it_answers(device, device.volumes) for device in devices))
        found = [
            Located(device, stat)
            for device, stats in zip(devices, listed, strict=True)
            for stat in stats or ()
        ]
        return sorted(found, key=lambda located: (located.stat.name, located.device.name))

    async def create(self, name: str, device_id: str, size_bytes: int) -> Located:
        """Make a volume.

        :raise DeviceMissing: this VIOS does not reach the device.
        :raise VolumeExists: the name is taken on this device; or on another one, and the definition does not
            say that there is a replica on this one too.
        :raise VolumeBeingMade: the name is about to be taken.
        :raise CapacityExceeded: it does not fit.
        """
        target = self.device(device_id)
        a_replica = device_id in _devices_of(self._definitions.current(), name)
        for device in () if a_replica else self.devices:
            if device is not target and await _has(device, name):
                raise VolumeExists(name, device.name)
        stat = await target.make_volume(name, size_bytes)
        log.info("volume_created", volume=name, device=target.name, size_bytes=size_bytes)
        return Located(target, stat)

    async def delete(self, name: str, epoch: int | None, device_id: str = "") -> None:
        """Delete a volume: with an epoch for its owner, from under everybody; without one if nobody uses it.

        :raise VolumeMissing: there is none.
        The epoch alone is enough: whoever knows it acts for the client, whoever owns that.

        :raise VolumeFenced: the epoch is older than the owner's.
        :raise VolumeOwned: without an epoch, when a client has it.
        :raise VolumeInUse: without an epoch, when somebody has it open, through this VIOS or another.
        """
        located = await self.find(name, device_id)
        device, volume_id = located.device, located.stat.id
        if epoch is None:
            for client, record in self._definitions.current().clients.items():
                if name in {volume.name for volume in record.volumes}:
                    raise VolumeOwned(name, client, record.epoch)
            holders = await self.holders.settle(volume_id)
            if holders:
                raise VolumeInUse(name, device.name, f" through {holders} connections here")
            await device.run(device.delete_volume, name)
        else:
            current = self.claim_of(located)
            claim = current if epoch == current.epoch else Claim(epoch)
            await self.claim(name, claim, device.id)
            async with self._claiming(volume_id):
                self._refuse_seen(name, volume_id, claim)
                await self.holders.fence(volume_id, None)
                await device.run(lambda: device.delete_volume(name, force=True))
        self._seen.pop(volume_id, None)
        await device.run(self._epochs.forget, volume_id)
        await device.run(self.on_deleted, volume_id)
        log.info("volume_deleted", volume=name, device=device.name, epoch=epoch)

    # Ownership

    def claim_of(self, located: Located) -> Claim:
        """Return the newest claim of the volume that the device, the database or the definition knows."""
        # Of two owners at one epoch the device's counts: it is what every VIOS looks at.
        return max(self._known(located), key=lambda claim: claim.epoch)

    def _known(self, located: Located) -> tuple[Claim, ...]:
        stat = located.stat
        return (
            stat.claim,
            self._claims_seen(stat.id).current,
            Claim(*self._epochs.highest(stat.id)),
            self._defined_claim(stat.name),
        )

    def _claims_seen(self, volume_id: str) -> Claims:
        return self._seen.get(volume_id, _NO_CLAIMS)

    def _defined_claim(self, name: str) -> Claim:
        definition = self._definitions.current()
        if definition is not self._defined[0]:
            self._defined = (definition, claims(definition))
        return Claim(*self._defined[1].get(name, Claim()))

    def refuse(self, located: Located, claim: Claim) -> None:
        """Refuse a claim that may not write, as far as that is known here.

        :raise VolumeFenced: its owner has a newer epoch.
        :raise VolumeTaken: another owner has the volume.
        """
        name, current = located.stat.name, self.claim_of(located)
        if claim.epoch <= current.epoch:
            if claim != current:
                raise _refusal(name, claim, current)
            return
        replaced = any(
            known.owner == claim.owner and known.owner != current.owner and claim.owner
            for known in self._known(located)
        )
        if replaced:
            raise _refusal(name, claim, current)
        self._refuse_seen(name, located.stat.id, claim)

    def _refuse_seen(self, name: str, volume_id: str, claim: Claim) -> None:
        seen = self._claims_seen(volume_id)
        if seen.refuses(claim):
            raise _refusal(name, claim, seen.current)

    async def claim(self, name: str, claim: Claim, device_id: str = "") -> Located:
        """Give a volume to an owner; on return no command of an older one can reach the device.

        The claim is durable, on the device and in the database, before anybody is cut off.

        :raise VolumeMissing: there is none.
        :raise VolumeFenced: a newer epoch owns it.
        :raise VolumeTaken: another owner has it.
        :raise CommandRefused: the device is not configured for being opened.
        """
        located = await self.find(name, device_id)
        device, volume_id = located.device, located.stat.id
        if PagingCommand.OPEN not in self.commands(device):
            raise CommandRefused(name, device.name, PagingCommand.OPEN)
        # Refused at once, however long the claim of a newer owner still waits for what it cuts off.
        self._refuse_seen(name, volume_id, claim)
        async with self._claiming(volume_id):
            self.refuse(located, claim)
            present = claim
            if claim != located.stat.claim:
                present = await device.run(device.claim, name, claim)
            await device.run(self._store_epoch, volume_id, present)
            # From here on, with no wait in between, nobody older gets in; those inside are cut off below.
            self._seen.setdefault(volume_id, Claims()).add(present)
            if present != claim:
                raise _refusal(name, claim, present)
            self._refuse_seen(name, volume_id, claim)
            await self.holders.fence(volume_id, claim.epoch)
        return located

    async def open(
        self,
        name: str,
        claim: Claim | None,
        over: Callable[[], bool] = never,
        device_id: str = "",
        layer: Callable[[BlockIO], BlockIO] = lambda volume: volume,
    ) -> tuple[Located, ConvertedVolume]:
        """Open a volume for its owner, or read-only; the caller registers it before it waits for anything.

        When `over` says True the volume is not changed any more. `layer` puts something over the device's
        volume, at once before the return.

        :raise VolumeMissing: there is none.
        :raise VolumeFenced: a newer epoch owns it.
        :raise VolumeTaken: another owner has it.
        :raise CommandRefused: the device is not configured for being opened.
        :raise DeviceUnusable: the device does not answer as it should.
        """
        located = await (self.find(name, device_id) if claim is None else self.claim(name, claim, device_id))
        commands = self.commands(located.device)
        if PagingCommand.OPEN not in commands:
            raise CommandRefused(name, located.device.name, PagingCommand.OPEN)
        volume = await located.device.open_volume(name, claim.epoch if claim else None, over)
        try:
            if claim is not None:
                # A newer owner may have come while the file was opened, and found nobody to cut off.
                self._refuse_seen(name, located.stat.id, claim)
            return located, ConvertedVolume(layer(volume), commands)
        except FarpageError:
            await volume.close()
            raise

    def _store_epoch(self, volume_id: str, claim: Claim) -> None:
        try:
            self._epochs.raise_to(volume_id, claim.epoch, claim.owner)
        except StoreFailed as error:
            # The device has the claim too; a full disk must not keep a client from its other path.
            log.error("epoch_not_stored", volume_id=volume_id, epoch=claim.epoch, problem=error.cause)

    @asynccontextmanager
    async def _claiming(self, volume_id: str) -> AsyncIterator[None]:
        """One claim of a volume at a time."""
        counted = self._claims.setdefault(volume_id, _CountedLock(asyncio.Lock()))
        counted.users += 1
        try:
            async with counted.lock:
                yield
        finally:
            counted.users -= 1
            if counted.users == 0:
                del self._claims[volume_id]


_NO_CLAIMS = Claims()


def _refusal(name: str, claim: Claim, current: Claim) -> VolumeFenced:
    kind = VolumeTaken if claim.owner != current.owner else VolumeFenced
    return kind(name, claim.epoch, current.epoch)


@dataclass
class _CountedLock:
    lock: asyncio.Lock
    users: int = 0


def _devices_of(definition: Definition, volume: str) -> tuple[str, ...]:
    """Return the devices with replicas, those that lack pages last."""
    replicas = [
        replica
        for client in definition.clients.values()
        for record in client.volumes
        if record.name == volume
        for replica in record.replicas
    ]
    replicas.sort(key=lambda replica: replica.state is ReplicaState.COPYING)
    return tuple(replica.device for replica in replicas)


async def if_it_answers(device: PagingDevice, question: Callable[[], Answer]) -> Answer | None:
    """Ask a device something; None if it fails or hangs, so that the others can still be shown."""
    try:
        async with asyncio.timeout(ANSWER_SECONDS):
            return await device.run(question)
    except (DeviceUnusable, TimeoutError) as error:
        log.error("device_unusable", device=device.name, problem=str(error) or "no answer")
        return None


async def _has(device: PagingDevice, name: str) -> bool:
    try:
        await device.run(device.volume, name)
    except VolumeMissing:
        return False
    return True
