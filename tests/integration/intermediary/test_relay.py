"""The relay between two real NBD servers' sockets."""

from __future__ import annotations

import asyncio
import contextlib
import errno
from collections.abc import AsyncIterator
from dataclasses import dataclass

import pytest

from farpage.address import UnixAddress
from farpage.blockio import CONNECTION_LOST, Allocation
from farpage.intermediary.relay import Relay
from farpage.nbd import protocol as p
from farpage.nbd.client import Connection
from farpage.nbd.errors import ExportRefused, ServerRefused
from farpage.nbd.export import Export, Peer
from farpage.vios.names import ExportName
from farpage.volume.refusal import RefusalKind, refusal_of
from tests.support.blockio import MemoryIO
from tests.support.commands import condition, extents_of, read_bytes, wait_done, write_bytes
from tests.support.nbd import Serving, serving

NAME = "vm1/d2@7:0123456789abcdef+fedcba9876543210"
PLAIN = "vm1/d2+fedcba9876543210"


@dataclass
class _Relaying:
    relay: Relay
    upstream: Serving
    volume: MemoryIO

    @property
    def address(self) -> UnixAddress:
        address = self.relay.server.addresses[0]
        assert isinstance(address, UnixAddress)
        return address


@contextlib.asynccontextmanager
async def _relaying() -> AsyncIterator[_Relaying]:
    volume = MemoryIO(1 << 20)
    async with serving({NAME: volume, PLAIN: volume}) as upstream:
        address = upstream.address
        relay = Relay(lambda: [address], ExportName("vm1", None, device="d2", principal="fedcba9876543210"))
        await relay.server.start([UnixAddress(str(upstream.folder / "relay"))])
        try:
            yield _Relaying(relay, upstream, volume)
        finally:
            await relay.server.close()


async def test_commands_go_through_and_each_connection_has_its_own_upstream() -> None:
    async with _relaying() as relaying:
        first, second = [await Connection.open(relaying.address, NAME) for _ in range(2)]
        assert relaying.upstream.provider.opened.count(NAME) == 2
        assert relaying.relay.connections == 2
        assert await write_bytes(first, 4096, b"x" * 8192, fua=True) == 0
        assert await read_bytes(second, 4096, 8192) == b"x" * 8192
        assert await wait_done(lambda d: first.trim(4096, 4096, d)) == 0
        assert await wait_done(first.flush) == 0
        assert relaying.volume.log[0] == ("write", 4096, 8192, True)
        assert (await extents_of(first, 0, 8192))[0].allocation & Allocation.HOLE
        assert relaying.relay.counters.written_bytes == relaying.relay.counters.read_bytes == 8192
        await first.close()
        await condition(lambda: relaying.upstream.provider.closed.count(NAME) == 1)
        await second.close()


async def test_errors_of_commands_come_back_as_they_are() -> None:
    async with _relaying() as relaying:
        connection = await Connection.open(relaying.address, NAME)
        relaying.volume.errors["write"] = errno.ENOSPC
        assert await write_bytes(connection, 0, bytes(4096)) == errno.ENOSPC
        relaying.volume.errors["write"] = errno.ESHUTDOWN
        assert await write_bytes(connection, 0, bytes(4096)) == errno.ESHUTDOWN
        await connection.close()


async def test_an_open_that_is_fenced_upstream_is_refused_in_the_same_words(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with _relaying() as relaying:

        async def refuse(name: str, peer: Peer) -> Export:
            raise ExportRefused.forbidden("another_owner 9: volume 'vm1': epoch 7 is refused")

        monkeypatch.setattr(relaying.upstream.provider, "open", refuse)
        with pytest.raises(ServerRefused) as caught:
            await Connection.open(relaying.address, NAME)
        assert caught.value.reply == "NBD_REP_ERR_POLICY"
        refusal = refusal_of(caught.value)
        assert refusal is not None
        assert (refusal.kind, refusal.epoch) == (RefusalKind.ANOTHER_OWNER, 9)


@pytest.mark.parametrize(
    "name",
    [
        NAME.replace("vm1", "vm2"),
        NAME.replace("d2", "d3"),
        NAME.replace("+f", "+0"),
        NAME.removesuffix("+fedcba9876543210"),
        "vm1/d1<d2+fedcba9876543210",
        "what is this",
    ],
)
async def test_another_name_is_not_passed_on(name: str) -> None:
    async with _relaying() as relaying:
        with pytest.raises(ServerRefused):
            await Connection.open(relaying.address, name)
        assert relaying.upstream.provider.opened == []


async def test_losing_the_server_upstream_ends_the_connection_with_its_commands_unanswered() -> None:
    async with _relaying() as relaying:
        connection = await Connection.open(relaying.address, NAME)
        relaying.volume.hold = True
        written = asyncio.ensure_future(write_bytes(connection, 0, bytes(4096)))
        await condition(lambda: len(relaying.volume.held) == 1)
        for theirs in relaying.upstream.server.connections:
            theirs.disconnect()
        assert await written == CONNECTION_LOST
        assert relaying.relay.lost == 1
        relaying.volume.release_all()


async def test_a_server_upstream_that_is_away_is_told_of_as_such_and_found_again() -> None:
    async with _relaying() as relaying:
        relaying.upstream.server._stop_listening()
        with pytest.raises(ServerRefused) as caught:
            await Connection.open(relaying.address, NAME)
        assert caught.value.reply == p.REP_ERROR_NAMES[p.NBD_REP_ERR_SHUTDOWN]
        assert "cannot be reached" in caught.value.reason
        assert refusal_of(caught.value) is None
        address = UnixAddress(str(relaying.upstream.folder / "nbd.sock"))
        await relaying.upstream.server.start([address])
        await (await Connection.open(relaying.address, NAME)).close()
