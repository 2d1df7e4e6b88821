"""The part of the hypervisor's control API that is about where volumes are and where they go."""

from __future__ import annotations

from collections.abc import Coroutine
from http import HTTPStatus
from typing import Annotated, Any, Protocol, TypeVar

from fastapi import FastAPI, Path, Query

from farpage.definition.model import Name
from farpage.hypervisor.model import DeviceReplace, DeviceReplacement
from farpage.hypervisor.service import Hypervisor
from farpage.hypervisor.ways import PathExplanation, explain

Result = TypeVar("Result")

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

    @app.post("/v1/devices/{old}/replace", status_code=HTTPStatus.ACCEPTED)
    async def replace_device(old: DeviceName, wanted: DeviceReplace) -> DeviceReplacement:
        """Begin to move every client from a device to another one, or go on with that."""
        return await on_loop(hypervisor.replacements.start(old, wanted.new))

    @app.get("/v1/devices/{old}/replace")
    async def get_replacement(old: DeviceName) -> DeviceReplacement:
        """How far the latest replacement of a device is."""
        return await on_loop(hypervisor.replacements.progress(old))
