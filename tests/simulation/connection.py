"""The client's side of a connection: stands in for `farpage.nbd.client.Connection`, without the wire."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from typing import Any

from farpage.blockio import CONNECTION_LOST, BlockLimits, DirectFile, Done, ExtentsDone, Feature, ReadDone
from farpage.errors import Unreachable
from farpage.nbd.errors import ConnectionEnded, ExportRefused, ServerRefused
from farpage.nbd.export import Export
from farpage.nbd.protocol import REP_ERROR_NAMES
from farpage.vios.exports import VolumeExport
from farpage.volume.connector import Endpoint, PathConnection
from tests.simulation.network import Network, Pipe
from tests.simulation.vios import SimulatedServerConnection, SimulatedVios
from tests.simulation.world import Process


class Connector:
    """Connects one client process with the VIOS."""

    def __init__(
        self,
        network: Network,
        vioses: dict[str, SimulatedVios],
        process: Process,
        *,
        host: str,
        same_host: bool,
        borrows: bool = False,
    ) -> None:
        """With `same_host` the servers' processes are known, as over UNIX sockets.

        With `borrows` the client reads by itself what the servers lend.
        """
        self._network = network
        self._vioses = vioses
        self._process = process
        self._host = host
        self._same_host = same_host
        self._borrows = borrows
        self.on_open: Callable[[str, str], None] = lambda *_: None
        """Told of each open that was acknowledged: VIOS, export name."""

    async def __call__(self, endpoint: Endpoint, export_name: str, timeout_seconds: float) -> PathConnection:
        """Connect and negotiate."""
        vios = self._vioses[endpoint.vios]
        opened: asyncio.Future[Export] = asyncio.get_running_loop().create_future()
        pipe = Pipe(self._network, self._process, vios.process, client_host=self._host)

        def fail(error: Exception) -> None:
            if not opened.done():
                opened.set_exception(error)

        def answered(export: Export | None, refusal: ExportRefused | None) -> None:
            if refusal is not None:
                reply = REP_ERROR_NAMES[refusal.reply_type]
                fail(ServerRefused(export_name, endpoint.vios, refusal.message, reply))
            elif export is not None and not opened.done():
                opened.set_result(export)

        def greeted(server: SimulatedServerConnection) -> None:
            pipe.send(vios_process, lambda: server.open(export_name, answered))

        def accept() -> None:
            server = vios.accept(pipe)
            pipe.send(self._process, lambda: greeted(server))
            servers.append(server)

        vios_process = pipe.server
        servers: list[SimulatedServerConnection] = []
        ended: list[bool] = []

        def end() -> None:
            ended.append(True)
            fail(ConnectionEnded(export_name, endpoint.vios, "the server closed it"))

        pipe.on_end[self._process] = end
        pipe.send(vios_process, accept)
        try:
            async with asyncio.timeout(timeout_seconds):
                export = await opened
        except TimeoutError:
            pipe.close(self._process)
            raise Unreachable("VIOS", endpoint.vios, "no answer", "start it") from None
        except BaseException:
            pipe.close(self._process)
            raise
        self.on_open(endpoint.vios, export_name)
        pid = vios_process.pid if self._same_host else None
        connection = SimulatedConnection(pipe, servers[0], export, endpoint.vios, pid)
        if ended:
            asyncio.get_running_loop().call_soon(connection.end)
        if self._borrows and isinstance(export, VolumeExport) and export.lend is not None:
            connection.direct = vios.lent(export.volume_id, self._process)
        return connection


class SimulatedConnection:
    """One connection to one export."""

    limits = BlockLimits()
    features = Feature.NONE
    read_only = False

    def __init__(
        self, pipe: Pipe, server: SimulatedServerConnection, export: Export, vios: str, pid: int | None
    ) -> None:
        self.size_bytes = export.io.size_bytes
        self.on_lost: Callable[[Exception], None] | None = None
        self.direct: DirectFile | None = None
        self.peer_pid = pid
        self._name = self.export_name = export.name
        self._vios = self.address = vios
        self._pipe = pipe
        self._server = server
        self._ended = False
        self._in_flight: dict[int, Callable[[int, Any], None]] = {}
        self._cookie = 0
        self._idle: asyncio.Future[None] | None = None
        pipe.on_end[pipe.client] = self.end

    def push(self) -> None:
        """Everything is sent at once here."""

    def _start(self, kind: str, arguments: tuple[Any, ...], end: Callable[[int, Any], None]) -> None:
        if self._ended:
            end(CONNECTION_LOST, None)
            return
        self._cookie += 1
        cookie = self._cookie
        self._in_flight[cookie] = end

        def answered(error: int, payload: Any) -> None:
            ending = self._in_flight.pop(cookie, None)
            if ending:
                ending(error, payload)
            if self._idle and not self._in_flight and not self._idle.done():
                self._idle.set_result(None)

        server = self._server
        self._pipe.send(self._pipe.server, lambda: server.request(kind, arguments, answered))

    def read_now(self, offset: int, into: memoryview) -> bool:
        return False

    def read(self, offset: int, length: int, done: ReadDone) -> None:
        self._start(
            "read",
            (offset, length),
            lambda error, payload: done(error, None if payload is None else memoryview(payload)),
        )

    def write(self, offset: int, data: memoryview, done: Done, *, fua: bool = False) -> None:
        self._start("write", (offset, memoryview(bytes(data))), lambda error, _: done(error))

    def zero(
        self,
        offset: int,
        length: int,
        done: Done,
        *,
        punch: bool = True,
        fast: bool = False,
        fua: bool = False,
    ) -> None:
        self._start("zero", (offset, length), lambda error, _: done(error))

    def trim(self, offset: int, length: int, done: Done, *, fua: bool = False) -> None:
        self._start("trim", (offset, length), lambda error, _: done(error))

    def cache(self, offset: int, length: int, done: Done) -> None:
        done(errno.ENOTSUP)

    def flush(self, done: Done) -> None:
        self._start("flush", (), lambda error, _: done(error))

    def extents(self, offset: int, length: int, done: ExtentsDone) -> None:
        if Feature.EXTENTS in self.features:
            self._start("extents", (offset, length), done)
        else:
            done(errno.ENOTSUP, None)

    def read_into(self, offset: int, into: memoryview, done: Done) -> None:
        """Read into a buffer."""

        def arrived(error: int, payload: bytes | None) -> None:
            if payload is not None:
                into[:] = payload
            done(error)

        self._start("read", (offset, len(into)), arrived)

    @property
    def ended(self) -> bool:
        """Whether it is gone."""
        return self._ended

    @property
    def in_flight(self) -> int:
        """Commands that are not answered."""
        return len(self._in_flight)

    async def close(self) -> None:
        """Wait for the commands in flight, and close."""
        if self._in_flight and not self._ended:
            self._idle = asyncio.get_running_loop().create_future()
            await self._idle
        self.abort()

    def abort(self) -> None:
        """Close at once; commands in flight finish with CONNECTION_LOST."""
        if not self._ended:
            self._end()

    def end(self) -> None:
        """Learn that the server has closed it."""
        if self._ended:
            return
        self._ended = True
        if self.on_lost:
            self.on_lost(ConnectionEnded(self._name, self._vios, "the server closed it"))
        self._end()

    def _end(self) -> None:
        self._ended = True
        self._pipe.close(self._pipe.client)
        in_flight, self._in_flight = self._in_flight, {}
        for end in in_flight.values():
            end(CONNECTION_LOST, None)
        if self._idle and not self._idle.done():
            self._idle.set_result(None)


class SimulatedServerProcess:
    """Stands in for `farpage.volume.server.ServerProcess`: a pidfd of a simulated process."""

    find: Callable[[int], Process]

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._process = type(self).find(pid)
        self._closed = False
        if self._process.gone:
            raise ProcessLookupError(errno.ESRCH, "no such process")

    @property
    def gone(self) -> bool:
        """Whether it has exited."""
        return not self._closed and self._process.gone

    def when_gone(self, callback: Callable[[], None]) -> None:
        """Call back when it has exited."""
        watcher = asyncio.get_running_loop()

        def exited() -> None:
            if not self._closed:
                self._closed = True
                callback()

        if self._process.gone:
            watcher.call_soon(exited)
        else:
            self._process.on_gone.append(lambda: _discard(watcher.call_soon(exited)))

    def close(self) -> None:
        """Stop watching."""
        self._closed = True


def _discard(_handle: asyncio.Handle) -> None:
    pass
