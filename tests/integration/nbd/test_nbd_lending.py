"""Storage that a server lends: a descriptor that comes with the export, for clients on its host that ask."""

from __future__ import annotations

import errno
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from farpage.address import TcpAddress, UnixAddress
from farpage.blockio import wait_done
from farpage.device.directory import DirectoryDevice, prepare_directory
from farpage.device.spec import DirectorySpec
from farpage.kernel.memory import AlignedBuffer
from farpage.nbd.client import Connection
from farpage.nbd.export import Export, Peer
from farpage.nbd.server import Server
from tests.support.blockio import MemoryIO
from tests.support.nbd import Exports, short_folder


class LendingExports(Exports):
    """Exports of a directory's volumes, which are lent."""

    async def open(self, name: str, peer: Peer) -> Export:
        export = await super().open(name, peer)
        export.lend = getattr(export.io, "lend", None)
        return export


@asynccontextmanager
async def lending(folder: Path) -> AsyncIterator[Server]:
    """Serve a volume `v` in a directory and one in memory, `m`, on a UNIX socket and a TCP port."""
    spec = DirectorySpec(str(folder))
    device = DirectoryDevice(spec, prepare_directory(spec))
    device.create_volume("v", 1 << 20)
    volume = await device.open_volume("v", 1)
    if device.access != "direct":
        pytest.skip("no direct I/O on this file system")
    server = Server(LendingExports({"v": volume, "m": MemoryIO(1 << 20)}))
    with short_folder() as sockets:
        await server.start([UnixAddress(str(sockets / "s")), TcpAddress("127.0.0.1", 0)])
        try:
            yield server
        finally:
            await server.close()
            await volume.close()
            await device.close()


async def test_what_was_written_is_read_past_the_server(tmp_path: Path) -> None:
    async with lending(tmp_path) as server:
        connection = await Connection.open(server.addresses[0], "v", borrow=True)
        assert connection.lent is not None
        lent, origin = connection.lent.take(), connection.lent.origin_bytes
        with AlignedBuffer(4096) as buffer:
            buffer.view[:] = b"x" * 4096
            assert await wait_done(lambda done: connection.write(8192, buffer.view, done)) == 0
            buffer.view[:] = bytes(4096)
            assert os.preadv(lent, [buffer.view], origin + 8192) == 4096
            assert bytes(buffer.view) == b"x" * 4096
            with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
                os.pwritev(lent, [buffer.view], 0)
        await connection.close()
        os.close(lent)


async def test_nothing_is_lent_unasked_over_tcp_or_where_there_is_no_file(tmp_path: Path) -> None:
    async with lending(tmp_path) as server:
        unix, tcp = server.addresses
        for address, export, borrow in ((unix, "v", False), (tcp, "v", True), (unix, "m", True)):
            connection = await Connection.open(address, export, borrow=borrow)
            assert connection.lent is None
            await connection.close()


def descriptors() -> int:
    """Count those of this process."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


async def test_what_is_lent_and_not_taken_is_closed(tmp_path: Path) -> None:
    async with lending(tmp_path) as server:
        before = descriptors()
        for _ in range(3):
            connection = await Connection.open(server.addresses[0], "v", borrow=True)
            assert connection.lent is not None
            await connection.close()
        for connection_ in server.connections:
            await connection_.wait_closed()
        assert descriptors() == before
