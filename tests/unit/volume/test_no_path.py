"""What a volume tells its owner when accesses wait for want of a path."""

from __future__ import annotations

import asyncio

from tests.support.simulated_loop import run_simulated
from tests.unit.volume.model import Rig


async def opened(paths: int) -> tuple[Rig, list[bool]]:
    rig = Rig(paths)
    told: list[bool] = []
    rig.volume.on_no_path = told.append
    await rig.volume.open(5.0)
    if paths > 1:
        await rig.until(lambda: "standby" in rig.states().values())
    return rig, told


def test_the_loss_of_the_last_path_is_told_and_its_return() -> None:
    async def test() -> None:
        rig, told = await opened(2)
        for vios in rig.vioses.values():
            vios.kill()
        await rig.until(lambda: told == [True])
        await asyncio.sleep(300)
        read = rig.read(0)
        rig.vioses["vios2"].up = True
        await rig.until(lambda: read == [0], 3.0)
        assert told == [True, False]
        await rig.volume.abandon()

    run_simulated(test)


def test_a_last_path_that_hangs_is_as_good_as_none() -> None:
    async def test() -> None:
        rig, told = await opened(1)
        rig.vioses["vios1"].hang()
        read = rig.read(0)
        await rig.until(lambda: told == [True], 2.0)
        rig.vioses["vios1"].resume()
        await rig.until(lambda: read == [0], 0.1)
        assert told == [True, False]
        await rig.volume.abandon()

    run_simulated(test)


def test_a_failover_is_not_told_as_a_stall() -> None:
    async def test() -> None:
        rig, told = await opened(2)
        rig.vioses["vios1"].kill()
        await rig.until(lambda: rig.states()["vios2"] == "active")
        assert told == []
        await rig.volume.abandon()

    run_simulated(test)
