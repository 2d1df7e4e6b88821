"""The way from a VIOS to the old device: an NBD connection to the intermediate client's relay.

While there is none, commands wait, for as long as it takes; on a new one those that were in flight are
repeated. The old device's VIOS lets one connection of a relay in at a time, and only when nothing of the one
before can reach the device any more, so what a lost connection may still carry out cannot come after a newer
change.
"""

from __future__ import annotations

import asyncio
import errno
import math
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Final, TypeAlias

from farpage.address import Address
from farpage.blockio import (
    BlockIO,
    BlockLimits,
    Done,
    ExtentsDone,
    Feature,
    ReadDone,
)
from farpage.errors import FarpageError
from farpage.log import get_logger
from farpage.nbd.client import Connection
from farpage.nbd.replaying import Command, Finished, Losable, Replaying
from farpage.vios.copying.copy import write_zeros
from farpage.vios.copying.volume import RELAY_DROPPED
from farpage.volume.refusal import Refusal, refusal_of

log = get_logger()

HANDSHAKE_SECONDS: Final = 10.0
DEAD_PEER_SECONDS: Final = 5.0
"""A relay whose host acknowledges nothing for so long is gone."""
FIRST_PAUSE_SECONDS: Final = 0.02
LONGEST_PAUSE_SECONDS: Final = 1.0

Dial: TypeAlias = Callable[[Address, str], Awaitable[Losable]]
"""Opens an export at an address."""


async def dial_nbd(address: Address, export: str) -> Losable:
    """Connect over NBD.

    :raise ConnectFailed:
    """
    return await Connection.open(
        address,
        export,
        handshake_timeout_seconds=HANDSHAKE_SECONDS,
        dead_peer_seconds=DEAD_PEER_SECONDS,
    )


class Relay(Replaying):
    """The connection for one owner of a volume, under one claim; several of its connections may share it."""

    def __init__(
        self,
        export: str,
        size_bytes: int,
        on_refused: Callable[[Refusal], None],
        dial: Dial = dial_nbd,
    ) -> None:
        """`on_refused` is told, once, that somebody else has the volume on the old device."""
        super().__init__(1, math.inf)
        self.export = export
        self.size_bytes = size_bytes
        self.address: Address | None = None
        """Where the intermediate client listens; None until it has said so."""
        self.on_ended: Callable[[], None] = lambda: None
        """Called once, when nobody uses it any more."""
        self._on_refused = on_refused
        self._dial = dial
        self._announced = asyncio.Event()
        self._ports = 0
        self._task = self._loop.create_task(self._keep())

    @property
    def connected(self) -> bool:
        """Whether there is a connection."""
        return self._links[0].connection is not None

    @property
    def ended(self) -> bool:
        """Whether it serves nobody any more."""
        return self._closed

    @property
    def waiting(self) -> int:
        """Commands that wait for a connection."""
        return len(self._waiting)

    def announce(self, address: Address) -> None:
        """Connect to `address` from now on, and try at once; a connection to another address is given up."""
        if self.address is not None and address != self.address:
            self._cut()
        self.address = address
        self._announced.set()

    def port(self) -> RelayPort:
        """Return the way of one more connection of the owner."""
        self._ports += 1
        return RelayPort(self)

    def drop(self) -> None:
        """End: every command, now and later, finishes with `RELAY_DROPPED`."""
        self._finish_all(RELAY_DROPPED)

    def give_up(self, port: RelayPort) -> None:
        """Finish the commands of one port with ESHUTDOWN.

        Those of others that are in flight are repeated on a new connection: the data of what is given up must
        not be sent any more.
        """
        given_up = [command for command in self._waiting if command.user is port]
        under_way = [command for command in self._links[0].commands if command.user is port]
        limbo = [command for command in self._pausing if command.user is port]
        for command in (*given_up, *under_way, *limbo):
            command.given_up = True
        if given_up:
            self._waiting = type(self._waiting)(command for command in self._waiting if not command.given_up)
        if under_way:
            self._cut()
        for command in (*given_up, *under_way, *limbo):
            command.finished(errno.ESHUTDOWN, None)

    def release(self) -> None:
        """Note that a port is not used any more; after the last one the connection ends."""
        self._ports -= 1
        if not self._ports:
            self._finish_all(errno.ESHUTDOWN)
            self.on_ended()

    def _finish_all(self, error: int) -> None:
        self._closed, self._closed_error = True, error
        self._task.cancel()
        commands = [*self._waiting, *self._links[0].commands, *self._pausing]
        self._waiting.clear()
        for command in commands:
            command.given_up = True
        self._cut()
        for command in commands:
            command.finished(error, None)

    def _cut(self) -> None:
        """End the connection; what is in flight on it waits for the next one."""
        link = self._links[0]
        connection, link.connection = link.connection, None
        link.lost.set()
        if connection is not None:
            connection.on_lost = None
            connection.abort()

    # The connection

    def _detached(self, error: Exception) -> None:
        log.warning("relay_lost", export=self.export, problem=str(error), waiting=len(self._waiting))

    async def _keep(self) -> None:
        link = self._links[0]
        pause, reported = FIRST_PAUSE_SECONDS, ""
        while True:
            if link.connection is not None:
                await link.lost.wait()
                pause, reported = FIRST_PAUSE_SECONDS, ""
                continue
            if self.address is None:
                await self._announced.wait()
                continue
            self._announced.clear()
            address, problem = self.address, ""
            try:
                connection = await self._dial(address, self.export)
            except (FarpageError, OSError) as error:
                refusal = refusal_of(error)
                if refusal is not None:
                    log.warning("relay_fenced", export=self.export, problem=refusal.message)
                    self._on_refused(refusal)
                    return
                problem = str(error)
            else:
                problem = self._use(address, connection)
                if not problem:
                    log.info("relay_connected", export=self.export, address=str(address))
                    continue
            if problem != reported:
                log.warning("relay_unreachable", export=self.export, address=str(address), problem=problem)
                reported = problem
            try:
                # Not wait_for, which in Python 3.11 swallows a cancellation that comes with the event.
                async with asyncio.timeout(pause):
                    await self._announced.wait()
            except TimeoutError:
                pause = min(pause * 2, LONGEST_PAUSE_SECONDS)

    def _use(self, address: Address, connection: Losable) -> str:
        """Use a new connection if it is what is wanted; returns the problem."""
        problem = ""
        if connection.ended:
            problem = "the connection ended at once"
        elif address != self.address:
            problem = "the intermediate client has another address now"
        elif connection.size_bytes < self.size_bytes:
            problem = f"the volume has {connection.size_bytes} bytes there, not {self.size_bytes}"
        elif connection.read_only:
            problem = "the volume is read-only there"
        if problem:
            connection.abort()
        else:
            self._attach(self._links[0], connection)
        return problem


class RelayPort:
    """The relay for one connection of the owner, as `BlockIO`."""

    read_only = False
    limits = BlockLimits()
    features = Feature.FLUSH | Feature.FUA | Feature.TRIM | Feature.ZERO

    def __init__(self, relay: Relay) -> None:
        self._relay = relay
        self._open = True
        self.size_bytes = relay.size_bytes

    def give_up(self) -> None:
        """Finish every command with ESHUTDOWN."""
        self._relay.give_up(self)

    def read_now(self, offset: int, into: memoryview) -> bool:
        """Return False."""
        del offset, into
        return False

    def read(self, offset: int, length: int, done: ReadDone) -> None:
        """Read."""
        self._submit(lambda io, end: io.read(offset, length, end), done)

    def write(self, offset: int, data: memoryview, done: Done, *, fua: bool = False) -> None:
        """Write; `data` stays unchanged until `done`."""
        self._plain(lambda io, fua, end: io.write(offset, data, end, fua=fua), fua, done)

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
        """Zero, by writing zeros where the other side can do nothing better."""
        del fast

        def start(io: BlockIO, fua: bool, end: Done) -> None:
            if Feature.ZERO in io.features:
                io.zero(offset, length, end, punch=punch, fua=fua)
            elif fua:
                write_zeros(io, offset, length, lambda error: end(error) if error else io.flush(end))
            else:
                write_zeros(io, offset, length, end)

        self._plain(start, fua, done)

    def trim(self, offset: int, length: int, done: Done, *, fua: bool = False) -> None:
        """Discard; it is a hint, which the other side may not know."""

        def start(io: BlockIO, fua: bool, end: Done) -> None:
            if Feature.TRIM in io.features:
                io.trim(offset, length, end, fua=fua)
            else:
                end(0)

        self._plain(start, fua, done)

    def cache(self, offset: int, length: int, done: Done) -> None:
        """Refuse."""
        del offset, length
        done(errno.ENOTSUP)

    def flush(self, done: Done) -> None:
        """Flush, if the other side has anything to flush."""
        self._submit(
            lambda io, end: io.flush(lambda error: end(error, None)) if _flushes(io) else end(0, None),
            lambda error, _result: done(error),
        )

    def extents(self, offset: int, length: int, done: ExtentsDone) -> None:
        """Refuse."""
        del offset, length
        done(errno.ENOTSUP, None)

    def _plain(self, start: Callable[[BlockIO, bool, Done], None], fua: bool, done: Done) -> None:
        def begin(io: Losable, end: Finished) -> None:
            if not fua or Feature.FUA in io.features:
                start(io, fua, lambda error: end(error, None))
            else:
                flush = partial(io.flush, lambda error: end(error, None)) if _flushes(io) else None
                start(io, False, lambda error: flush() if flush and not error else end(error, None))

        self._submit(begin, lambda error, _result: done(error))

    def _submit(self, start: Callable[[Losable, Finished], None], finished: Finished) -> None:
        if self._open:
            self._relay.submit(Command(start, finished, self))
        else:
            finished(errno.ESHUTDOWN, None)

    async def close(self) -> None:
        """Let go of the relay."""
        if self._open:
            self._open = False
            self._relay.release()


def _flushes(io: BlockIO) -> bool:
    return Feature.FLUSH in io.features
