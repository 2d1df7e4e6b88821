from __future__ import annotations

import asyncio
import errno

from tests.support.simulated_loop import run_simulated
from tests.unit.volume.model import PAGE, Rig


async def read_over_other_path(rig: Rig, device: str = "disk-1") -> tuple[int, bytes]:
    answer: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()

    def done(error: int, payload: memoryview | None) -> None:
        answer.set_result((error, bytes(payload or b"")))

    rig.volume.read_replica(device, 0, PAGE, done, other_path=True)
    return await answer


async def opened(paths: int) -> Rig:
    rig = Rig(paths)
    await rig.volume.open(5.0)
    if paths > 1:
        await rig.until(lambda: "standby" in rig.states().values())
    return rig


def test_a_page_can_be_read_over_the_standby_path() -> None:
    async def test() -> None:
        rig = await opened(2)
        rig.vioses["vios1"].hang()  # carries the commands, and would not answer
        rig.disk.content[0] = 9
        error, content = await read_over_other_path(rig)
        assert (error, content[0]) == (0, 9)
        await rig.volume.abandon()

    run_simulated(test)


def test_a_standby_path_that_hangs_answers_with_an_error() -> None:
    async def test() -> None:
        rig = await opened(2)
        rig.vioses["vios2"].hang()
        error, _ = await read_over_other_path(rig)
        assert error
        await rig.volume.abandon()

    run_simulated(test)


def test_without_a_standby_path_there_is_no_other() -> None:
    async def test() -> None:
        rig = await opened(1)
        assert (await read_over_other_path(rig))[0] == errno.ENOLINK
        assert (await read_over_other_path(rig, "disk-2"))[0] == errno.ESTALE
        await rig.volume.abandon()

    run_simulated(test)
