from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from unittest import mock

import pytest

from farpage.errors import Unreachable
from farpage.vios import leases as served
from farpage.volume.lease import MARGIN, Lease
from tests.support.simulated_loop import run_simulated
from tests.unit.volume.model import LEASE_SECONDS, PAGE, Rig


def with_leases(test: Callable[[Rig], Awaitable[None]]) -> None:
    """Run a test against an open volume, whose VIOS want leases, in simulated time."""

    async def main() -> None:
        rig = Rig(leases=True)
        await rig.volume.open(5.0)
        await rig.until(lambda: "standby" in rig.states().values())
        await test(rig)
        await rig.volume.abandon()
        rig.leases.close()

    run_simulated(main)


async def lease_at(rig: Rig, vios: str) -> Lease:
    lease = await rig.leases.at(rig.endpoint(vios), 1.0)
    assert lease is not None
    return lease


def test_a_worker_keeps_one_lease_at_each_vios_alive() -> None:
    async def test(rig: Rig) -> None:
        leases = [await lease_at(rig, vios) for vios in ("vios1", "vios2", "vios1")]
        assert leases[0] is leases[2]
        assert leases[0] is not leases[1]
        await asyncio.sleep(20 * LEASE_SECONDS)
        assert not leases[0].over
        assert await lease_at(rig, "vios1") is leases[0]
        assert [vios.leases.alive for vios in rig.vioses.values() if vios.leases] == [1, 1]

    with_leases(test)


def test_nothing_is_opened_under_the_lease_of_a_server_that_has_ended() -> None:
    async def test(rig: Rig) -> None:
        before = await lease_at(rig, "vios1")
        rig.vioses["vios1"].kill()
        rig.vioses["vios1"].up = True
        await asyncio.sleep(0)
        after = await lease_at(rig, "vios1")
        assert after is not before
        assert after.renewed

    with_leases(test)


def test_a_lease_is_taken_for_over_only_after_the_server_has_stopped() -> None:
    async def test(rig: Rig) -> None:
        lease, vios = await lease_at(rig, "vios1"), rig.vioses["vios1"]
        server_side = vios.leases.find(lease.identifier) if vios.leases else None
        assert server_side is not None
        over: list[bool] = []
        lease.when_over(lambda: over.append(server_side.over()))
        loop = asyncio.get_running_loop()
        await asyncio.sleep(7.3)
        vios.hang()
        hung = loop.time()
        await rig.until(lambda: lease.over)
        assert over == [True]
        assert loop.time() - hung <= LEASE_SECONDS * (1 + MARGIN) + 0.1
        vios.resume()
        await asyncio.sleep(1.0)
        assert server_side.over(), "what lay in the socket must not revive it"
        assert await lease_at(rig, "vios1") is not lease

    with_leases(test)


def test_a_renewal_that_lay_in_the_socket_does_not_outlast_what_the_worker_knows() -> None:
    async def test(rig: Rig) -> None:
        lease, vios = await lease_at(rig, "vios1"), rig.vioses["vios1"]
        server_side = vios.leases.find(lease.identifier) if vios.leases else None
        assert server_side is not None
        offer = served.Lease.offer

        def offer_and_hang(self: served.Lease) -> bytes:
            if self is server_side:
                vios.hang()
            return offer(self)

        with mock.patch.object(served.Lease, "offer", offer_and_hang):
            await rig.until(lambda: vios.hung)
            await asyncio.sleep(LEASE_SECONDS / 2)
            vios.resume()  # the renewal is taken now
            await asyncio.sleep(0.1)
            vios.hang()
            assert not server_side.over()
        await rig.until(lambda: lease.over)
        assert server_side.over()

    with_leases(test)


def test_held_writes_are_repeated_when_the_lease_of_a_hung_server_is_over() -> None:
    async def test(rig: Rig) -> None:
        hung = rig.vioses["vios1"]
        hung.hang()
        written = rig.write(1, 11)
        await rig.until(lambda: rig.states()["vios2"] == "active")
        assert written == []
        await rig.until(lambda: written == [0], LEASE_SECONDS * (1 + MARGIN) + 0.1)
        assert rig.volume.held_bytes == 0
        newer = rig.write(1, 12)
        await rig.until(lambda: newer == [0])
        hung.resume()
        await rig.until(lambda: rig.states()["vios1"] == "standby")
        assert rig.disk.content[PAGE] == 12, "its late write must not reach the disk"

    with_leases(test)


def test_a_server_that_wakes_up_without_another_path_is_opened_anew() -> None:
    async def test(rig: Rig) -> None:
        rig.vioses["vios2"].kill()
        rig.vioses["vios1"].hang()
        written = rig.write(1, 11)
        await asyncio.sleep(3 * LEASE_SECONDS)
        rig.vioses["vios1"].resume()
        await rig.until(lambda: written == [0])
        assert rig.disk.content[PAGE] == 11
        assert rig.states()["vios1"] == "active"

    with_leases(test)


def test_without_leases_at_the_server_the_volume_is_opened_without() -> None:
    async def main() -> None:
        rig = Rig(leases=False)
        await rig.volume.open(5.0)
        assert await rig.leases.at(rig.endpoint("vios1"), 1.0) is None
        assert rig.leases.ends_at(rig.endpoint("vios1")) is None
        written = rig.write(1, 11)
        await rig.until(lambda: written == [0])
        await rig.volume.abandon()

    run_simulated(main)


def test_a_server_that_gives_no_answer_gives_no_lease() -> None:
    async def test(rig: Rig) -> None:
        rig.vioses["vios1"].hang()
        await rig.until(lambda: rig.leases.ends_at(rig.endpoint("vios1")) is None)
        with pytest.raises((TimeoutError, Unreachable)):
            await rig.leases.at(rig.endpoint("vios1"), 1.0)

    with_leases(test)
