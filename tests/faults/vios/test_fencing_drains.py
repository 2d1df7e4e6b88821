"""An open at a newer epoch is answered only when no older command can reach the device any more."""

from __future__ import annotations

import asyncio
import os
import random
import threading
from pathlib import Path

import pytest

from farpage.address import UnixAddress
from farpage.blockio import read_bytes
from farpage.definition.database import Database
from farpage.definition.store import DefinitionStore, EpochStore
from farpage.device import volumefile
from farpage.device.claim import Claim
from farpage.device.open import open_device
from farpage.nbd import lane
from farpage.nbd.client import Connection
from farpage.nbd.errors import ServerRefused
from farpage.vios.exports import VolumeExports
from farpage.vios.volumes import Volumes
from tests.support.vios import ViosProcess, until
from tests.support.volumes import write

SIZE = 4 << 20


async def write_until_refused(connection: Connection, seed: int, written: asyncio.Event) -> None:
    """Write pages at random, one after the other."""
    chance = random.Random(seed)
    while await write(connection, chance.randrange(0, SIZE, 4096), chance.randbytes(4096)) == 0:
        written.set()


async def test_no_byte_of_the_older_owner_changes_after_the_answer(vios: ViosProcess) -> None:
    await vios.create("drained", SIZE)
    content = vios.folder / "disk" / "volumes" / "drained"
    for epoch in range(1, 6):
        connections = [await vios.connect(f"drained@{epoch}") for _ in range(2)]
        written = asyncio.Event()
        writers = [
            asyncio.create_task(write_until_refused(connection, epoch * 100 + number, written))
            for number in range(32)
            for connection in connections
        ]
        await written.wait()
        await vios.claim("drained", epoch + 1)
        at_the_answer = await asyncio.to_thread(content.read_bytes)
        await asyncio.gather(*writers)
        assert await asyncio.to_thread(content.read_bytes) == at_the_answer
        for connection in connections:
            await connection.close()


async def test_the_answer_waits_for_a_write_that_hangs_in_the_device(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stuck, release = threading.Event(), threading.Event()
    really = volumefile.write_fully

    def slow(descriptor: int, data: memoryview, offset: int) -> None:
        if bytes(data[:4]) == b"slow":
            stuck.set()
            release.wait()
        really(descriptor, data, offset)

    monkeypatch.setattr(volumefile, "write_fully", slow)
    monkeypatch.setattr(lane, "LANES_MAX", 0)  # the threads of the device write
    database = Database(folder / "vios.db")
    volumes = Volumes("one", DefinitionStore(database), EpochStore(database))
    device = await open_device(f"dir:{folder}/disk?size=16M")
    volumes.add_device(device)
    device.create_volume("vm1", SIZE)
    exports = VolumeExports(volumes)
    address = UnixAddress(f"{folder}/d")
    await exports.server.start([address])
    try:
        old = await Connection.open(address, "vm1@1")
        hanging = asyncio.create_task(write(old, 0, b"slow" * 1024))
        await asyncio.to_thread(stuck.wait)
        claiming = asyncio.create_task(volumes.claim("vm1", Claim(2)))
        opening = asyncio.create_task(Connection.open(address, "vm1@2"))
        await until(lambda: volumes._claims_seen(device.volume("vm1").id).current == Claim(2))
        # Refused at once although the drain is under way, for new opens and for further commands.
        with pytest.raises(ServerRefused, match="older"):
            await Connection.open(address, "vm1@1")
        assert await write(old, 4096, b"late" * 1024) != 0
        assert not claiming.done()
        assert not opening.done()
        release.set()
        await claiming
        new = await opening
        assert await read_bytes(new, 0, 8192) == b"slow" * 1024 + bytes(4096)
        assert await write(new, 0, b"new!" * 1024) == 0
        await hanging
        assert await read_bytes(new, 0, 4096) == b"new!" * 1024
        await old.close()
        await new.close()
    finally:
        release.set()
        await exports.close()
        await device.close()
        database.close()


async def test_owners_that_come_at_once_are_let_in_by_epoch(vios: ViosProcess) -> None:
    await vios.create("crowded", SIZE)
    epochs = list(range(1, 25))
    random.Random(3).shuffle(epochs)
    opened = await asyncio.gather(
        *(vios.connect(f"crowded@{epoch}") for epoch in epochs), return_exceptions=True
    )
    connections = [connection for connection in opened if isinstance(connection, Connection)]
    results = await asyncio.gather(*(write(connection, 0, os.urandom(4096)) for connection in connections))
    alive = [connection for connection, error in zip(connections, results, strict=True) if error == 0]
    assert [connection.export_name for connection in alive] == ["crowded@24"]
    for connection in connections:
        await connection.close()
