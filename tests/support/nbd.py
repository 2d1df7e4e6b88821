"""A farpage NBD server for tests, and raw sockets to misbehave on."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from farpage.address import Address, TcpAddress, UnixAddress
from farpage.blockio import BlockIO
from farpage.nbd import codec, options
from farpage.nbd import protocol as p
from farpage.nbd.errors import ExportRefused
from farpage.nbd.export import Counters, Export, ExportInfo, Peer
from farpage.nbd.server import Server


class Exports:
    """An `ExportProvider` of fixed exports."""

    def __init__(self, exports: dict[str, BlockIO]) -> None:
        self.exports = exports
        self.counters = {name: Counters() for name in exports}
        self.peers: list[Peer] = []
        self.opened: list[str] = []
        self.closed: list[str] = []

    def _find(self, name: str) -> BlockIO:
        if name not in self.exports:
            raise ExportRefused.unknown(name)
        return self.exports[name]

    async def open(self, name: str, peer: Peer) -> Export:
        io = self._find(name)
        self.peers.append(peer)
        self.opened.append(name)
        return Export(
            name,
            io,
            f"volume {name}",
            on_closed=lambda: self.closed.append(name),
            counters=self.counters[name],
        )

    async def describe(self, name: str, peer: Peer) -> ExportInfo:
        return ExportInfo.of(self._find(name), f"volume {name}")

    async def names(self, peer: Peer) -> list[tuple[str, str]]:
        return [(name, f"volume {name}") for name in self.exports]


@dataclass
class Serving:
    server: Server
    provider: Exports
    folder: Path

    @property
    def address(self) -> Address:
        return self.server.addresses[0]

    @property
    def unix_path(self) -> str:
        address = self.address
        assert isinstance(address, UnixAddress)
        return address.path

    def uri(self, export: str) -> str:
        return f"nbd+unix:///{export}?socket={self.unix_path}"


@contextmanager
def short_folder() -> Iterator[Path]:
    """A folder whose sockets' paths fit into sun_path."""
    folder = Path(tempfile.mkdtemp(prefix="fp-", dir="/tmp"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder)


@asynccontextmanager
async def serving(
    exports: dict[str, BlockIO], *, handshake_timeout_seconds: float = 10.0, connections_max: int = 64
) -> AsyncIterator[Serving]:
    """Serve on a UNIX socket and on a TCP port of the loopback interface."""
    provider = Exports(exports)
    server = Server(
        provider, handshake_timeout_seconds=handshake_timeout_seconds, connections_max=connections_max
    )
    with short_folder() as folder:
        await server.start([UnixAddress(str(folder / "nbd.sock")), TcpAddress("127.0.0.1", 0)])
        try:
            yield Serving(server, provider, folder)
        finally:
            await server.close()


class RawClient:
    """A client that sends whatever a test likes."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def connect(cls, path: str) -> RawClient:
        return cls(*await asyncio.open_unix_connection(path, limit=1 << 20))

    async def greet(self, flags: int = p.NBD_FLAG_C_FIXED_NEWSTYLE | p.NBD_FLAG_C_NO_ZEROES) -> None:
        await self.reader.readexactly(options.GREETING.size)
        self.send(options.CLIENT_FLAGS.pack(flags))

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def option(self, option: int, data: bytes = b"") -> tuple[int, bytes, list[tuple[int, bytes]]]:
        """Send an option; return the last reply's type and data, and the replies before it."""
        self.send(options.encode_option(option, data))
        before: list[tuple[int, bytes]] = []
        while True:
            _, about, reply, length = options.OPTION_REPLY.unpack(
                await self.reader.readexactly(options.OPTION_REPLY.size)
            )
            assert about == option
            payload = await self.reader.readexactly(length)
            if reply == p.NBD_REP_ACK or reply & p.NBD_REP_FLAG_ERROR:
                return reply, payload, before
            before.append((reply, payload))

    async def go(self, export: str, *, structured: bool = False) -> None:
        await self.greet()
        if structured:
            assert (await self.option(p.NBD_OPT_STRUCTURED_REPLY))[0] == p.NBD_REP_ACK
        request = options.encode_info_request(options.InfoRequest(export, ()))
        assert (await self.option(p.NBD_OPT_GO, request))[0] == p.NBD_REP_ACK

    def request(
        self, command: int, cookie: int, offset: int, length: int, *, flags: int = 0, payload: bytes = b""
    ) -> None:
        self.send(codec.encode_request(command, flags, cookie, offset, length) + payload)

    async def simple_reply(self, payload_bytes: int = 0) -> tuple[int, int, bytes]:
        """Return error, cookie and payload."""
        magic, error, cookie = codec.SIMPLE_REPLY.unpack(
            await self.reader.readexactly(codec.SIMPLE_REPLY.size)
        )
        assert magic == p.NBD_SIMPLE_REPLY_MAGIC
        return error, cookie, b"" if error else await self.reader.readexactly(payload_bytes)

    async def chunk(self) -> tuple[int, int, int, bytes]:
        """Return flags, type, cookie and payload of a structured reply's chunk."""
        magic, flags, kind, cookie, length = codec.CHUNK.unpack(
            await self.reader.readexactly(codec.CHUNK.size)
        )
        assert magic == p.NBD_STRUCTURED_REPLY_MAGIC
        return flags, kind, cookie, await self.reader.readexactly(length)

    async def at_end(self) -> bool:
        """Wait for the server to close; return whether nothing came before."""
        try:
            return await self.reader.read(1) == b""
        except ConnectionResetError:
            return True

    async def close(self) -> None:
        self.writer.close()
        with suppress(BrokenPipeError, ConnectionResetError):
            await self.writer.wait_closed()
