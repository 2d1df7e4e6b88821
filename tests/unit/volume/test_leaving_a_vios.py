"""A planned switch away from a VIOS that is about to stop, in simulated time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from farpage.volume.errors import NoPath
from tests.support.simulated_loop import run_simulated
from tests.unit.volume.model import PAGE, Rig


def with_rig(test: Callable[[Rig], Awaitable[None]], paths: int = 2) -> None:
    async def main() -> None:
        rig = Rig(paths)
        await rig.volume.open(5.0)
        if paths > 1:
            await rig.until(lambda: "standby" in rig.states().values())
        await test(rig)
        await rig.volume.abandon()

    run_simulated(main)


def reasons(rig: Rig) -> dict[str, str]:
    return {path.endpoint.vios: path.reason for path in rig.volume.status()}


def test_commands_in_flight_finish_on_the_old_path_before_another_is_opened_under_a_raised_epoch() -> None:
    async def test(rig: Rig) -> None:
        rig.vioses["vios1"].hang()
        written = rig.write(1, 7)
        leaving = asyncio.create_task(rig.volume.leave("vios1"))
        await asyncio.sleep(0.1)
        during = rig.write(2, 8)
        await asyncio.sleep(0.1)
        assert rig.vioses["vios2"].opened == [1], "nothing is opened anew while the old path has commands"
        rig.vioses["vios1"].resume()
        await leaving
        assert written == [0]
        assert rig.vioses["vios2"].opened == [1, 2]
        assert rig.states() == {"vios1": "failed", "vios2": "active"}
        assert reasons(rig)["vios1"] == "being stopped"
        await rig.until(lambda: during == [0])
        assert (rig.disk.content[PAGE], rig.disk.content[2 * PAGE]) == (7, 8)

    with_rig(test)


def test_a_planned_switch_is_no_loss_and_leaves_nothing_held_back() -> None:
    async def test(rig: Rig) -> None:
        written = [rig.write(page, page) for page in range(20)]
        await rig.volume.leave("vios1")
        await rig.until(lambda: all(one == [0] for one in written))
        assert rig.events.alarms == []
        assert rig.volume.held_bytes == 0
        left = next(path for path in rig.volume.status() if path.endpoint.vios == "vios1")
        assert (left.held, left.in_flight, left.losses) == (0, 0, 0)
        assert rig.vioses["vios1"].connections == []

    with_rig(test)


def test_a_path_that_was_left_stays_away_until_it_is_told_to_come_back() -> None:
    async def test(rig: Rig) -> None:
        await rig.volume.leave("vios1")
        await asyncio.sleep(10)
        assert rig.vioses["vios1"].connections == []
        rig.vioses["vios1"].kill()
        rig.volume.rejoin("vios1", "stopped")
        await asyncio.sleep(5)
        assert reasons(rig)["vios1"] == "stopped"
        rig.vioses["vios1"].up = True
        await rig.until(lambda: rig.states()["vios1"] == "standby")
        rig.vioses["vios1"].kill()
        await rig.until(lambda: rig.states()["vios1"] == "failed")
        assert reasons(rig)["vios1"] != "stopped"

    with_rig(test)


def test_a_path_that_nobody_calls_back_comes_back_by_itself() -> None:
    async def test(rig: Rig) -> None:
        await rig.volume.leave("vios1")
        await rig.until(lambda: rig.states()["vios1"] == "standby", 60)

    with_rig(test)


def test_the_only_path_is_not_left() -> None:
    async def test(rig: Rig) -> None:
        with pytest.raises(NoPath, match="over VIOS vios1"):
            await rig.volume.leave("vios1")
        assert rig.states() == {"vios1": "active"}
        read = rig.read(0)
        await rig.until(lambda: read == [0])

    with_rig(test, paths=1)


def test_a_path_goes_on_when_the_other_dies_during_the_switch() -> None:
    async def test(rig: Rig) -> None:
        rig.vioses["vios1"].hang()
        written = rig.write(1, 7)
        leaving = asyncio.create_task(rig.volume.leave("vios1"))
        await asyncio.sleep(0.1)
        rig.vioses["vios2"].kill()
        rig.vioses["vios1"].resume()
        with pytest.raises(NoPath):
            await leaving
        later = rig.write(2, 8)
        await rig.until(lambda: (written, later) == ([0], [0]))
        assert rig.states()["vios1"] == "active"

    with_rig(test)


def test_commands_that_do_not_finish_in_time_are_replayed_or_held_until_the_server_is_gone() -> None:
    async def test(rig: Rig) -> None:
        rig.disk.content[5 * PAGE] = 9
        rig.vioses["vios1"].hang()
        read, written = rig.read(5), rig.write(1, 7)
        await rig.volume.leave("vios1")
        await rig.until(lambda: read == [9])
        assert (written, rig.volume.held_bytes) == ([], PAGE)
        rig.vioses["vios1"].resume()
        rig.volume.rejoin("vios1")
        await rig.until(lambda: written == [0])
        assert rig.volume.held_bytes == 0

    with_rig(test)


def test_a_standby_path_is_left_at_once() -> None:
    async def test(rig: Rig) -> None:
        await rig.volume.leave("vios2")
        assert rig.states() == {"vios1": "active", "vios2": "failed"}
        assert rig.volume.epoch == 1
        assert rig.vioses["vios2"].connections == []

    with_rig(test)


def test_letting_go_of_a_volume_ends_a_switch_under_way() -> None:
    async def test(rig: Rig) -> None:
        rig.vioses["vios1"].hang()
        rig.write(1, 7)
        leaving = asyncio.create_task(rig.volume.leave("vios1"))
        await asyncio.sleep(0.1)
        await rig.volume.abandon()
        with pytest.raises(NoPath):
            await leaving

    with_rig(test)
