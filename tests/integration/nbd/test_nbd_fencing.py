"""Fencing: when it returns, no older I/O can reach the device any more."""

from __future__ import annotations

import asyncio
import errno

from farpage.address import UnixAddress
from farpage.blockio import CONNECTION_LOST
from farpage.nbd import options
from farpage.nbd import protocol as p
from farpage.nbd.client import Connection
from farpage.nbd.export import Export, Peer
from farpage.nbd.server import Server
from tests.support.blockio import MemoryIO
from tests.support.commands import condition, read_bytes, write_bytes
from tests.support.nbd import Exports, RawClient, serving, short_folder


async def test_fencing_waits_for_commands_in_flight_then_disconnects() -> None:
    volume = MemoryIO(1 << 20)
    volume.hold = True
    async with serving({"v": volume}) as serving_:
        connection = await Connection.open(serving_.address, "v")
        finished: list[int] = []
        lost: list[Exception] = []
        connection.on_lost = lost.append
        connection.write(0, memoryview(b"abcd"), finished.append)
        connection.push()
        await condition(lambda: len(volume.held) == 1)
        fencing = asyncio.create_task(serving_.server.fence(lambda export: export.name == "v"))
        await asyncio.sleep(0.01)
        assert not fencing.done()
        volume.release()
        await fencing
        assert volume.content[:4] == b"abcd"
        assert serving_.provider.closed == ["v"]
        assert serving_.server.connections == ()
        await condition(lambda: len(lost) == 1)
        assert finished == [0]
        assert "the server closed it" in str(lost[0])


async def test_commands_after_the_fence_never_reach_the_volume() -> None:
    volume = MemoryIO(1 << 20)
    volume.hold = True
    async with serving({"v": volume}) as serving_:
        connection = await Connection.open(serving_.address, "v")
        first: list[int] = []
        later: list[int] = []
        connection.write(0, memoryview(b"abcd"), first.append)
        connection.push()
        await condition(lambda: len(volume.held) == 1)
        fencing = asyncio.create_task(serving_.server.fence(lambda export: True))
        await asyncio.sleep(0)
        connection.write(4, memoryview(b"efgh"), later.append)
        connection.read(0, 4, lambda error, payload: later.append(error))
        connection.flush(later.append)
        await condition(lambda: len(later) == 3)
        assert later == [errno.ESHUTDOWN] * 3
        assert len(volume.held) == 1
        volume.release()
        await fencing
        assert volume.content[:8] == b"abcd\0\0\0\0"


async def test_a_payload_that_is_still_arriving_is_not_written() -> None:
    volume = MemoryIO(1 << 20)
    async with serving({"v": volume}) as serving_:
        client = await RawClient.connect(serving_.unix_path)
        await client.go("v")
        client.request(p.NBD_CMD_WRITE, 1, 0, 8, payload=b"half")
        await client.writer.drain()
        client.request(p.NBD_CMD_FLUSH, 2, 0, 0)  # within the payload: not a request
        await serving_.server.fence(lambda export: True)
        await client.close()
        assert volume.log == []
        assert volume.content[:8] == bytes(8)


async def test_other_exports_go_on_while_one_is_fenced() -> None:
    volumes = {"v": MemoryIO(1 << 20), "w": MemoryIO(1 << 20)}
    volumes["v"].hold = True
    async with serving(dict(volumes)) as serving_:
        fenced = await Connection.open(serving_.address, "v")
        other = await Connection.open(serving_.address, "w")
        fenced.write(0, memoryview(b"abcd"), lambda error: None)
        fenced.push()
        await condition(lambda: len(volumes["v"].held) == 1)
        fencing = asyncio.create_task(serving_.server.fence(lambda export: export.name == "v"))
        assert await write_bytes(other, 0, b"efgh") == 0
        assert await read_bytes(other, 0, 4) == b"efgh"
        volumes["v"].release()
        await fencing
        assert await read_bytes(other, 0, 4) == b"efgh"
        (left,) = serving_.server.connections
        assert left.export is not None
        assert left.export.name == "w"
        await other.close()


async def test_an_export_that_is_being_handed_out_is_fenced_too() -> None:
    entered, go_on = asyncio.Event(), asyncio.Event()

    class Slow(Exports):
        async def open(self, name: str, peer: Peer) -> Export:
            entered.set()
            await go_on.wait()
            return await super().open(name, peer)

    provider = Slow({"v": MemoryIO(1 << 20)})
    server = Server(provider)
    with short_folder() as folder:
        await server.start([UnixAddress(str(folder / "s"))])
        client = await RawClient.connect(str(folder / "s"))
        await client.greet()
        client.send(
            options.encode_option(p.NBD_OPT_GO, options.encode_info_request(options.InfoRequest("v", ())))
        )
        await entered.wait()
        go_on.set()
        await condition(lambda: provider.opened == ["v"])
        await server.fence(lambda export: True)
        assert provider.closed == ["v"]
        assert server.connections == ()
        await client.close()
        await server.close()


async def test_closing_the_server_waits_for_commands_in_flight() -> None:
    volume = MemoryIO(1 << 20)
    volume.hold = True
    async with serving({"v": volume}) as serving_:
        connection = await Connection.open(serving_.address, "v")
        finished: list[int] = []
        connection.write(0, memoryview(b"abcd"), finished.append)
        connection.push()
        await condition(lambda: len(volume.held) == 1)
        closing = asyncio.create_task(serving_.server.close())
        await condition(lambda: finished == [CONNECTION_LOST])
        assert not closing.done()
        volume.release()
        await closing
        assert serving_.provider.closed == ["v"]
