from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from farpage.volume.lease import MARGIN
from tests.support.simulated_loop import run_simulated
from tests.unit.volume.model import LEASE_SECONDS, Rig


def after_another_owner(
    test: Callable[[Rig], Awaitable[None]], *, leases: bool = True, had_owner: bool = True
) -> None:
    """Run a test against a volume that is open over the second VIOS; the first hangs."""

    async def main() -> None:
        rig = Rig(leases=leases, had_owner=had_owner)
        rig.vioses["vios1"].hang()
        await rig.volume.open(5.0)
        await test(rig)
        await rig.volume.abandon()
        rig.leases.close()

    run_simulated(main)


def test_a_volume_that_had_an_owner_is_read_at_once_and_written_when_every_vios_knows_of_the_new_one() -> (
    None
):
    async def test(rig: Rig) -> None:
        written, read = rig.write(1, 11), rig.read(2)
        await rig.until(lambda: read == [0], 0.1)
        await asyncio.sleep(LEASE_SECONDS / 2)
        assert written == []
        rig.vioses["vios1"].resume()
        await rig.until(lambda: written == [0], 2.0)

    after_another_owner(test)


def test_the_end_of_a_lease_is_proof_enough_for_a_vios_that_hangs() -> None:
    async def test(rig: Rig) -> None:
        written, began = rig.write(1, 11), asyncio.get_running_loop().time()
        await rig.until(lambda: written == [0])
        waited = asyncio.get_running_loop().time() - began
        assert LEASE_SECONDS * (1 + MARGIN) - 0.1 <= waited <= LEASE_SECONDS * (1 + MARGIN) + 0.2

    after_another_owner(test)


def test_without_a_known_lease_the_answer_of_every_vios_counts() -> None:
    async def test(rig: Rig) -> None:
        written = rig.write(1, 11)
        await asyncio.sleep(100 * LEASE_SECONDS)
        assert (written, rig.volume.predecessors_gone) == ([], False)
        rig.vioses["vios1"].resume()
        await rig.until(lambda: written == [0], 2.0)

    after_another_owner(test, leases=False)


def test_a_new_volume_is_written_at_once() -> None:
    async def test(rig: Rig) -> None:
        written = rig.write(1, 11)
        await rig.until(lambda: written == [0], 0.1)

    after_another_owner(test, had_owner=False)


@pytest.mark.parametrize("end", ["drop", "abandon"])
def test_writes_that_wait_end_with_the_volume(end: str) -> None:
    async def test(rig: Rig) -> None:
        written = rig.write(1, 11)
        if end == "drop":
            rig.volume.drop("given up")
        else:
            await rig.volume.abandon()
        assert len(written) == 1
        assert written[0] != 0

    after_another_owner(test)
