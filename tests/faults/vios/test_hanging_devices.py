"""A device whose storage hangs holds up nobody who does not use it."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path

import pytest

from farpage.address import UnixAddress
from farpage.blockio import read_bytes
from farpage.definition.database import Database
from farpage.definition.store import DefinitionStore, EpochStore
from farpage.device.open import open_device
from farpage.nbd.client import Connection
from farpage.nbd.connecting import list_exports
from farpage.vios import volumes as answering
from farpage.vios.exports import VolumeExports
from farpage.vios.volumes import Volumes


async def test_exports_are_listed_and_pages_served_while_one_device_hangs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, release = threading.Event(), threading.Event()

    def hang() -> list[str]:
        asked.set()
        release.wait()
        return []

    monkeypatch.setattr(answering, "ANSWER_SECONDS", 2.0)
    database = Database(folder / "vios.db")
    volumes = Volumes("one", DefinitionStore(database), EpochStore(database))
    devices = [await open_device(f"dir:{folder}/{name}?size=16M") for name in ("hung", "well")]
    for device in devices:
        volumes.add_device(device)
    devices[1].create_volume("vm1", 1 << 20)
    monkeypatch.setattr(devices[0], "names", hang)
    exports = VolumeExports(volumes)
    address = UnixAddress(f"{folder}/d")
    await exports.server.start([address])
    connection = await Connection.open(address, "vm1")
    try:
        listing = asyncio.create_task(list_exports(address))
        await asyncio.to_thread(asked.wait)
        assert await read_bytes(connection, 0, 4096) == bytes(4096)
        assert not listing.done()
        assert await listing == [("vm1", "on device well")]
    finally:
        release.set()
        await connection.close()
        await exports.close()
        for device in devices:
            await device.close()
        database.close()
