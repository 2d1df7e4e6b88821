"""A VIOS that is killed or stopped."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import signal
from pathlib import Path

import pytest

from farpage.api.remote import RemoteError
from farpage.blockio import CONNECTION_LOST, read_bytes
from farpage.definition.document import canonical_json
from farpage.definition.model import Definition, ViosRecord
from farpage.definition.rules import FoundDevice, add_client, register_vios
from farpage.errors import Unreachable
from farpage.nbd.errors import ServerRefused
from farpage.nbd.protocol import NBD_CMD_READ
from tests.support.nbd import RawClient
from tests.support.vios import ViosProcess, until, vios_processes
from tests.support.volumes import flush, write

MIB = 1 << 20


async def test_volumes_epochs_and_the_definition_survive_a_kill(folder: Path) -> None:
    with vios_processes(folder, "one", devices=[f"dir:{folder}/disk?size=64M"]) as (vios,):
        definition = await define(vios)
        await vios.create("vm1")
        connection = await vios.connect("vm1@40")
        content = os.urandom(MIB)
        assert await write(connection, 0, content) == 0
        assert await flush(connection) == 0
        vios.kill()
        await connection.close()
        vios.start()
        async with vios.client() as client:
            assert (await client.request("GET", "/v1/definition")).decode() == canonical_json(definition)
        assert (await vios.volume("vm1")).epoch == 40
        with pytest.raises(ServerRefused, match="epoch 39 is older than epoch 40"):
            await vios.connect("vm1@39")
        again = await vios.connect("vm1@40")
        assert await read_bytes(again, 0, MIB) == content
        # Its clients see a loss at once.
        writing = asyncio.create_task(write(again, 0, content))
        vios.signal(signal.SIGSTOP)
        vios.kill()
        assert await writing in {0, CONNECTION_LOST}
        assert await write(again, 0, content) == CONNECTION_LOST
        await again.close()


async def define(vios: ViosProcess) -> Definition:
    device = await vios.device()
    found = FoundDevice(device.id, device.name, device.kind, device.spec, device.size_bytes, device.commands)
    record = ViosRecord(control=vios.control, data=(str(vios.data),))
    definition = register_vios(Definition(), vios.name, record, [found])
    definition = add_client(definition, "vm2", memory_bytes=MIB, hypervisor="host")
    async with vios.client() as client:
        return await client.put("/v1/definition", definition, Definition, params={"expected_revision": 0})


async def test_a_kill_amid_changes_leaves_whole_ones(folder: Path) -> None:
    with vios_processes(folder, "one", devices=[f"dir:{folder}/disk?size=64M"]) as (vios,):
        await vios.create("vm1")
        made: list[str] = []
        epochs = [0]
        for _ in range(2):
            target = len(made) + 5
            changing = asyncio.create_task(_change_until_killed(vios, made, epochs))
            await until(lambda: len(made) >= target)  # noqa: B023
            vios.kill()
            with pytest.raises(Unreachable):
                await changing
            vios.start()
            assert (await vios.volume("vm1")).epoch >= epochs[-1]
            for name in made:
                assert (await vios.volume(name)).size_bytes == 4096


async def _change_until_killed(vios: ViosProcess, made: list[str], epochs: list[int]) -> None:
    while True:
        name = f"a{len(made)}"
        await vios.claim("vm1", epochs[-1] + 10)
        epochs.append(epochs[-1] + 10)
        with contextlib.suppress(RemoteError):  # made before the kill, whose answer was lost
            await vios.create(name, 4096)
        made.append(name)


async def test_a_stopped_vios_cannot_write_late_what_it_was_sent(folder: Path) -> None:
    """Epoch 2 owns the volume through the other VIOS before the stopped one wakes up with its writes."""
    with vios_processes(folder, "one", "two", devices=[f"dir:{folder}/disk?size=64M"]) as (one, two):
        await one.create("vm1")
        old = await one.connect("vm1@1")
        assert await write(old, 0, b"before" + bytes(4090)) == 0
        one.signal(signal.SIGSTOP)
        late = [asyncio.create_task(write(old, page * 4096, b"late" * 1024)) for page in range(64)]
        await asyncio.sleep(0)
        old.push()
        new = await two.connect("vm1@2")
        content = os.urandom(64 * 4096)
        assert await write(new, 0, content) == 0
        one.signal(signal.SIGCONT)
        errors = set(await asyncio.gather(*late))
        assert errors == {errno.ESHUTDOWN}
        assert await read_bytes(new, 0, 64 * 4096) == content
        with pytest.raises(ServerRefused, match="epoch 1 is older than epoch 2"):
            await one.connect("vm1@1")
        # It serves the new owner like any other.
        standby = await one.connect("vm1@2")
        assert await read_bytes(standby, 0, 64 * 4096) == content
        for connection in (old, new, standby):
            await connection.close()


async def test_a_client_that_hangs_is_fenced_too(vios: ViosProcess) -> None:
    """Its socket is full of replies that it does not read; the newer owner does not wait for it."""
    await vios.create("full", 16 * MIB)
    raw = await RawClient.connect(vios.data.path)
    await raw.go("full@1")
    raw.writer.transport.pause_reading()  # type: ignore[attr-defined]
    for cookie in range(16):
        raw.request(NBD_CMD_READ, cookie, cookie * MIB, MIB)
    await raw.writer.drain()
    newer = await vios.connect("full@2")
    assert await write(newer, 0, b"a" * 4096) == 0
    await newer.close()
    raw.writer.transport.abort()
    await raw.close()
