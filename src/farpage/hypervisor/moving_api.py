"""The part of the hypervisor's control API that is about where volumes are and where they go."""

from __future__ import annotations

from collections.abc import Coroutine
from http import HTTPStatus
from typing import Annotated, Any, Protocol, TypeVar

from farpage.api.framework import FastAPI, Path, Query
from farpage.definition.model import Name
from farpage.hypervisor.model import DeviceReplace, DeviceReplacement
from farpage.hypervisor.movement import (
    ClientMove,
    Evacuation,
    EvacuationStart,
    MoveAdjust,
    MoveInfo,
)
from farpage.hypervisor.service import Hypervisor
from farpage.hypervisor.ways import PathExplanation, explain

Result = TypeVar("Result")

ClientName = Annotated[Name, Path(description="Name of the client")]
ViosName = Annotated[Name, Path(description="Name of the VIOS")]
DeviceName = Annotated[str, Path(description="Name or identifier of the device", max_length=63)]
DeviceQuery = Annotated[str, Query(description="Name or identifier of the device", max_length=63)]


class OnLoop(Protocol):
    """Carries work out on the daemon's loop."""

    async def __call__(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Return what the work returns."""


def add_moving_routes(app: FastAPI, hypervisor: Hypervisor, on_loop: OnLoop) -> None:
    """Add the requests to the API of a hypervisor."""

    @app.get("/v1/paths/explain")
    async def explain_path(client: Name, to: DeviceQuery = "") -> PathExplanation:
        """How a client gets at its volume, or gets it to a device, and why not another way."""

        async def work() -> PathExplanation:
            return explain(hypervisor.keeper.current, client, to, hypervisor.clients.records.view())

        return await on_loop(work())

    moves, evacuations = hypervisor.moves, hypervisor.evacuations

    @app.post("/v1/clients/{name}/move", status_code=HTTPStatus.ACCEPTED)
    async def move_client(name: ClientName, wanted: ClientMove) -> MoveInfo:
        """Begin to bring a client's volume to another device while it runs, or go on with that."""
        return await on_loop(moves.start(name, wanted))

    @app.get("/v1/clients/{name}/move")
    async def get_move(name: ClientName) -> MoveInfo:
        """How far the latest move of a client is."""
        return await on_loop(moves.progress(name))

    @app.patch("/v1/clients/{name}/move")
    async def adjust_move(name: ClientName, wanted: MoveAdjust) -> MoveInfo:
        """Pause a move, let it go on, or change its bandwidth."""
        return await on_loop(moves.adjust(name, wanted))

    @app.delete("/v1/clients/{name}/move")
    async def cancel_move(name: ClientName) -> MoveInfo:
        """End a move where it began."""
        return await on_loop(moves.cancel(name))

    @app.post("/v1/devices/{device}/evacuate", status_code=HTTPStatus.ACCEPTED)
    async def evacuate_device(device: DeviceName, wanted: EvacuationStart) -> Evacuation:
        """Begin to move every client of a device to the device that fits it best."""
        return await on_loop(evacuations.device(device, wanted))

    @app.get("/v1/devices/{device}/evacuate")
    async def get_device_evacuation(device: DeviceName) -> Evacuation:
        """How far the latest evacuation of a device is."""

        async def work() -> Evacuation:
            return evacuations.progress(f"device {device}")

        return await on_loop(work())

    @app.post("/v1/vioses/{name}/evacuate", status_code=HTTPStatus.ACCEPTED)
    async def evacuate_vios(name: ViosName, wanted: EvacuationStart) -> Evacuation:
        """Begin to move every client that only this VIOS reaches to devices that others reach."""
        return await on_loop(evacuations.vios(name, wanted))

    @app.get("/v1/vioses/{name}/evacuate")
    async def get_vios_evacuation(name: ViosName) -> Evacuation:
        """How far the latest evacuation of a VIOS is."""

        async def work() -> Evacuation:
            return evacuations.progress(f"vios {name}")

        return await on_loop(work())

    @app.post("/v1/devices/{old}/replace", status_code=HTTPStatus.ACCEPTED)
    async def replace_device(old: DeviceName, wanted: DeviceReplace) -> DeviceReplacement:
        """Begin to move every client from a device to another one, or go on with that."""
        return await on_loop(hypervisor.replacements.start(old, wanted.new))

    @app.get("/v1/devices/{old}/replace")
    async def get_replacement(old: DeviceName) -> DeviceReplacement:
        """How far the latest replacement of a device is."""
        return await on_loop(hypervisor.replacements.progress(old))
