"""What the daemons of a set can be asked, as typed calls over their control APIs.

Every call raises `Unreachable` when no answer comes and `RemoteError` when the answer is an error.
"""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

from pydantic import BaseModel, ConfigDict

from farpage.api.client import ControlClient
from farpage.definition.model import Definition
from farpage.embedded.model import ViosStarted
from farpage.hypervisor.model import (
    Alarm,
    ClientAdopt,
    ClientAttach,
    ClientCreate,
    ClientInfo,
    ClientRelease,
    DefinitionPromote,
    DefinitionPromotion,
    DeviceReplace,
    DeviceReplacement,
    HypervisorInfo,
    PathInfo,
    PoolInfo,
    PoolSet,
    ScrubStart,
    ViosStatus,
    ViosStop,
    ViosStopped,
)
from farpage.hypervisor.movement import ClientMove, Evacuation, EvacuationStart, MoveAdjust, MoveInfo
from farpage.hypervisor.ways import PathExplanation
from farpage.vios.model import DeviceAdd, DeviceInfo, Health, VolumeInfo

DETACH_TIMEOUT_SECONDS = 24 * 3600.0
"""A detach waits until every page is back in memory, which takes as long as the device needs."""


CREATE_TIMEOUT_SECONDS = 3600.0
"""A new client's volume may be on a device where all of it is written as it is made."""

VIOS_READ_SECONDS = 5.0
"""What a VIOS tells of itself takes less, also while its devices hang."""


class _Control:
    def __init__(self, address: str, who: str, tls: Path | None = None) -> None:
        self._client = ControlClient(address, who=who, tls=tls)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()


class HypervisorControl(_Control):
    """A hypervisor at its control address."""

    def __init__(self, address: str, tls: Path | None = None) -> None:
        super().__init__(address, "the hypervisor", tls)

    async def info(self, *, timeout_seconds: float | None = None) -> HypervisorInfo:
        """Ask for the daemon's own state."""
        return await self._client.get("/v1/hypervisor", HypervisorInfo, timeout_seconds=timeout_seconds)

    async def clients(self) -> tuple[ClientInfo, ...]:
        """List the clients."""
        return await self._client.get("/v1/clients", tuple[ClientInfo, ...])

    async def client(self, name: str) -> ClientInfo:
        """Ask for one client."""
        return await self._client.get(f"/v1/clients/{name}", ClientInfo)

    async def create_client(self, wanted: ClientCreate) -> ClientInfo:
        """Make a client and its volume."""
        return await self._client.post(
            "/v1/clients", wanted, ClientInfo, timeout_seconds=CREATE_TIMEOUT_SECONDS
        )

    async def delete_client(self, name: str) -> None:
        """Remove a client that is not attached, and its volume."""
        await self._client.delete(f"/v1/clients/{name}")

    async def attach(self, name: str, wanted: ClientAttach) -> ClientInfo:
        """Page the memory of a running process."""
        return await self._client.post(
            f"/v1/clients/{name}/attach", wanted, ClientInfo, timeout_seconds=CREATE_TIMEOUT_SECONDS
        )

    async def detach(self, name: str) -> ClientInfo:
        """Page everything back in and let go of the process; returns when that is done."""
        return await self._client.post(
            f"/v1/clients/{name}/detach", None, ClientInfo, timeout_seconds=DETACH_TIMEOUT_SECONDS
        )

    async def release(self, name: str, wanted: ClientRelease) -> ClientInfo:
        """Bring every page of a client to its devices and let go of it; returns when that is done."""
        return await self._client.post(
            f"/v1/clients/{name}/release", wanted, ClientInfo, timeout_seconds=DETACH_TIMEOUT_SECONDS
        )

    async def adopt(self, name: str, wanted: ClientAdopt) -> ClientInfo:
        """Take a client that another hypervisor has released."""
        return await self._client.post(f"/v1/clients/{name}/adopt", wanted, ClientInfo)

    async def start_scrub(self, name: str, wanted: ScrubStart) -> ClientInfo:
        """Begin to read what every replica holds of a client's pages, and to repair it."""
        return await self._client.post(f"/v1/clients/{name}/scrub", wanted, ClientInfo)

    async def stop_scrub(self, name: str) -> None:
        """End a client's scrub, if one runs."""
        await self._client.delete(f"/v1/clients/{name}/scrub")

    async def vioses(self) -> tuple[ViosStatus, ...]:
        """List the VIOSes as the hypervisor sees them."""
        return await self._client.get("/v1/vioses", tuple[ViosStatus, ...])

    async def stop_vios(self, name: str, *, force: bool = False) -> ViosStopped:
        """Move a VIOS's clients to their other paths and stop it; returns when it has ended."""
        return await self._client.post(f"/v1/vioses/{name}/stop", ViosStop(force=force), ViosStopped)

    async def paths(self, client: str | None = None) -> tuple[PathInfo, ...]:
        """List the paths, of one client or of all."""
        params = {} if client is None else {"client": client}
        return await self._client.get("/v1/paths", tuple[PathInfo, ...], params=params)

    async def explain_path(self, client: str, to: str = "") -> PathExplanation:
        """Ask how a client gets at its volume, or gets it to a device."""
        return await self._client.get(
            "/v1/paths/explain", PathExplanation, params={"client": client, "to": to}
        )

    async def pool(self) -> PoolInfo:
        """Ask for the memory pool."""
        return await self._client.get("/v1/pool", PoolInfo)

    async def set_pool(self, wanted: PoolSet) -> PoolInfo:
        """Change the pool's size or a client's limit."""
        return await self._client.put("/v1/pool", wanted, PoolInfo)

    async def definition(self) -> Definition:
        """Ask for the device interface definition that the hypervisor goes by."""
        return await self._client.get("/v1/definition", Definition)

    async def promote(self, vios: str, *, force: bool = False) -> DefinitionPromotion:
        """Make the copy at a VIOS the newest; without `force` only ask what that would do."""
        wanted = DefinitionPromote(vios=vios, force=force)
        return await self._client.post("/v1/definition/promote", wanted, DefinitionPromotion)

    async def refresh_devices(self, *, timeout_seconds: float | None = None) -> Definition:
        """Have the hypervisor record which devices the VIOSes reach, and use those that are back."""
        return await self._client.post(
            "/v1/devices/refresh", None, Definition, timeout_seconds=timeout_seconds
        )

    async def replace_device(self, old: str, new: str) -> DeviceReplacement:
        """Begin to move every client from a device to another one."""
        return await self._client.post(
            f"/v1/devices/{quote(old, safe='')}/replace", DeviceReplace(new=new), DeviceReplacement
        )

    async def replacement(self, old: str) -> DeviceReplacement:
        """Ask how far the latest replacement of a device is."""
        return await self._client.get(f"/v1/devices/{quote(old, safe='')}/replace", DeviceReplacement)

    async def move(self, client: str, wanted: ClientMove) -> MoveInfo:
        """Begin to bring a client's volume to another device, or go on with that."""
        return await self._client.post(
            f"/v1/clients/{client}/move", wanted, MoveInfo, timeout_seconds=CREATE_TIMEOUT_SECONDS
        )

    async def move_progress(self, client: str) -> MoveInfo:
        """Ask how far a client's latest move is."""
        return await self._client.get(f"/v1/clients/{client}/move", MoveInfo)

    async def adjust_move(self, client: str, wanted: MoveAdjust) -> MoveInfo:
        """Pause a move, let it go on, or change its bandwidth."""
        return await self._client.patch(f"/v1/clients/{client}/move", wanted, MoveInfo)

    async def cancel_move(self, client: str) -> None:
        """End a move where it began."""
        await self._client.delete(f"/v1/clients/{client}/move")

    async def evacuate(self, kind: str, name: str, wanted: EvacuationStart) -> Evacuation:
        """Begin to empty a device or a VIOS; `kind` is `devices` or `vioses`."""
        return await self._client.post(f"/v1/{kind}/{quote(name, safe='')}/evacuate", wanted, Evacuation)

    async def evacuation(self, kind: str, name: str) -> Evacuation:
        """Ask how far the latest evacuation of a device or a VIOS is."""
        return await self._client.get(f"/v1/{kind}/{quote(name, safe='')}/evacuate", Evacuation)

    async def alarms(self) -> tuple[Alarm, ...]:
        """List what an operator should look at, newest last."""
        return await self._client.get("/v1/alarms", tuple[Alarm, ...])


class SetControl(_Control):
    """The process that runs a set, at its control address."""

    def __init__(self, address: str) -> None:
        super().__init__(address, "'farpage up'")

    async def start_vios(self, name: str) -> ViosStarted:
        """Start a VIOS that was stopped; returns when the hypervisor uses it."""
        return await self._client.post(f"/v1/vioses/{name}/start", None, ViosStarted, timeout_seconds=90.0)


class ViosDetails(BaseModel):
    """What one VIOS tells of itself."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    health: Health
    devices: tuple[DeviceInfo, ...]
    volumes: tuple[VolumeInfo, ...]


class ViosControl(_Control):
    """A VIOS at its control address."""

    def __init__(self, address: str, name: str, tls: Path | None = None) -> None:
        super().__init__(address, f"VIOS {name!r}", tls)

    async def health(self, *, timeout_seconds: float = VIOS_READ_SECONDS) -> Health:
        """Ask for the daemon's own state."""
        return await self._client.get("/v1/health", Health, timeout_seconds=timeout_seconds)

    async def devices(self) -> tuple[DeviceInfo, ...]:
        """List the devices that this VIOS reaches."""
        return await self._client.get(
            "/v1/devices", tuple[DeviceInfo, ...], timeout_seconds=VIOS_READ_SECONDS
        )

    async def add_device(self, wanted: DeviceAdd) -> DeviceInfo:
        """Start to serve a device."""
        return await self._client.post("/v1/devices", wanted, DeviceInfo)

    async def volumes(self) -> tuple[VolumeInfo, ...]:
        """List the volumes on this VIOS's devices."""
        return await self._client.get(
            "/v1/volumes", tuple[VolumeInfo, ...], timeout_seconds=VIOS_READ_SECONDS
        )

    async def definition(self) -> Definition:
        """Ask for the copy of the definition that this VIOS stores."""
        return await self._client.get("/v1/definition", Definition, timeout_seconds=VIOS_READ_SECONDS)

    async def details(self) -> ViosDetails:
        """Ask for everything that `vios show` shows."""
        return ViosDetails(
            health=await self.health(), devices=await self.devices(), volumes=await self.volumes()
        )
