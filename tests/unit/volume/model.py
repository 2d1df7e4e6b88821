"""A disk and VIOS in memory, whose servers can be killed, hung and resumed, for tests in simulated time."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Callable
from dataclasses import dataclass, field

from farpage.address import UnixAddress
from farpage.blockio import CONNECTION_LOST, BlockLimits, DirectFile, Done, Feature, ReadDone
from farpage.device.base import never
from farpage.device.claim import Claim, Claims
from farpage.device.errors import VolumeFenced, VolumeTaken
from farpage.errors import FarpageError, Unreachable
from farpage.nbd.errors import ServerRefused
from farpage.vios import leases as served
from farpage.vios.errors import LeaseOver
from farpage.vios.names import ExportName, parse_export_name, refusal_text
from farpage.vios.refusing import RefusingCommands
from farpage.volume.connector import Endpoint, PathConnection
from farpage.volume.lease import Leases
from farpage.volume.multipath import MultipathVolume
from farpage.volume.ownership import Ownership

PAGE = 4096
SIZE = 64 * PAGE
LEASE_SECONDS = 5.0
NEVER_OLDER = 1 << 62
OWNER = "00000000000000aa"
OTHER = "00000000000000bb"


@dataclass
class Disk:
    """What the VIOS of a common device all write to."""

    content: bytearray = field(default_factory=lambda: bytearray(SIZE))


@dataclass
class ModelVios:
    """A server. Hung, it keeps what it was sent and carries it out when it is resumed."""

    name: str
    disk: Disk
    up: bool = True
    hung: bool = False
    claims: Claims = field(default_factory=Claims)
    leases: served.Leases | None = None
    error: int = 0
    write_error: Callable[[int], int] | None = None
    """Tells what a write at an offset is answered with."""
    pid: int | None = None
    opened: list[int] = field(default_factory=list)
    connections: list[ModelConnection] = field(default_factory=list)
    backlog: list[Callable[[], None]] = field(default_factory=list)
    resumed: asyncio.Event = field(default_factory=asyncio.Event)

    def do(self, work: Callable[[], None]) -> None:
        """Carry out what a volume is asked for."""
        self.serve(work)

    def serve(self, work: Callable[[], None]) -> None:
        """Carry work out soon, or when the server is resumed."""
        if self.hung:
            self.backlog.append(work)
        else:
            asyncio.get_running_loop().call_soon(work)

    def hang(self) -> None:
        """Stop answering, as SIGSTOP does."""
        self.hung = True
        self.resumed.clear()

    def resume(self) -> None:
        """Carry out what came meanwhile, and go on."""
        self.hung = False
        for work in self.backlog:
            work()
        self.backlog.clear()
        self.resumed.set()

    def claim(self, claim: Claim) -> None:
        """Give the volume to an owner and cut off who is older."""
        self.claims.add(claim)
        for connection in list(self.connections):
            if connection.epoch < self.epoch:
                connection.drop()

    def kill(self) -> None:
        """End every connection and refuse new ones."""
        self.up = False
        self.backlog.clear()
        for connection in list(self.connections):
            connection.drop()

    @property
    def epoch(self) -> int:
        """The newest epoch that it has let in."""
        return self.claims.current.epoch

    def refuse(self, error: FarpageError) -> ServerRefused:
        """Say so as a VIOS does."""
        return ServerRefused("vm1", self.name, refusal_text(error), "NBD_REP_ERR_POLICY")

    async def answer(self) -> None:
        """Wait until the server answers."""
        if self.hung:
            await self.resumed.wait()
        if not self.up:
            raise Unreachable("the server", self.name, "refused", "")

    async def open_lease(self, identifier: str) -> ModelLease:
        """Begin a lease."""
        await self.answer()
        if self.leases is None:
            raise ServerRefused(f"lease:{identifier}", self.name, "no export name", "NBD_REP_ERR_UNKNOWN")
        export = self.leases.begin(identifier)
        assert export is not None
        lease = ModelLease(self, export)
        self.connections.append(lease)
        return lease

    async def open(self, wanted: ExportName) -> ModelConnection:
        """Open the volume; who is older is drained and refused."""
        await self.answer()
        assert wanted.epoch is not None
        claim = Claim(wanted.epoch, wanted.owner)
        over = never
        if wanted.lease:
            assert self.leases is not None
            lease = self.leases.find(wanted.lease)
            if lease is None:
                raise self.refuse(LeaseOver("vm1", wanted.lease))
            over = lease.over
        if self.claims.refuses(claim):
            kind = VolumeTaken if self.claims.of_another(claim) else VolumeFenced
            raise self.refuse(kind("vm1", claim.epoch, self.epoch))
        self.claim(claim)
        self.opened.append(claim.epoch)
        connection = ModelConnection(self, claim.epoch, over)
        self.connections.append(connection)
        return connection


class ModelConnection(RefusingCommands):
    """One open export."""

    size_bytes = SIZE
    read_only = False
    limits = BlockLimits()
    features = Feature.NONE

    def __init__(self, vios: ModelVios, epoch: int, over: Callable[[], bool] = never) -> None:
        self.vios = vios
        self.over = over
        self.epoch = epoch
        self.on_lost: Callable[[Exception], None] | None = None
        self.direct: DirectFile | None = None
        self._open: dict[int, Callable[[int], None]] = {}
        self._number = 0

    @property
    def peer_pid(self) -> int | None:
        return self.vios.pid

    def push(self) -> None:
        """Everything is sent at once here."""

    def abort(self) -> None:
        if self in self.vios.connections:
            self.vios.connections.remove(self)
        lost, self._open = self._open, {}
        for end in lost.values():
            end(CONNECTION_LOST)

    def drop(self) -> None:
        """End the connection from the server's side."""
        self.abort()
        if self.on_lost:
            self.on_lost(ConnectionResetError("reset"))

    def _start(
        self,
        work: Callable[[], None],
        end: Callable[[int], None],
        refusal: Callable[[], int] = lambda: 0,
    ) -> None:
        self._number += 1
        number = self._number
        self._open[number] = end

        def carry_out() -> None:
            error = self.vios.error or refusal()
            if not error:
                work()  # also when nobody waits for the answer any more: a late write
            ending = self._open.pop(number, None)
            if ending:
                ending(error)

        self._serve(carry_out)

    def _serve(self, work: Callable[[], None]) -> None:
        self.vios.do(work)

    def read(self, offset: int, length: int, done: ReadDone) -> None:
        def end(error: int) -> None:
            content = self.vios.disk.content[offset : offset + length]
            done(error, None if error else memoryview(content))

        self._start(lambda: None, end)

    def write(self, offset: int, data: memoryview, done: Done, *, fua: bool = False) -> None:
        content = bytes(data)

        def work() -> None:
            self.vios.disk.content[offset : offset + len(content)] = content

        def refusal() -> int:
            if self.over():
                return errno.ESHUTDOWN
            return self.vios.write_error(offset) if self.vios.write_error else 0

        self._start(work, done, refusal)

    def flush(self, done: Done) -> None:
        self._start(lambda: None, done)

    async def close(self) -> None:
        self.abort()


class ModelLease(ModelConnection):
    """An open lease."""

    size_bytes = served.LeaseExport.size_bytes

    def __init__(self, vios: ModelVios, export: served.LeaseExport) -> None:
        super().__init__(vios, NEVER_OLDER)
        self.export = export

    def _serve(self, work: Callable[[], None]) -> None:
        self.vios.serve(work)

    def read(self, offset: int, length: int, done: ReadDone) -> None:
        offer = bytearray(length)

        def work() -> None:
            self.export.read_now(offset, memoryview(offer))

        self._start(work, lambda error: done(error, None if error else memoryview(offer)))

    def write(self, offset: int, data: memoryview, done: Done, *, fua: bool = False) -> None:
        nonce = bytes(data)

        def renewal() -> int:
            answers: list[int] = []
            self.export.write(offset, memoryview(nonce), answers.append)
            return answers[0]

        self._start(lambda: None, done, renewal)


class Recorder:
    """What a volume told its owner."""

    def __init__(self) -> None:
        self.epochs: list[int] = []
        self.alarms: list[str] = []
        self.doubted: list[str] = []
        """VIOSes over which a path that carries commands has failed, or does not answer."""

    def epoch_raised(self, epoch: int) -> None:
        self.epochs.append(epoch)

    def vios_doubted(self, vios: str) -> None:
        self.doubted.append(vios)

    def alarm(self, kind: str, message: str) -> None:
        self.alarms.append(kind)


class Rig:
    """A volume over two VIOS of one common device."""

    def __init__(self, paths: int = 2, *, leases: bool = False, had_owner: bool = False) -> None:
        self.lease_seconds = LEASE_SECONDS if leases else None
        self.disk = Disk()
        self.vioses = {f"vios{n}": ModelVios(f"vios{n}", self.disk) for n in range(1, paths + 1)}
        for vios in self.vioses.values():
            clock = asyncio.get_running_loop().time
            vios.leases = served.Leases(LEASE_SECONDS, clock) if leases else None
        self.lends: DirectFile | None = None
        """What the VIOSes lend to whoever opens the volume."""
        self.leases = Leases(self.connect)
        self.events = Recorder()
        self.volume = self.made([self.endpoint(name) for name in self.vioses], had_owner=had_owner)

    def made(
        self, endpoints: list[Endpoint], *, device: str = "disk-1", had_owner: bool = False
    ) -> MultipathVolume:
        """Make a volume that is used over some endpoints."""
        return MultipathVolume(
            "vm1",
            SIZE,
            Ownership(OWNER, 1),
            endpoints,
            leases=self.leases,
            had_owner=had_owner,
            connector=self.connect,
            events=self.events,
            device=device,
            device_name="disk",
            path_timeout_seconds=1.0,
        )

    def endpoint(self, vios: str) -> Endpoint:
        """Return where a VIOS serves the volume."""
        return Endpoint(vios, UnixAddress(f"/{vios}"), "disk", lease_seconds=self.lease_seconds)

    async def connect(self, endpoint: Endpoint, export_name: str, timeout_seconds: float) -> PathConnection:
        vios, lease = self.vioses[endpoint.vios], served.parse_lease_name(export_name)
        opening = vios.open_lease(lease) if lease else vios.open(parse_export_name(export_name))
        try:
            # Not wait_for, which in Python 3.11 swallows a cancellation that comes together with the answer.
            async with asyncio.timeout(timeout_seconds):
                connection = await opening
        except TimeoutError as error:
            raise Unreachable("the server", endpoint.vios, "no answer", "") from error
        connection.direct = None if lease else self.lends
        return connection

    def states(self) -> dict[str, str]:
        """Return the state of each path."""
        return {path.endpoint.vios: path.state.value for path in self.volume.status()}

    def is_in(self, states: dict[str, str]) -> bool:
        """Tell whether the paths are in these states."""
        return self.states() == states

    async def until(self, condition: Callable[[], bool], seconds: float = 30.0) -> None:
        """Let simulated time pass until a condition holds."""
        end = asyncio.get_running_loop().time() + seconds
        while not condition():
            assert asyncio.get_running_loop().time() < end, "the condition never held"
            await asyncio.sleep(0.01)

    def write(self, page: int, fill: int) -> list[int]:
        """Start a page-out and return the list that its error will be put into."""
        result: list[int] = []
        self.volume.write(page * PAGE, memoryview(bytes([fill]) * PAGE), result.append)
        return result

    def read(self, page: int) -> list[int]:
        """Start a page-in and return the list that the page's first byte will be put into."""
        result: list[int] = []

        def done(error: int, payload: memoryview | None) -> None:
            assert error == 0
            assert payload is not None
            result.append(payload[0])

        self.volume.read(page * PAGE, PAGE, done)
        return result
