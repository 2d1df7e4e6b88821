"""A volume that is copied from one VIOS' device to another's while its owner uses it, on real processes."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
from collections.abc import AsyncIterator

import pytest

from farpage.address import UnixAddress
from farpage.api.remote import RemoteError
from farpage.blockio import Allocation, read_bytes
from farpage.definition import moving
from farpage.intermediary.relay import Relay
from farpage.nbd.errors import ServerRefused
from farpage.vios.model import CopyOrders, CopyState, IntermediaryReport
from farpage.vios.names import ExportName
from tests.support.moving import CLIENT, OWNER, PAGE, PRINCIPAL, MovingSet, moving_set
from tests.support.tools import run
from tests.support.volumes import extents, flush, read_error, trim, write, zero

PAGES = 2048
DATA = [page % 3 != 0 for page in range(PAGES)]


@pytest.fixture
async def moving_volume() -> AsyncIterator[MovingSet]:
    async with moving_set(PAGES * PAGE) as found:
        await found.begin(DATA)
        yield found


@contextlib.asynccontextmanager
async def relaying(s: MovingSet, name: str = "r") -> AsyncIterator[Relay]:
    """Be an intermediate client's relay, and say so at the first VIOS."""
    source = ExportName(CLIENT, None, device=s.source, principal=PRINCIPAL)
    relay = Relay(lambda: (s.second.data,), source)
    address = UnixAddress(f"{s.folder}/{name}.relay")
    await relay.server.start([address])
    try:
        await report(s, address)
        yield relay
    finally:
        await relay.server.close()


async def report(s: MovingSet, address: UnixAddress, principal: str = PRINCIPAL) -> CopyOrders:
    said = IntermediaryReport(
        principal=principal, relay=str(address), read_bytes=0, written_bytes=0, rate_bytes=0
    )
    async with s.first.client() as client:
        return await client.put(
            f"/v1/volumes/{CLIENT}/intermediary", said, CopyOrders, params={"device": s.target}
        )


def fill_export(s: MovingSet) -> str:
    return f"{CLIENT}/{s.target}<{s.source}+{PRINCIPAL}"


async def both_know(s: MovingSet) -> None:
    """Bring the definition of the first VIOS to the second."""
    await s.put(s.second, await s.definition(s.first))


async def test_the_owner_goes_on_while_its_volume_is_copied_and_the_source_is_freed(
    moving_volume: MovingSet,
) -> None:
    s = moving_volume
    before = s.source_file.read_bytes()
    owner = await s.first.connect(s.owner_export(5))
    assert owner.limits.minimum == PAGE
    pending = asyncio.ensure_future(read_bytes(owner, 7 * PAGE, 7 * PAGE))
    intermediary = s.intermediary()
    assert await asyncio.wait_for(pending, 60) == before[7 * PAGE : 14 * PAGE]
    written = os.urandom(PAGE)
    for page in (3, 700, PAGES - 1):
        assert await write(owner, page * PAGE, written) == 0
    assert await zero(owner, 50 * PAGE, 4 * PAGE) == 0
    assert await trim(owner, 60 * PAGE, PAGE) == 0
    assert await flush(owner) == 0
    status = await s.until(lambda status: status.present_pages == status.total_pages)
    assert status.relay_connected and status.relayed_reads > 0 and status.filled_pages > PAGES // 2
    # Both are whole until the end, and a foreign program says so.
    compared = await run(
        "qemu-img", "compare", "-U", "-f", "raw", "-F", "raw", str(s.source_file), str(s.target_file)
    )
    assert "identical" in compared
    await s.finish()
    # The same connection goes on, over the new device alone.
    assert await write(owner, 900 * PAGE, written) == 0
    assert await read_bytes(owner, 900 * PAGE, PAGE) == written
    assert await read_bytes(owner, 7 * PAGE, 8 * PAGE) == before[7 * PAGE : 15 * PAGE]
    await s.forget()
    assert await intermediary.end() == 0, intermediary.log()
    assert not s.source_file.exists()
    assert list((s.folder / "one" / "presence").iterdir()) == []
    plain = await s.first.connect(f"{CLIENT}/{s.target}@6:{OWNER}")
    assert await read_bytes(plain, 3 * PAGE, PAGE) == written
    await owner.close()
    await plain.close()


@pytest.mark.parametrize("full", ["target", "source"])
async def test_a_volume_may_be_sparse_on_one_device_and_full_on_the_other(full: str) -> None:
    options = ("?allocate=full", "") if full == "target" else ("", "?allocate=full")
    async with moving_set(PAGES * PAGE, options) as s:
        await s.begin(DATA)
        before = s.source_file.read_bytes()
        intermediary = s.intermediary()
        await s.until(lambda status: status.present_pages == status.total_pages)
        await s.finish()
        await s.forget()
        assert await intermediary.end() == 0, intermediary.log()
        assert s.target_file.read_bytes() == before
        if full == "target":
            assert s.target_file.stat().st_blocks * 512 >= PAGES * PAGE


async def test_who_may_open_what_of_a_volume_that_is_copied(moving_volume: MovingSet) -> None:
    s = moving_volume
    for vios in (s.first, s.second):
        with pytest.raises(ServerRefused, match="no grant to read"):
            await vios.connect(f"{CLIENT}/{s.source}+00000000000000dd")
    with pytest.raises(ServerRefused, match="no grant to fill"):
        await s.first.connect(f"{CLIENT}/{s.target}<{s.source}+00000000000000dd")
    for name in (f"{CLIENT}/{s.target}@5:{OWNER}", f"{CLIENT}/{s.target}", f"{CLIENT}@5:{OWNER}"):
        with pytest.raises(ServerRefused, match="does not have all of its pages"):
            await s.first.connect(name)
    with pytest.raises(ServerRefused, match="not being copied"):
        await s.second.connect(s.owner_export(5))
    # The second VIOS has not heard of the grants.
    with pytest.raises(ServerRefused, match="no grant"):
        await s.second.connect(f"{CLIENT}/{s.source}+{PRINCIPAL}")
    await both_know(s)
    reader = await s.second.connect(f"{CLIENT}/{s.source}+{PRINCIPAL}")
    assert reader.read_only
    assert await read_bytes(reader, PAGE, PAGE) == s.source_file.read_bytes()[PAGE : 2 * PAGE]

    # Fills apply to absent pages alone.
    fill = await s.first.connect(fill_export(s))
    assert await read_error(fill, 0, PAGE) == errno.EPERM
    assert await write(fill, 4 * PAGE, b"a" * 2 * PAGE) == 0
    assert await write(fill, 0, b"b" * 8 * PAGE) == 0
    assert await zero(fill, 0, 16 * PAGE) == 0
    assert await flush(fill) == 0
    error, found = await extents(fill, 0, 32 * PAGE)
    assert error == 0 and found is not None
    absent = Allocation.HOLE | Allocation.ZERO
    assert [(e.length, e.allocation) for e in found] == [(16 * PAGE, Allocation.DATA), (16 * PAGE, absent)]
    owner = await s.first.connect(s.owner_export(5))
    expected = b"b" * 4 * PAGE + b"a" * 2 * PAGE + b"b" * 2 * PAGE + bytes(8 * PAGE)
    assert await read_bytes(owner, 0, 16 * PAGE) == expected
    assert (await s.copy_status()).present_pages == 16
    for connection in (reader, fill, owner):
        await connection.close()


async def test_orders_and_the_end_of_a_move(moving_volume: MovingSet) -> None:
    s = moving_volume
    await both_know(s)
    reader = await s.second.connect(f"{CLIENT}/{s.source}+{PRINCIPAL}")
    fill = await s.first.connect(fill_export(s))
    owner = await s.first.connect(s.owner_export(5))
    assert await zero(fill, 0, 16 * PAGE) == 0
    assert await flush(fill) == 0

    # Orders go to the last intermediate client that came, and to those of this move alone.
    one, two = UnixAddress(f"{s.folder}/1"), UnixAddress(f"{s.folder}/2")
    assert (await report(s, one)).state is CopyState.COPYING
    assert (await report(s, one, "00000000000000dd")).state is CopyState.GONE
    assert (await report(s, two)).present_bytes == 16 * PAGE
    with pytest.raises(RemoteError) as displaced:
        await report(s, one)
    assert displaced.value.code == "intermediary_displaced"
    await s.change(lambda d: moving.adjust(d, CLIENT, paused=True, bandwidth_bytes=1 << 20))
    orders = await report(s, two)
    assert (orders.state, orders.bandwidth_bytes) == (CopyState.PAUSED, 1 << 20)

    # It cannot be finished before everything is there; it can be cancelled.
    claim = moving.Claim(OWNER, 0)
    with pytest.raises(RemoteError, match="16 of 2048 pages"):
        await s.change(lambda d: moving.finish(d, CLIENT, claim))
    waiting = asyncio.ensure_future(write(owner, 100 * PAGE, b"c" * PAGE))
    await s.until(lambda status: status.waiting_commands == 1)
    await s.change(lambda d: moving.cancel(d, CLIENT, claim))
    assert await asyncio.wait_for(waiting, 60) != 0
    await both_know(s)
    for connection in (owner, fill, reader):
        async with asyncio.timeout(60):
            while not connection.ended:
                await asyncio.sleep(0.01)
    with pytest.raises(ServerRefused, match="not being copied"):
        await s.first.connect(s.owner_export(6))
    async with asyncio.timeout(60):
        while list((s.folder / "one" / "presence").iterdir()):
            await asyncio.sleep(0.01)
    back = await s.second.connect(f"{CLIENT}@7:{OWNER}")
    assert await write(back, 0, b"d" * PAGE) == 0
    await back.close()


async def test_what_needs_the_relay_waits_for_it_and_the_rest_goes_on(moving_volume: MovingSet) -> None:
    s = moving_volume
    await both_know(s)
    before = s.source_file.read_bytes()
    owner = await s.first.connect(s.owner_export(5))
    waiting = asyncio.ensure_future(write(owner, 10 * PAGE, b"w" * PAGE))
    async with relaying(s) as relay:
        assert await asyncio.wait_for(waiting, 60) == 0
        assert await read_bytes(owner, 20 * PAGE, 4 * PAGE) == before[20 * PAGE : 24 * PAGE]
        await s.until(lambda status: status.present_pages == 5)
        assert relay.counters.writes == 1
    # Present pages are served without the relay, others wait; so do changes, of whichever page.
    assert await read_bytes(owner, 10 * PAGE, PAGE) == b"w" * PAGE
    assert await read_bytes(owner, 20 * PAGE, 4 * PAGE) == before[20 * PAGE : 24 * PAGE]
    absent = asyncio.ensure_future(read_bytes(owner, 23 * PAGE, 3 * PAGE))
    changed = asyncio.ensure_future(write(owner, 20 * PAGE, b"x" * PAGE))
    await s.until(lambda status: status.waiting_commands == 2)
    async with relaying(s) as relay:
        assert await asyncio.wait_for(absent, 60) == before[23 * PAGE : 26 * PAGE]
        assert await asyncio.wait_for(changed, 60) == 0
        # A second connection of the relay would leave the first one nothing to do.
        name = f"{CLIENT}/{s.source}@5:{OWNER}+{PRINCIPAL}"
        again = await s.second.connect(name)
        assert await read_bytes(owner, 40 * PAGE, PAGE) == before[40 * PAGE : 41 * PAGE]
        assert await write(owner, 41 * PAGE, b"y" * PAGE) == 0
        await again.close()

        # Killed, the first VIOS goes on from what it has stored, and fetches the rest once more.
        await s.until(lambda status: status.present_pages > 8)
        s.first.kill()
        assert s.source_file.read_bytes()[20 * PAGE : 21 * PAGE] == b"x" * PAGE
        s.first.start()
        assert (await s.copy_status()).present_pages > 8
        with pytest.raises(ServerRefused, match="stale_epoch 5"):
            await s.first.connect(s.owner_export(4))
        owner = await s.first.connect(s.owner_export(6))
        await report(s, UnixAddress(f"{s.folder}/r.relay"))
        assert await read_bytes(owner, 20 * PAGE, PAGE) == b"x" * PAGE
        assert await read_bytes(owner, 60 * PAGE, PAGE) == before[60 * PAGE : 61 * PAGE]

        # Somebody else takes the volume on the source: its owner is cut off here too, in the same words.
        other = await s.second.connect(f"{CLIENT}@9:00000000000000bb")
        async with asyncio.timeout(60):
            while not owner.ended:
                await asyncio.sleep(0.01)
        with pytest.raises(ServerRefused, match="another_owner 9"):
            await s.first.connect(s.owner_export(20))
        await other.close()

    # Deleted, the volume leaves nothing behind.
    async with s.first.client() as client:
        await client.delete(f"/v1/volumes/{CLIENT}", params={"epoch": 30, "device": s.target})
    assert list((s.folder / "one" / "presence").iterdir()) == []
