"""The VIOS as the hypervisor sees them: their control APIs, and whether they answer."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from farpage.api.client import ControlClient
from farpage.definition.model import Definition
from farpage.device.spec import Allocate
from farpage.errors import FarpageError
from farpage.hypervisor.model import ViosStatus
from farpage.vios.model import CopyStatus, DeviceInfo, HandoverInfo, Health, VolumeCreate, VolumeInfo

TIMEOUT_SECONDS = 2.0
"""A VIOS that takes longer is treated as away; what it missed is repaired when it is back."""

DOUBTED_SECONDS = 0.03
"""So long a VIOS may take to answer when a client's path to it has failed: replicas that are lost with it
wait until the definition is stored elsewhere."""

HANDOVER_SECONDS = 30.0
"""So long a VIOS may take to flush a volume and to store or send a page table."""

NEW_VOLUME_BYTES_PER_SECOND = 32 << 20
"""So slowly at the most a VIOS may write a new volume, where the device allocates all of it."""

Answer = TypeVar("Answer")


@dataclass
class Vios:
    """One VIOS: its control client and what it last said."""

    name: str
    control: str
    tls: Path | None = None
    client: ControlClient = field(init=False)
    health: Health | None = None
    devices: tuple[DeviceInfo, ...] = ()
    listed: bool = False
    """Whether it has ever told its devices."""
    problem: str = "not asked yet"
    _waiting: set[asyncio.Task[Any]] = field(default_factory=set, init=False)
    """Requests for its definition, which others wait for."""
    _doubted: bool = field(default=False, init=False)
    _away: FarpageError | None = field(default=None, init=False)
    """How it was found away when it was doubted last."""

    def __post_init__(self) -> None:
        self.client = ControlClient(
            self.control, who=f"VIOS {self.name}", timeout_seconds=TIMEOUT_SECONDS, tls=self.tls
        )

    @property
    def reachable(self) -> bool:
        """Whether it answered when it was last asked."""
        return not self.problem

    async def ask(self) -> bool:
        """Ask for its health and devices; returns whether it has come back since the last time."""
        try:
            health = await self.client.look("/v1/health", Health)
        except FarpageError as error:
            self.problem = error.cause
            return False
        if health.vios != self.name:
            # One VIOS under two names would be taken for two, and so for redundancy.
            self.problem = f"the VIOS at {self.control} is called {health.vios!r}: name it so in --vios"
            return False
        self.health = health
        was_away, self.problem = bool(self.problem), ""
        await self.ask_devices()
        return was_away

    async def doubt(self) -> None:
        """Ask at once whether it answers; if not soon, it is away, and requests for its definition fail."""
        if self._doubted or not self.reachable:
            return
        self._doubted = True
        try:
            await self.client.look("/v1/health", Health, timeout_seconds=DOUBTED_SECONDS)
        except FarpageError as error:
            self.problem, self._away = error.cause, error
            for request in self._waiting:
                request.cancel()
        finally:
            self._doubted = False

    async def _unless_away(self, request: Coroutine[Any, Any, Answer]) -> Answer:
        """Return the answer to a request, but wait for it no longer than until the VIOS is found away."""
        task = asyncio.create_task(request)
        self._waiting.add(task)
        try:
            return await task
        except asyncio.CancelledError:
            current = asyncio.current_task()
            if self._away is None or (current and current.cancelling()):
                raise
            raise self._away from None
        finally:
            self._waiting.discard(task)

    async def ask_devices(self) -> None:
        """Ask for its devices anew; what is known of them stays when it does not answer."""
        with suppress(FarpageError):
            self.devices = await self.client.look("/v1/devices", tuple[DeviceInfo, ...])
            self.listed = True

    async def definition(self) -> Definition:
        """Fetch the definition that it stores."""
        return await self._unless_away(self.client.get("/v1/definition", Definition))

    async def put_definition(self, expected_revision: int, definition: Definition) -> None:
        """Replace the definition that it stores.

        :raise RemoteError: `http_status` 409 when it stores another revision than expected.
        """
        parameters = {"expected_revision": expected_revision}
        # The answer is the same document, and is not read again.
        await self._unless_away(
            self.client.request("PUT", "/v1/definition", body=definition, params=parameters)
        )

    async def put_handover(self, name: str, device: str, epoch: int, owner: str, encoded: bytes) -> None:
        """Keep the page table of a released client beside its volume on a device."""
        await self.client.put(
            f"/v1/volumes/{name}/handover",
            encoded,
            HandoverInfo,
            params={"device": device, "epoch": epoch, "owner": owner},
            timeout_seconds=HANDOVER_SECONDS,
        )

    async def handover(self, name: str, device: str) -> bytes:
        """Fetch the page table of a released client."""
        return await self.client.request(
            "GET", f"/v1/volumes/{name}/handover", params={"device": device}, timeout_seconds=HANDOVER_SECONDS
        )

    async def delete_handover(self, name: str, device: str, epoch: int, owner: str) -> None:
        """Forget a page table, if one is kept."""
        await self.client.delete(
            f"/v1/volumes/{name}/handover", params={"device": device, "epoch": epoch, "owner": owner}
        )

    async def stop(self) -> None:
        """Have it finish what is in flight and end."""
        await self.client.post("/v1/stop", None, Health)

    async def volumes(self) -> tuple[VolumeInfo, ...]:
        """List the volumes that it reaches, with the highest epoch that it knows of each."""
        return await self.client.get("/v1/volumes", tuple[VolumeInfo, ...])

    async def create_volume(self, wanted: VolumeCreate) -> None:
        """Make a volume, which takes its time where all of it is written."""
        timeout_seconds = TIMEOUT_SECONDS
        if any(device.id == wanted.device and device.allocate is Allocate.FULL for device in self.devices):
            timeout_seconds += wanted.size_bytes / NEW_VOLUME_BYTES_PER_SECOND
        await self.client.post("/v1/volumes", wanted, VolumeInfo, timeout_seconds=timeout_seconds)

    async def copy_status(self, name: str, device: str) -> CopyStatus:
        """Ask how far a volume is that is copied to a device there."""
        return await self.client.get(f"/v1/volumes/{name}/copy", CopyStatus, params={"device": device})

    async def delete_volume(self, name: str, device: str, epoch: int) -> None:
        """Delete the volume on a device under an epoch that is not older than any that it was opened with."""
        await self.client.delete(f"/v1/volumes/{name}", params={"epoch": epoch, "device": device})

    def status(self) -> ViosStatus:
        """Return what users see."""
        return ViosStatus(
            name=self.name,
            control=self.control,
            reachable=self.reachable,
            problem=self.problem,
            pid=self.health.pid if self.health and self.reachable else None,
            definition_revision=self.health.definition_revision if self.health and self.reachable else None,
            devices=tuple(device.name for device in self.devices),
        )
