"""What `farpage device` does: asks several VIOSes and puts their answers together."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from farpage.cli.session import read_set
from farpage.definition.model import Definition
from farpage.embedded.control import HypervisorControl, ViosControl
from farpage.embedded.layout import SetDocument
from farpage.errors import FarpageError
from farpage.vios.model import DeviceAdd, DeviceInfo


class ViosDevices(BaseModel):
    """The devices that one VIOS reaches; `problem` is empty when it answered."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    vios: str
    problem: str
    devices: tuple[DeviceInfo, ...]


def reached_devices(state: Path | None, vios: str | None) -> list[ViosDevices]:
    """Ask one VIOS, or all of them at once; one of several that does not answer is reported in its entry.

    :raise NoSuchVios:
    :raise Unreachable: the one VIOS that was named does not answer.
    """
    document = read_set(state)
    if vios is not None:
        document.vios(vios)

    async def run() -> list[ViosDevices]:
        names = list(document.vioses) if vios is None else [vios]
        return list(
            await asyncio.gather(*(_reached(document, name, tolerant=vios is None) for name in names))
        )

    return asyncio.run(run())


async def _reached(document: SetDocument, name: str, *, tolerant: bool) -> ViosDevices:
    async with ViosControl(document.vios(name).control, name, document.tls) as server:
        try:
            return _named(name, await server.devices(), await server.definition())
        except FarpageError as problem:
            if not tolerant:
                raise
            return ViosDevices(vios=name, problem=str(problem), devices=())


def _named(vios: str, devices: Sequence[DeviceInfo], definition: Definition) -> ViosDevices:
    """Call devices what the definition calls them: the labels of two may say the same."""
    records = definition.devices
    return ViosDevices(
        vios=vios,
        problem="",
        devices=tuple(
            device.model_copy(update={"name": records[device.id].name}) if device.id in records else device
            for device in devices
        ),
    )


def add_device(state: Path | None, document: DeviceAdd, names: Sequence[str]) -> list[ViosDevices]:
    """Add a device to each VIOS (to all when none is named), then have the hypervisor record it.

    One after the other: the first labels the device, the others find the label.

    :raise NoSuchVios: before anything was changed.
    """
    description = read_set(state)
    servers = [(name, description.vios(name)) for name in names or description.vioses]

    async def run() -> list[ViosDevices]:
        added: dict[str, DeviceInfo] = {}
        for name, vios in servers:
            async with ViosControl(vios.control, name, description.tls) as server:
                added[name] = await server.add_device(document)
        async with HypervisorControl(description.hypervisor.control, description.tls) as hypervisor:
            definition = await hypervisor.refresh_devices()
        return [_named(name, (device,), definition) for name, device in added.items()]

    return asyncio.run(run())
