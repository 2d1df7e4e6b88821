"""The volumes of a VIOS' devices and who owns them: lives in the data plane's event loop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Protocol, TypeVar

import structlog

from farpage.blockio import BlockIO
from farpage.definition.errors import StoreFailed
from farpage.definition.model import Definition, PagingCommand
from farpage.definition.rules import epochs
from farpage.definition.store import DefinitionStore, EpochStore
from farpage.device.base import PagingDevice, VolumeStat
from farpage.device.errors import DeviceUnusable, VolumeExists, VolumeFenced, VolumeInUse, VolumeMissing
from farpage.vios.commands import ConvertedVolume, commands_of
from farpage.vios.errors import CommandRefused, DeviceMissing, VolumeOwned

log = structlog.get_logger()


Answer = TypeVar("Answer")

ANSWER_SECONDS = 2.0
"""A device that takes longer to tell about itself is left out of lists."""


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

    def __init__(self, vios: str, definitions: DefinitionStore, epochs: EpochStore) -> None:
        self._vios = vios
        self._definitions = definitions
        self._epochs = epochs
        self._devices: dict[str, PagingDevice] = {}
        self._highest: dict[str, int] = {}
        """By volume identifier: no older epoch is let in from the moment that it is entered here."""
        self._defined: tuple[Definition, dict[str, int]] = (Definition(), {})
        self._claims: dict[str, _CountedLock] = {}
        self.holders: Holders = Nobody()

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

    async def find(self, name: str) -> Located:
        """Look for a volume where the definition says, or else on every device.

        :raise VolumeMissing: it is not there.
        :raise DeviceUnusable: a device where it may be does not answer as it should.
        """
        problem: DeviceUnusable | None = None
        for device in self._candidates(name):
            try:
                return Located(device, await device.run(device.volume, name))
            except VolumeMissing:
                continue
            except DeviceUnusable as error:
                problem = error
        raise problem or VolumeMissing(name, f"VIOS {self._vios!r}")

    def _candidates(self, name: str) -> tuple[PagingDevice, ...]:
        defined = _devices_of(self._definitions.current(), name)
        found = tuple(self._devices[device] for device in defined if device in self._devices)
        return found or self.devices

    async def list(self) -> list[Located]:
        """List the volumes of every device that answers."""
        found: list[Located] = []
        for device in self.devices:
            stats = await if_it_answers(device, device.volumes)
            found += [Located(device, stat) for stat in stats or ()]
        return sorted(found, key=lambda located: (located.stat.name, located.device.name))

    async def create(self, name: str, device_id: str, size_bytes: int) -> Located:
        """Make a volume.

        :raise DeviceMissing: this VIOS does not reach the device.
        :raise VolumeExists: the name is taken on this or another device.
        :raise CapacityExceeded: it does not fit.
        """
        target = self.device(device_id)
        for device in self.devices:
            if device is not target and await _has(device, name):
                raise VolumeExists(name, device.name)
        stat = await target.run(target.create_volume, name, size_bytes)
        log.info("volume_created", volume=name, device=target.name, size_bytes=size_bytes)
        return Located(target, stat)

    async def delete(self, name: str, epoch: int | None) -> None:
        """Delete a volume: with an epoch for its owner, from under everybody; without one if nobody uses it.

        :raise VolumeMissing: there is none.
        :raise VolumeFenced: the epoch is older than the owner's.
        :raise VolumeOwned: without an epoch, when a client has it.
        :raise VolumeInUse: without an epoch, when somebody has it open, through this VIOS or another.
        """
        located = await self.find(name)
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
            await self.claim(name, epoch)
            async with self._claiming(volume_id):
                self._refuse_older(name, volume_id, epoch)
                await self.holders.fence(volume_id, None)
                await device.run(lambda: device.delete_volume(name, force=True))
        self._highest.pop(volume_id, None)
        await device.run(self._epochs.forget, volume_id)
        log.info("volume_deleted", volume=name, device=device.name, epoch=epoch)

    # Ownership

    def epoch(self, located: Located) -> int:
        """Return the highest epoch of the volume that the device, the database or the definition knows."""
        stat = located.stat
        return max(
            stat.epoch,
            self._epochs.highest(stat.id),
            self._highest.get(stat.id, 0),
            self._defined_epoch(stat.name),
        )

    def _defined_epoch(self, name: str) -> int:
        definition = self._definitions.current()
        if definition is not self._defined[0]:
            self._defined = (definition, epochs(definition))
        return self._defined[1].get(name, 0)

    async def claim(self, name: str, epoch: int) -> Located:
        """Make `epoch` the owner of a volume; on return no command of an older one can reach the device.

        The epoch is durable, on the device and in the database, before anybody is cut off.

        :raise VolumeMissing: there is none.
        :raise VolumeFenced: a newer epoch owns it.
        :raise CommandRefused: the device is not configured for being opened.
        """
        located = await self.find(name)
        device, volume_id = located.device, located.stat.id
        if PagingCommand.OPEN not in self.commands(device):
            raise CommandRefused(name, device.name, PagingCommand.OPEN)
        # Refused at once, however long the claim of a newer owner still waits for what it cuts off.
        self._refuse_older(name, volume_id, epoch)
        async with self._claiming(volume_id):
            highest = self.epoch(located)
            if epoch < highest:
                raise VolumeFenced(name, epoch, highest)
            if epoch > located.stat.epoch:
                highest = max(highest, await device.run(device.raise_epoch, name, epoch))
            await device.run(self._store_epoch, volume_id, epoch)
            # From here on, with no wait in between, nobody older gets in; those inside are cut off below.
            self._highest[volume_id] = max(self._highest.get(volume_id, 0), highest, epoch)
            self._refuse_older(name, volume_id, epoch)
            await self.holders.fence(volume_id, epoch)
        return located

    async def open(self, name: str, epoch: int | None) -> tuple[Located, BlockIO]:
        """Open a volume for its owner, or read-only; the caller registers it before it waits for anything.

        :raise VolumeMissing: there is none.
        :raise VolumeFenced: a newer epoch owns it.
        :raise CommandRefused: the device is not configured for being opened.
        :raise DeviceUnusable: the device does not answer as it should.
        """
        located = await (self.find(name) if epoch is None else self.claim(name, epoch))
        commands = self.commands(located.device)
        if PagingCommand.OPEN not in commands:
            raise CommandRefused(name, located.device.name, PagingCommand.OPEN)
        volume = await located.device.open_volume(name, epoch)
        try:
            if epoch is not None:
                # A newer owner may have come while the file was opened, and found nobody to cut off.
                self._refuse_older(name, located.stat.id, epoch)
        except VolumeFenced:
            await volume.close()
            raise
        return located, ConvertedVolume(volume, commands)

    def _store_epoch(self, volume_id: str, epoch: int) -> None:
        try:
            self._epochs.raise_to(volume_id, epoch)
        except StoreFailed as error:
            # The device has the epoch too; a full disk must not keep a client from its other path.
            log.error("epoch_not_stored", volume_id=volume_id, epoch=epoch, problem=error.cause)

    def _refuse_older(self, name: str, volume_id: str, epoch: int) -> None:
        highest = self._highest.get(volume_id, 0)
        if epoch < highest:
            raise VolumeFenced(name, epoch, highest)

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


@dataclass
class _CountedLock:
    lock: asyncio.Lock
    users: int = 0


def _devices_of(definition: Definition, volume: str) -> tuple[str, ...]:
    return tuple(
        replica.device
        for client in definition.clients.values()
        for record in client.volumes
        if record.name == volume
        for replica in record.replicas
    )


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
