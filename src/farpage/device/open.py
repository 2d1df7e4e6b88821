"""Opens devices by their specifications: the place where the kinds are known."""

from __future__ import annotations

import asyncio

from farpage.device.base import Admit, PagingDevice, admit_all
from farpage.device.block import BlockDevice, open_block_device
from farpage.device.directory import DirectoryDevice, prepare_directory
from farpage.device.errors import DeviceUnusable
from farpage.device.memory import MemoryDevice
from farpage.device.remote import open_remote_device
from farpage.device.spec import BlockSpec, MemorySpec, RemoteSpec, parse_spec


async def open_device(
    spec: str,
    *,
    name: str | None = None,
    size_bytes: int | None = None,
    force: bool = False,
    admit: Admit = admit_all,
) -> PagingDevice:
    """Open a device for use in the running event loop; label it when it has no label yet.

    Whatever `admit` raises ends that before it changes anything.

    :raise InvalidInput: the specification cannot be read.
    :raise DeviceUnusable: the storage is not there, in use by something else, or not as asked for.
    """
    parsed = parse_spec(spec)
    if isinstance(parsed, MemorySpec):
        if size_bytes is not None and size_bytes != parsed.size_bytes:
            raise DeviceUnusable(spec, f"the size given is {size_bytes}", "give the size once")
        device = MemoryDevice(parsed, name=name, text=spec)
        admit(device.id, device.name)
        return device
    if isinstance(parsed, BlockSpec):
        storage, block_label = await asyncio.to_thread(
            open_block_device, parsed, text=spec, name=name, size_bytes=size_bytes, force=force, admit=admit
        )
        return BlockDevice(storage, block_label, text=spec)
    if isinstance(parsed, RemoteSpec):
        return await open_remote_device(
            parsed, text=spec, name=name, size_bytes=size_bytes, force=force, admit=admit
        )
    label = await asyncio.to_thread(
        prepare_directory, parsed, text=spec, name=name, size_bytes=size_bytes, force=force, admit=admit
    )
    return DirectoryDevice(parsed, label, text=spec)
