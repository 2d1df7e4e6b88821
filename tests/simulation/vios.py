"""A VIOS process: the real volumes, exports, definition and fencing over simulated disks and connections."""

from __future__ import annotations

import asyncio
import errno
from asyncio.events import _set_running_loop
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

from farpage import handover
from farpage.blockio import Extent
from farpage.definition.database import Database
from farpage.definition.model import Definition
from farpage.definition.store import DefinitionStore, EpochStore
from farpage.nbd.errors import ExportRefused
from farpage.nbd.export import Export, Peer
from farpage.vios.copying.copies import Copies
from farpage.vios.copying.presence import Presence, PresenceKey
from farpage.vios.copying.relay import Dial
from farpage.vios.exports import VolumeExports
from farpage.vios.handovers import Handovers
from farpage.vios.leases import Leases
from farpage.vios.service import ViosService
from farpage.vios.volumes import Volumes
from tests.simulation.disk import Disk, SimulatedDevice, SimulatedFile
from tests.simulation.network import Pipe
from tests.simulation.world import Process, World

Item = TypeVar("Item")
Opened = Callable[[Export | None, ExportRefused | None], None]
Reply = Callable[[int, "bytes | list[Extent] | None"], None]


class OrderedSet(dict[Item, None]):
    """Stands in for a set of objects, whose order would depend on their addresses."""

    def add(self, item: Item) -> None:
        self[item] = None

    def discard(self, item: Item) -> None:
        self.pop(item, None)


@contextmanager
def running(process: Process) -> Iterator[None]:
    """Run something as if the process did it."""
    before = asyncio._get_running_loop()
    _set_running_loop(process.loop)
    try:
        yield
    finally:
        _set_running_loop(before)


class SimulatedVios:
    """One VIOS. Its database and disks outlive its process."""

    def __init__(self, world: World, name: str, disks: list[Disk]) -> None:
        self.world = world
        self.name = name
        self.disks = disks
        self.database = Database(":memory:")
        self.process = world.process(name)
        self.process.kill()
        self.service: ViosService
        self.defined = Definition()
        """The definition that it stores."""
        self.dial: Dial | None = None
        """How it gets at relays; None where nothing is ever copied to its disks."""
        self.copies: Copies | None = None
        self.handovers: dict[str, bytes] = {}
        """The page tables of released clients that it stores, by volume identifier."""
        self.presence: dict[PresenceKey, dict[int, bytes]] = {}
        """What is stored of presence."""

    def define(self, definition: Definition) -> None:
        """Store a definition, and act on it."""
        self.defined = self.service.definitions._current = definition
        with running(self.process):
            self.service.exports.follow_definition()

    def _copies(self, volumes: Volumes, definitions: DefinitionStore) -> Copies | None:
        if self.dial is None:
            return None
        return Copies(
            self.name,
            volumes,
            definitions,
            Path("/"),
            dial=self.dial,
            open_store=lambda _folder, key: StoredPresence(self, key),
            run=self._blocking,
        )

    async def _blocking(self, function: Callable[..., object], *arguments: object) -> object:
        """Call what works on the state folder: the kernel does it, whatever becomes of the process."""
        process = self.process
        future: asyncio.Future[object] = process.loop.create_future()

        def done(result: object) -> None:
            if not future.done():
                future.set_result(result)

        process.system_call(0.0005, lambda: function(*arguments), done)
        return await future

    def start(self) -> None:
        """Start a process."""
        self.process = process = self.world.process(self.name)
        with running(process):
            definitions = DefinitionStore(self.database)
            definitions._current = self.defined
            volumes = Volumes(self.name, definitions, EpochStore(self.database))
            self.copies = self._copies(volumes, definitions)
            exports = VolumeExports(volumes, Leases(clock=process.loop.time), self.copies)
            exports._holds = OrderedSet()  # type: ignore[assignment]
            exports.server._connections = OrderedSet()  # type: ignore[assignment]
            self.service = ViosService(
                name=self.name,
                loop=process.loop,
                volumes=volumes,
                exports=exports,
                definitions=definitions,
                handovers=cast(Handovers, StoredHandovers(self)),
                remembered=None,  # type: ignore[arg-type]
            )
            for disk in self.disks:
                volumes.add_device(SimulatedDevice(disk, process))
        self.world.note(f"{self.name} starts")

    def start_again(self) -> None:
        """Start a process if there is none.

        One that was killed in a system call still holds the lock of the state folder, so the next one
        starts when it is gone.
        """
        if self.process.gone:
            self.start()
        elif not self.process.alive:
            self.process.on_gone.append(self.start_again)

    def lent(self, volume_id: str, process: Process) -> SimulatedFile | None:
        """Return a volume as another process reads it by itself."""
        devices = (SimulatedDevice(disk, self.process) for disk in self.disks)
        return next((file for device in devices if (file := device.lent(volume_id, process))), None)

    def accept(self, pipe: Pipe) -> SimulatedServerConnection:
        """Accept a connection."""
        return SimulatedServerConnection(self, pipe)


class StoredHandovers:
    """Stands in for `farpage.vios.handovers.Handovers`."""

    def __init__(self, vios: SimulatedVios) -> None:
        self._stored = vios.handovers

    def store(self, volume: str, volume_id: str, encoded: bytes) -> handover.Summary:
        """Keep one."""
        summary = handover.check(encoded, whose=volume)
        stored = self._stored.get(volume_id)
        if stored is not None and summary.is_older(handover.check(stored, whose=volume)):
            raise handover.HandoverOutdated(volume)
        self._stored[volume_id] = bytes(encoded)
        return summary

    def load(self, volume_id: str) -> bytes | None:
        """Return what is stored."""
        return self._stored.get(volume_id)

    def remove(self, volume_id: str) -> None:
        """Forget one."""
        self._stored.pop(volume_id, None)


class StoredPresence:
    """Stands in for `farpage.vios.copying.presencefile.PresenceFile`."""

    def __init__(self, vios: SimulatedVios, key: PresenceKey) -> None:
        self._stored = vios.presence
        self._key = key

    def load(self) -> Presence:
        """Return what is stored."""
        presence = Presence(self._key.pages)
        for index, block in self._stored.setdefault(self._key, {}).items():
            assert presence.load(index, block, self._key)
        return presence

    def store(self, blocks: dict[int, bytes]) -> None:
        """Store blocks."""
        self._stored.setdefault(self._key, {}).update(blocks)

    def close(self) -> None:
        """Keep nothing open."""

    def remove(self) -> None:
        """Forget it."""
        self._stored.pop(self._key, None)


class SimulatedServerConnection:
    """Stands in for `farpage.nbd.server.ServerConnection` and its transmission, without the wire."""

    def __init__(self, vios: SimulatedVios, pipe: Pipe) -> None:
        self.export: Export | None = None
        self.asked = ""
        self.in_flight = self.in_flight_past_counters = 0
        self._vios = vios
        self._exports = vios.service.exports
        self._process = pipe.server
        self._pipe = pipe
        self._fenced = False
        self._hung_up = False
        self._opening = False
        self._closed = asyncio.Event()
        self._idle: list[asyncio.Future[None]] = []
        self._exports.server._connections.add(self)  # type: ignore[arg-type]
        pipe.on_end[pipe.server] = self.disconnect

    def open(self, export_name: str, opened: Opened) -> None:
        """Open an export for the client."""
        self._opening = True
        self._process.loop.create_task(self._open(export_name, opened))

    async def _open(self, export_name: str, opened: Opened) -> None:
        refusal: ExportRefused | None = None
        self.asked = export_name
        try:
            self.export = await self._exports.open(export_name, Peer(self._vios.name))
        except ExportRefused as error:
            refusal = error
        self._opening, self.asked = False, ""
        if self._hung_up:
            self._ended()
            return
        export = self.export
        self._pipe.send(self._pipe.client, lambda: opened(export, refusal))
        if not export:
            self.disconnect()

    def request(self, kind: str, arguments: tuple[Any, ...], reply: Reply) -> None:
        """Take a command of the client."""
        if self._hung_up:
            return
        if self._fenced:
            self._answer(reply, errno.ESHUTDOWN, None)
            return
        assert self.export is not None
        self.in_flight += 1

        def done(error: int, payload: memoryview | list[Extent] | None = None) -> None:
            self.in_flight -= 1
            self._answer(reply, error, bytes(payload) if isinstance(payload, memoryview) else payload)
            if not self.in_flight:
                waiting, self._idle = self._idle, []
                for waiter in waiting:
                    if not waiter.done():
                        waiter.set_result(None)
                if self._hung_up:
                    self._process.loop.call_soon(self._ended)

        getattr(self.export.io, kind)(*arguments, done)

    def _answer(self, reply: Reply, error: int, payload: bytes | list[Extent] | None) -> None:
        if not self._hung_up:
            self._pipe.send(self._pipe.client, lambda: reply(error, payload))

    async def fence(self) -> None:
        """Answer further commands with ESHUTDOWN, wait for those in flight, then disconnect."""
        self._fenced = True
        if self.in_flight and self.export is not None:
            self.export.on_given_up()
        if self.in_flight:
            waiter = self._process.loop.create_future()
            self._idle.append(waiter)
            await waiter
        self.disconnect()

    def disconnect(self) -> None:
        """Close; what is in flight goes on."""
        if not self._hung_up:
            self._hung_up = True
            self._pipe.close(self._process)
            if self.in_flight and self.export is not None:
                self.export.on_given_up()
            elif not self.in_flight and not self._opening:
                self._process.loop.call_soon(self._ended)

    @property
    def closed(self) -> bool:
        """Whether it is closed."""
        return self._hung_up

    @property
    def left(self) -> bool:
        """Whether it is closed, by either end."""
        return self._hung_up

    async def wait_closed(self) -> None:
        """Return when it is closed and nothing is in flight."""
        await self._closed.wait()

    def _ended(self) -> None:
        if self._closed.is_set():
            return
        if self.export is not None:
            self.export.on_closed()
        self._exports.server._forget(self)  # type: ignore[arg-type]
        self._closed.set()
