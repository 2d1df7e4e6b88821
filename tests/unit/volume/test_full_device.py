from __future__ import annotations

import asyncio
import errno

from farpage.volume.multipath import MultipathVolume
from tests.support.simulated_loop import run_simulated
from tests.unit.volume.model import PAGE, Rig


class Disk:
    """The rig's device with a quota: it takes writes of `room` pages that it does not have."""

    def __init__(self, rig: Rig, room: int) -> None:
        self.room = room
        self.refused = 0
        self._taken: set[int] = set()
        rig.vioses["vios1"].write_error = self.error_for

    def error_for(self, offset: int) -> int:
        if offset not in self._taken and len(self._taken) >= self.room:
            self.refused += 1
            return errno.ENOSPC
        self._taken.add(offset)
        return 0


async def opened() -> tuple[Rig, MultipathVolume, list[bool]]:
    rig = Rig(1)
    await rig.volume.open(5.0)
    told: list[bool] = []
    rig.volume.on_full = told.append
    return rig, rig.volume, told


def test_no_write_is_lost_or_answered_while_the_device_is_full() -> None:
    async def test() -> None:
        rig, volume, told = await opened()
        disk = Disk(rig, room=2)
        results = [rig.write(page, page + 1) for page in range(6)]
        await asyncio.sleep(10)
        assert results == [[0], [0], [], [], [], []]
        assert told == [True]
        disk.room = 6
        await rig.until(lambda: all(results), 3.0)
        assert results == [[0]] * 6
        assert told == [True, False]
        assert [rig.disk.content[page * PAGE] for page in range(6)] == [1, 2, 3, 4, 5, 6]
        await volume.close()

    run_simulated(test)


def test_one_write_asks_for_room_with_growing_pauses_and_the_others_wait() -> None:
    async def test() -> None:
        rig, volume, _ = await opened()
        disk = Disk(rig, room=0)
        for page in range(20):
            rig.write(page, 1)
        await asyncio.sleep(0.05)
        assert disk.refused == 20
        await asyncio.sleep(60)
        assert disk.refused < 20 + 35
        await volume.abandon()

    run_simulated(test)


def test_a_write_of_what_the_device_has_does_not_mean_that_there_is_room() -> None:
    async def test() -> None:
        rig, volume, told = await opened()
        Disk(rig, room=1)
        assert [rig.write(0, 1), rig.write(1, 1)]
        await asyncio.sleep(1)
        again = rig.write(0, 2)
        await rig.until(lambda: again == [0])
        assert told == [True]
        await volume.abandon()

    run_simulated(test)


def test_room_for_some_only_is_not_enough() -> None:
    async def test() -> None:
        rig, volume, told = await opened()
        disk = Disk(rig, room=0)
        results = [rig.write(page, 1) for page in range(4)]
        await asyncio.sleep(1)
        disk.room = 2
        await rig.until(lambda: sum(map(len, results)) == 2)
        await asyncio.sleep(5)
        assert told == [True]
        disk.room = 4
        await rig.until(lambda: all(results))
        assert told == [True, False]
        await volume.close()

    run_simulated(test)


def test_a_full_device_can_be_let_go_of() -> None:
    async def test() -> None:
        rig, volume, _ = await opened()
        Disk(rig, room=0)
        results = [rig.write(page, 1) for page in range(4)]
        await asyncio.sleep(1)
        await volume.abandon()
        assert results == [[errno.ESHUTDOWN]] * 4

    run_simulated(test)


def test_reads_go_on_while_the_device_is_full() -> None:
    async def test() -> None:
        rig, volume, _ = await opened()
        Disk(rig, room=1)
        rig.write(0, 7)
        rig.write(1, 7)
        await asyncio.sleep(1)
        read = rig.read(0)
        await rig.until(lambda: read == [7], 0.1)
        await volume.abandon()

    run_simulated(test)
