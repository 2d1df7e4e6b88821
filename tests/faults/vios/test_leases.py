"""A VIOS that was stopped for longer than a lease carries nothing out that was sent under it."""

from __future__ import annotations

import asyncio
import errno
import signal
from pathlib import Path

import pytest

from farpage.address import UnixAddress
from farpage.blockio import read_bytes
from farpage.nbd.client import Connection
from farpage.nbd.errors import ServerRefused
from farpage.volume.connector import ConnectNbd, Endpoint
from farpage.volume.deaths import ServerDeaths
from farpage.volume.lease import Leases
from farpage.volume.ownership import Ownership
from tests.support.vios import ViosProcess, vios_processes
from tests.support.volumes import trim, write, zero

LEASE_SECONDS = 2.0
"""Long enough for a busy machine to keep the lease up until it is to run out."""
SIZE = 1 << 20
OWNER = Ownership("00000000000000aa", 1)
CHANGES = 3


async def under_a_lease(vios: ViosProcess, leases: Leases) -> Connection:
    lease = await leases.at(Endpoint(vios.name, vios.data, "disk"), 60.0)
    assert lease is not None
    return await vios.connect(OWNER.export_name("vm1", 1, lease.identifier))


async def test_what_was_sent_to_a_stopped_vios_is_refused_after_the_lease(folder: Path) -> None:
    leases = Leases(ConnectNbd(ServerDeaths()))
    with vios_processes(folder, "one", devices=[f"dir:{folder}/disk?size=16M"]) as (vios,):
        vios.close()
        vios.change = {"lease_seconds": LEASE_SECONDS}
        vios.start()
        await vios.create("vm1", SIZE)
        connection = await under_a_lease(vios, leases)
        assert await write(connection, 0, b"old!" * 1024) == 0
        await asyncio.sleep(0)
        vios.signal(signal.SIGSTOP)
        late = asyncio.gather(
            write(connection, 0, b"late" * 1024),
            zero(connection, 0, 4096),
            trim(connection, 0, 4096),
        )
        endpoint = Endpoint(vios.name, vios.data, "disk")
        while leases.ends_at(endpoint) is not None:
            await asyncio.sleep(0.05)
        vios.signal(signal.SIGCONT)
        assert list(await late) == [errno.ESHUTDOWN] * CHANGES
        assert await read_bytes(connection, 0, 4096) == b"old!" * 1024
        assert await write(connection, 0, b"more" * 1024) == errno.ESHUTDOWN
        await connection.close()
        again = await under_a_lease(vios, leases)
        assert await write(again, 0, b"new!" * 1024) == 0
        await again.close()
        leases.close()


async def test_a_lease_that_the_vios_does_not_know_opens_nothing(folder: Path) -> None:
    with vios_processes(folder, "one", devices=[f"dir:{folder}/disk?size=16M"]) as (vios,):
        await vios.create("vm1", SIZE)
        with pytest.raises(ServerRefused, match="lease 00000000000000ee is not known here"):
            await vios.connect(OWNER.export_name("vm1", 1, "00000000000000ee"))


async def test_a_lease_is_for_one_keeper(folder: Path) -> None:
    with vios_processes(folder, "one", devices=[f"dir:{folder}/disk?size=16M"]) as (vios,):
        first = await vios.connect("lease:00000000000000ee")
        with pytest.raises(ServerRefused, match="somebody else"):
            await vios.connect("lease:00000000000000ee")
        await first.close()
        while True:
            try:
                again = await Connection.open(UnixAddress(vios.data.path), "lease:00000000000000ee")
            except ServerRefused:
                await asyncio.sleep(0.01)
            else:
                break
        await again.close()
