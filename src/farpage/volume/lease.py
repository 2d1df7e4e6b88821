"""The client's end of leases: the third way to know that a failed server carries nothing out any more.

A worker keeps one lease at each VIOS, for all of its clients; `farpage.vios.leases` describes the protocol.
"""

from __future__ import annotations

import asyncio
import errno
import secrets
import struct
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Final

from farpage.address import Address
from farpage.blockio import read_bytes, wait_done
from farpage.nbd.errors import ServerRefused
from farpage.volume.connector import Connector, Endpoint, PathConnection

MARGIN: Final = 0.05
"""A lease is taken to last so much longer: two clocks differ, and a thread that has just looked whether the
lease lasts needs a moment for the system call that it then makes."""

RENEWALS_PER_LEASE: Final = 4

_OFFER: Final = struct.Struct("<8sQ")
"""A nonce, whatever it is, and for how many nanoseconds it makes the lease last."""
_UNKNOWN: Final = "NBD_REP_ERR_UNKNOWN"


class Lease:
    """One lease at one VIOS; when it is over it never lives again. Times are loop seconds."""

    def __init__(self, connection: PathConnection, identifier: str) -> None:
        self.identifier = identifier
        self.over = False
        """Whether the server is known to carry out no write under it any more."""
        self._loop = asyncio.get_running_loop()
        self._connection = connection
        self._ends_at: float | None = None
        self._duration = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._on_over: dict[object, Callable[[], None]] = {}
        self._renewing: asyncio.Task[None] | None = None
        self.on_lost: Callable[[], None] = lambda: None
        """Called when it is not renewed any more."""

    @property
    def ends_at(self) -> float | None:
        """When the server stops at the latest, unless the lease is renewed; None before it was begun."""
        return self._ends_at

    @property
    def renewed(self) -> bool:
        """Whether it is being kept alive."""
        if self._renewing is None or self._renewing.done() or self._ends_at is None:
            return False
        return self._loop.time() < self._ends_at

    async def begin(self) -> None:
        """Ask for the lease, and go on asking.

        :raise OSError: the server does not give it, or the connection is lost.
        """
        await self._renew()
        assert self._ends_at is not None
        self._timer = self._loop.call_at(self._ends_at, self._look)
        self._renewing = self._loop.create_task(self._keep())
        # The server that is started in this one's place knows nothing of it: nothing must be opened under it.
        self._connection.on_lost = lambda _error: self._give_up()

    def _give_up(self) -> None:
        if self._renewing and not self._renewing.done():
            self._renewing.cancel()
            self._lost()

    def when_over(self, callback: Callable[[], None]) -> Callable[[], None]:
        """Call back once, when the lease is over; returns what takes that back."""
        key = object()
        self._on_over[key] = callback

        def forget() -> None:
            self._on_over.pop(key, None)

        return forget

    def close(self) -> None:
        """Renew it no more and let go of it."""
        if self._renewing:
            self._renewing.cancel()
        if self._timer:
            self._timer.cancel()
        self._on_over.clear()
        self._connection.abort()

    async def _keep(self) -> None:
        with suppress(OSError):
            while True:
                await asyncio.sleep(self._duration / RENEWALS_PER_LEASE)
                await self._renew()
        self._lost()

    def _lost(self) -> None:
        self._connection.abort()
        self.on_lost()

    async def _renew(self) -> None:
        nonce, duration_ns = _OFFER.unpack(await read_bytes(self._connection, 0, _OFFER.size))
        now = self._loop.time()
        if self._ends_at is not None and now >= self._ends_at:
            # Others may have been told already that it is over: it must not be revived.
            raise OSError(errno.ESHUTDOWN, "the lease has run out")
        self._duration = duration_ns / 1e9
        # The server counts from when it gave the nonce, which was before now. From here on the renewal may
        # come through, whether or not it is ever heard of again.
        self._ends_at = now + self._duration * (1 + MARGIN)
        error = await wait_done(partial(self._connection.write, 0, memoryview(nonce)))
        if error:
            raise OSError(error, f"the server answered {errno.errorcode.get(error, error)}")

    def _look(self) -> None:
        assert self._ends_at is not None
        if self._loop.time() < self._ends_at:
            self._timer = self._loop.call_at(self._ends_at, self._look)
            return
        self.over = True
        self._give_up()
        callbacks = list(self._on_over.values())
        self._on_over.clear()
        for callback in callbacks:
            callback()


class Leases:
    """The leases of one worker, one at each VIOS."""

    def __init__(self, connector: Connector, token: str | None = None) -> None:
        """`token` is the worker's own, 8 hexadecimal digits; by default made at random."""
        self._connector = connector
        self._token = token or secrets.token_hex(4)
        self._begun = 0
        self._leases: dict[Address, Lease] = {}
        self._locks: dict[Address, asyncio.Lock] = {}

    async def at(self, endpoint: Endpoint, timeout_seconds: float) -> Lease | None:
        """Return the lease at a VIOS, made now if there is none; None where the server knows no leases.

        :raise FarpageError: the server cannot be reached.
        :raise OSError: it does not give a lease, or not in time.
        """
        address = endpoint.address
        try:
            async with (
                asyncio.timeout(timeout_seconds),
                self._locks.setdefault(address, asyncio.Lock()),
            ):
                lease = self._leases.get(address)
                if lease is not None and lease.renewed:
                    return lease
                return await self._begin(endpoint, timeout_seconds)
        except TimeoutError:
            raise TimeoutError(f"no answer for {timeout_seconds:g} s when asked for a lease") from None

    async def _begin(self, endpoint: Endpoint, timeout_seconds: float) -> Lease | None:
        self._begun += 1
        identifier = f"{self._token}{self._begun:08x}"
        try:
            connection = await self._connector(endpoint, f"lease:{identifier}", timeout_seconds)
        except ServerRefused as refusal:
            if refusal.reply == _UNKNOWN:
                return None
            raise
        lease = Lease(connection, identifier)
        try:
            await lease.begin()
        except BaseException:
            lease.close()
            raise
        self._leases[endpoint.address] = lease
        lease.on_lost = partial(self._lost, endpoint.address, lease)
        return lease

    def _lost(self, address: Address, lease: Lease) -> None:
        if self._leases.get(address) is lease:
            del self._leases[address]

    def ends_at(self, endpoint: Endpoint) -> float | None:
        """Return when the VIOS stops carrying writes out unless it hears more; None where it has no lease."""
        lease = self._leases.get(endpoint.address)
        return lease.ends_at if lease else None

    def close(self) -> None:
        """Let every lease run out."""
        for lease in self._leases.values():
            lease.close()
        self._leases.clear()
