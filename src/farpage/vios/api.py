"""The control API of a VIOS: HTTP and JSON on a UNIX socket."""

from __future__ import annotations

import asyncio
from typing import Annotated

from farpage import __version__
from farpage.api.errors import create_app
from farpage.api.framework import FastAPI, Path, Query, Request, Response
from farpage.api.limit import body_of
from farpage.definition.document import canonical_json
from farpage.definition.model import NUMBER_MAX, Definition, DeviceId, Name
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
    VolumeOpen,
)
from farpage.vios.service import ViosService

VolumeName = Annotated[Name, Path(description="Name of the volume")]
Epoch = Annotated[int | None, Query(ge=1, le=NUMBER_MAX, description="Epoch of the owner who deletes it")]
OwnEpoch = Annotated[int, Query(ge=1, le=NUMBER_MAX, description="Epoch of the volume's owner")]
Owner = Annotated[str, Query(pattern=r"^([0-9a-f]{16})?$", description="Token of the owner's claim")]
Revision = Annotated[int, Query(ge=0, le=NUMBER_MAX, description="Revision that is replaced")]

BINARY = "application/octet-stream"


def make_app(service: ViosService) -> FastAPI:
    """Make the application; its requests run in the loop of whoever serves it."""
    app = create_app(f"farpage VIOS {service.name}", __version__)

    @app.get("/v1/health")
    async def health() -> Health:
        """Say how things are."""
        await service.look()
        return service.health()

    @app.post("/v1/stop", status_code=202)
    async def stop() -> Health:
        """Finish what is in flight and end with status 0, whoever is connected."""
        return service.stop()

    @app.get("/v1/devices")
    async def list_devices() -> tuple[DeviceInfo, ...]:
        """List the paging devices that this VIOS reaches."""
        return await service.devices()

    @app.post("/v1/devices")
    async def add_device(wanted: DeviceAdd) -> DeviceInfo:
        """Serve a device, now and after a restart; it is labelled when it has no label yet."""
        return await service.add_device(wanted)

    @app.get("/v1/volumes")
    async def list_volumes() -> tuple[VolumeInfo, ...]:
        """List the volumes of these devices."""
        return await service.list_volumes()

    @app.post("/v1/volumes", status_code=201)
    async def create_volume(wanted: VolumeCreate) -> VolumeInfo:
        """Make a volume that reads as zeros."""
        return await service.create_volume(wanted)

    @app.get("/v1/volumes/{name}")
    async def show_volume(name: VolumeName) -> VolumeInfo:
        """Describe a volume."""
        return await service.volume(name)

    @app.delete("/v1/volumes/{name}", status_code=204)
    async def delete_volume(name: VolumeName, epoch: Epoch = None, device: DeviceId | None = None) -> None:
        """Delete a volume: one that nobody uses, or with the owner's epoch or a newer one in any case.

        `device` says which one, where several devices have a replica.
        """
        await service.delete_volume(name, epoch, device or "")

    @app.post("/v1/volumes/{name}/open")
    async def open_volume(name: VolumeName, wanted: VolumeOpen, device: DeviceId | None = None) -> VolumeInfo:
        """Claim a volume; answered when no command of an older epoch can reach the device any more.

        `device` says which one, where several devices have a replica.
        """
        return await service.open_volume(name, wanted.epoch, wanted.owner, device or "")

    @app.put("/v1/volumes/{name}/handover", openapi_extra={"requestBody": {"content": {BINARY: {}}}})
    async def put_handover(
        name: VolumeName, request: Request, epoch: OwnEpoch, owner: Owner = "", device: DeviceId | None = None
    ) -> HandoverInfo:
        """Store the page table of a client that was released, for who adopts it, durably.

        `epoch` and `owner` are those of the volume's owner; what was written to the volume is flushed first.
        """
        room_bytes = await service.handover_room(name, device or "", epoch, owner)
        encoded = await body_of(request, room_bytes)
        return await service.put_handover(name, device or "", epoch, owner, encoded)

    @app.get(
        "/v1/volumes/{name}/handover", response_class=Response, responses={200: {"content": {BINARY: {}}}}
    )
    async def get_handover(name: VolumeName, device: DeviceId | None = None) -> Response:
        """Return the page table of a client that was released."""
        return Response(await service.handover(name, device or ""), media_type=BINARY)

    @app.delete("/v1/volumes/{name}/handover", status_code=204)
    async def delete_handover(
        name: VolumeName, epoch: OwnEpoch, owner: Owner = "", device: DeviceId | None = None
    ) -> None:
        """Forget a stored page table: the client is attached, and it is true no more."""
        await service.delete_handover(name, device or "", epoch, owner)

    @app.put("/v1/volumes/{name}/intermediary")
    async def put_intermediary(name: VolumeName, report: IntermediaryReport, device: DeviceId) -> CopyOrders:
        """Take an intermediate client's report, and tell it what to do.

        `device` is the one that the volume is copied to. The relay's address in it is used from now on.
        """
        return await service.intermediary(name, device, report)

    @app.get("/v1/volumes/{name}/copy")
    async def get_copy(name: VolumeName, device: DeviceId) -> CopyStatus:
        """Say how far the copying of a volume to a device is."""
        return await service.copy_status(name, device)

    @app.get("/v1/definition", response_model=Definition)
    async def get_definition() -> Response:
        """Return the definition in its canonical form."""
        return _document(service.definitions.current())

    @app.put("/v1/definition", response_model=Definition)
    async def put_definition(definition: Definition, expected_revision: Revision) -> Response:
        """Replace the definition if its revision is still the one expected."""
        return _document(await service.put_definition(expected_revision, definition))

    @app.get("/metrics", response_class=Response)
    async def metrics() -> Response:
        """Return the metrics in Prometheus' text format."""
        # Loaded with the first scrape. In a thread: a device that hangs must not hold up other requests.
        from farpage.vios.metrics import CONTENT_TYPE, render

        await service.refresh()
        text = await asyncio.to_thread(render, service.volumes, service.state())
        return Response(text, media_type=CONTENT_TYPE)

    return app


def _document(definition: Definition) -> Response:
    return Response(canonical_json(definition), media_type="application/json")
