"""A device whose storage hangs holds up nobody who does not use it."""

from __future__ import annotations

import asyncio
import signal
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from farpage.address import TcpAddress, UnixAddress
from farpage.blockio import BlockIO, read_bytes
from farpage.definition.database import Database
from farpage.definition.store import DefinitionStore, EpochStore
from farpage.device.base import PagingDevice
from farpage.device.open import open_device
from farpage.nbd.client import Connection
from farpage.nbd.connecting import list_exports
from farpage.nbd.errors import ServerRefused
from farpage.vios import volumes as answering
from farpage.vios.exports import LATE_MAX, VolumeExports
from farpage.vios.model import DeviceInfo
from farpage.vios.volumes import Volumes
from tests.support.blockio import MemoryIO
from tests.support.commands import condition
from tests.support.nbdkit import Nbdkit
from tests.support.vios import vios_processes

SIZE = 1 << 20


@dataclass
class Served:
    exports: VolumeExports
    hung: PagingDevice
    well: PagingDevice

    def name(self, device: PagingDevice) -> str:
        return f"vm1/{device.id}"

    async def connect(self, device: PagingDevice, address: int = 0) -> Connection:
        return await Connection.open(self.exports.server.addresses[address], self.name(device))

    async def is_refused(self) -> None:
        """Have a client refused, and one of the other device served."""
        with pytest.raises(ServerRefused, match=r"PLATFORM.*'vm1'.* 4 clients"):
            await self.connect(self.hung)
        other = await self.connect(self.well)
        assert await read_bytes(other, 0, 4096) == bytes(4096)
        await other.close()

    async def is_served(self) -> None:
        """Have a client of the device served when what hung has come to its end."""
        await condition(lambda: not self.exports.server.connections)
        connection = await self.connect(self.hung)
        assert await read_bytes(connection, 0, 4096) == bytes(4096)
        await connection.close()


@asynccontextmanager
async def served(folder: Path) -> AsyncIterator[Served]:
    """Serve a volume on each of two devices."""
    database = Database(folder / "vios.db")
    volumes = Volumes("one", DefinitionStore(database), EpochStore(database))
    devices = [await open_device(f"dir:{folder}/{name}?size=16M") for name in ("hung", "well")]
    for device in devices:
        volumes.add_device(device)
        await device.make_volume("vm1", SIZE)
    exports = VolumeExports(volumes)
    await exports.server.start([UnixAddress(f"{folder}/d"), TcpAddress("127.0.0.1", 0)])
    try:
        yield Served(exports, *devices)
    finally:
        await exports.close()
        for device in devices:
            await device.close()
        database.close()


async def test_clients_that_leave_their_commands_behind_are_few_while_a_device_hangs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    storage = MemoryIO(SIZE, at_hand=False)

    async def open_volume(*_: object) -> BlockIO:
        return storage

    async with served(folder) as at:
        monkeypatch.setattr(at.hung, "open_volume", open_volume)
        storage.hold = True
        try:
            for number in range(LATE_MAX):
                connection = await at.connect(at.hung, number % 2)
                connection.read(0, 4096, lambda error, payload: None)
                await condition(lambda: len(storage.held) > number)  # noqa: B023
                connection.abort()
            await condition(lambda: all(connection.left for connection in at.exports.server.connections))
            await at.is_refused()
        finally:
            storage.hold = False
            storage.release_all()
        await at.is_served()


async def test_clients_that_give_up_while_they_are_let_in_are_few_while_a_device_hangs(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, release = threading.Semaphore(0), threading.Event()

    async with served(folder) as at:
        really = at.hung.volume

        def hang(name: str) -> object:
            asked.release()
            release.wait()
            return really(name)

        monkeypatch.setattr(at.hung, "volume", hang)
        try:
            for number in range(LATE_MAX):
                connecting = asyncio.create_task(at.connect(at.hung, number % 2))
                await asyncio.to_thread(asked.acquire)
                connecting.cancel()
                await asyncio.wait([connecting])
            await condition(lambda: all(connection.left for connection in at.exports.server.connections))
            await at.is_refused()
        finally:
            release.set()
        await at.is_served()


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


async def test_a_device_that_hangs_is_listed_without_what_is_on_it(folder: Path) -> None:
    async with Nbdkit(folder / "s", "memory", "16M") as server:
        with vios_processes(folder, "one", devices=[server.uri, f"dir:{folder}/disk?size=16M"]) as (vios,):
            server.signal(signal.SIGSTOP)
            async with vios.client() as client:
                hung, well = await client.get("/v1/devices", tuple[DeviceInfo, ...])
            assert hung.spec == server.uri
            assert {hung.provisioned_bytes, hung.used_bytes, hung.volumes} == {None}
            assert (well.name, well.volumes) == ("disk", 0)
            await server.kill()
