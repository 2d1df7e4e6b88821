"""Clients that one server hands over to another one, as it would to a server in another process."""

from __future__ import annotations

import os
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from farpage.address import TcpAddress, UnixAddress
from farpage.blockio import read_bytes
from farpage.nbd import options
from farpage.nbd import protocol as p
from farpage.nbd.client import Connection
from farpage.nbd.errors import ServerRefused, ServerUnreachable
from farpage.nbd.export import Peer
from farpage.nbd.negotiation import Agreed, Enter
from farpage.nbd.server import Server
from tests.support.blockio import MemoryIO
from tests.support.nbd import Exports, RawClient, short_folder

SIZE = 1 << 20


@dataclass
class Pair:
    """A front, which serves `own` by itself, and the server behind it, which serves `v`."""

    front: Server
    behind: Server
    volume: MemoryIO
    gone: bool = False
    """The server behind has died, with whatever it was sent."""
    peers: list[Peer] = field(default_factory=list)

    async def hand_over(self, sock: socket.socket, step: Enter, agreed: Agreed, peer: Peer) -> bool:
        if step.name == "own":
            return False
        if self.gone:
            raise ConnectionAbortedError("it died")
        await self.behind.adopt(sock.dup(), step, agreed)
        self.peers.append(peer)
        return True


@asynccontextmanager
async def pair(*, connections_max: int = 64) -> AsyncIterator[Pair]:
    volume = MemoryIO(SIZE)
    front = Server(Exports({"own": MemoryIO(SIZE), "v": volume}))
    behind = Server(Exports({"v": volume}), adopts=True, connections_max=connections_max)
    both = Pair(front, behind, volume)
    front.hand_over = both.hand_over
    with short_folder() as folder:
        await front.start([UnixAddress(str(folder / "s")), TcpAddress("127.0.0.1", 0)])
        try:
            yield both
        finally:
            await front.close()
            await behind.close()


async def test_a_client_is_served_by_the_other_server_whose_process_it_is_told() -> None:
    async with pair() as both:
        for address, pid in zip(both.front.addresses, (os.getpid(), None), strict=True):
            connection = await Connection.open(address, "v")
            assert await read_bytes(connection, 0, 4096) == bytes(4096)
            assert connection.peer_pid == pid
            assert (len(both.front.connections), len(both.behind.connections)) == (0, 1)
            await connection.close()
            for adopted in both.behind.connections:
                await adopted.wait_closed()


async def test_who_is_served_by_the_first_server_is_told_nothing() -> None:
    async with pair() as both:
        connection = await Connection.open(both.front.addresses[0], "own")
        assert connection.peer_pid == os.getpid()
        assert (len(both.front.connections), len(both.behind.connections)) == (1, 0)
        await connection.close()


async def test_a_client_that_is_refused_goes_on_with_the_first_server() -> None:
    async with pair(connections_max=1) as both:
        address = both.front.addresses[0]
        assert isinstance(address, UnixAddress)
        client = await RawClient.connect(address.path)
        await client.greet()
        request = options.encode_info_request(options.InfoRequest("w", ()))
        assert (await client.option(p.NBD_OPT_GO, request))[0] == p.NBD_REP_ERR_UNKNOWN
        request = options.encode_info_request(options.InfoRequest("v", ()))
        assert (await client.option(p.NBD_OPT_GO, request))[0] == p.NBD_REP_ACK
        client.request(p.NBD_CMD_READ, 7, 0, 4096)
        assert await client.simple_reply(4096) == (0, 7, bytes(4096))
        with pytest.raises(ServerRefused, match="too many connections"):
            await Connection.open(address, "v")
        await client.close()


async def test_a_client_whose_fate_is_unknown_is_hung_up_on() -> None:
    async with pair() as both:
        both.gone = True
        with pytest.raises(ServerUnreachable):
            await Connection.open(both.front.addresses[0], "v")


async def test_nothing_is_adopted_by_a_server_that_ends() -> None:
    async with pair() as both:
        await both.behind.close()
        with pytest.raises(ServerRefused, match="shutting down"):
            await Connection.open(both.front.addresses[0], "v")


def descriptors() -> int:
    """Count those of this process."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


async def test_the_descriptors_of_answers_are_closed() -> None:
    async with pair() as both:
        before = descriptors()
        for _ in range(3):
            connection = await Connection.open(both.front.addresses[0], "v")
            await connection.close()
        for adopted in both.behind.connections:
            await adopted.wait_closed()
        assert descriptors() == before
