from __future__ import annotations

import asyncio
import errno
import subprocess
from collections.abc import Awaitable, Callable
from functools import partial

import pytest

from farpage.device.claim import Claim
from farpage.volume.errors import ClientFenced, NoPath
from tests.support.simulated_loop import run_simulated
from tests.unit.volume.model import OTHER, OWNER, PAGE, Rig


def with_rig(test: Callable[[Rig], Awaitable[None]], paths: int = 2) -> None:
    """Run a test against an open volume in simulated time."""

    async def main() -> None:
        rig = Rig(paths)
        await rig.volume.open(5.0)
        if paths > 1:
            await rig.until(lambda: "standby" in rig.states().values())
        await test(rig)
        await rig.volume.abandon()

    run_simulated(main)


def test_the_first_endpoint_is_active_and_the_other_stands_by() -> None:
    async def test(rig: Rig) -> None:
        assert rig.states() == {"vios1": "active", "vios2": "standby"}

    with_rig(test)


def test_a_page_reads_back_as_it_was_written() -> None:
    async def test(rig: Rig) -> None:
        written = rig.write(3, 7)
        await rig.until(lambda: written == [0])
        read = rig.read(3)
        await rig.until(lambda: read == [7])

    with_rig(test)


def test_a_read_in_flight_is_replayed_when_its_server_dies() -> None:
    async def test(rig: Rig) -> None:
        rig.vioses["vios1"].hang()
        rig.disk.content[5 * PAGE] = 9
        read = rig.read(5)
        await asyncio.sleep(0.05)
        assert read == []
        rig.vioses["vios1"].kill()
        await rig.until(lambda: read == [9], 0.1)
        assert rig.states() == {"vios1": "failed", "vios2": "active"}

    with_rig(test)


def test_the_epoch_rises_before_another_path_carries_commands() -> None:
    async def test(rig: Rig) -> None:
        rig.vioses["vios1"].kill()
        await rig.until(lambda: rig.states()["vios2"] == "active")
        assert rig.events.epochs == [2]
        assert rig.vioses["vios2"].opened == [1, 2]

    with_rig(test)


def test_a_server_that_hangs_fails_after_the_path_timeout() -> None:
    async def test(rig: Rig) -> None:
        loop = asyncio.get_running_loop()
        rig.vioses["vios1"].hang()
        began = loop.time()
        read = rig.read(0)
        await rig.until(lambda: bool(read))
        assert 1.0 <= loop.time() - began <= 1.1
        assert rig.volume.failovers.records[0].to_vios == "vios2"

    with_rig(test)


def test_an_unacknowledged_write_is_held_until_the_hung_server_accepts_the_new_epoch() -> None:
    async def test(rig: Rig) -> None:
        rig.vioses["vios1"].hang()
        written = rig.write(1, 11)
        await rig.until(lambda: rig.states()["vios2"] == "active")
        other = rig.write(2, 22)
        await rig.until(lambda: other == [0])
        await asyncio.sleep(20)
        assert written == [], "a late write of the hung server could still overwrite it"
        assert rig.volume.held_bytes == PAGE
        rig.vioses["vios1"].resume()
        await rig.until(lambda: written == [0])
        assert rig.disk.content[PAGE] == 11
        assert rig.vioses["vios1"].epoch == 2

    with_rig(test)


def test_a_late_write_of_a_hung_server_is_never_the_last_one() -> None:
    async def test(rig: Rig) -> None:
        rig.vioses["vios1"].hang()
        first = rig.write(1, 1)
        await rig.until(lambda: rig.states()["vios2"] == "active")
        rig.vioses["vios1"].resume()
        await rig.until(lambda: first == [0])
        second = rig.write(1, 2)
        await rig.until(lambda: second == [0])
        await asyncio.sleep(5)
        assert rig.disk.content[PAGE] == 2

    with_rig(test)


def test_a_server_that_answers_again_before_another_took_over_is_fenced_all_the_same() -> None:
    async def test(rig: Rig) -> None:
        """vios1 is opened anew under the epoch of its own held write, which fences nothing."""
        rig.vioses["vios1"].hang()
        written = rig.write(1, 7)
        await rig.until(lambda: rig.states()["vios1"] == "failed")
        rig.vioses["vios2"].hang()
        rig.vioses["vios1"].resume()
        await asyncio.sleep(0.2)
        rig.vioses["vios2"].resume()
        await rig.until(lambda: written == [0])
        assert sorted(rig.states().values()) == ["active", "standby"]

    with_rig(test)


def test_an_unacknowledged_write_is_repeated_at_once_when_its_server_process_is_gone() -> None:
    async def test(rig: Rig) -> None:
        with subprocess.Popen(["sleep", "60"]) as server:  # noqa: ASYNC220
            rig.vioses["vios1"].pid = server.pid
            rig.vioses["vios1"].kill()
            await rig.until(lambda: rig.states()["vios2"] == "active")
            rig.vioses["vios1"].up = True
            await rig.until(lambda: rig.states()["vios1"] == "standby")
            rig.vioses["vios2"].kill()
            await rig.until(lambda: rig.states()["vios1"] == "active")
            rig.vioses["vios2"].up = True
            await rig.until(lambda: rig.states()["vios2"] == "standby")
            rig.vioses["vios1"].hang()
            written = rig.write(1, 5)
            await asyncio.sleep(0.1)
            rig.vioses["vios1"].kill()
            await rig.until(lambda: rig.states()["vios2"] == "active")
            assert rig.volume.held_bytes == PAGE
            server.kill()
            await rig.until(lambda: written == [0])

    with_rig(test)


def test_a_returned_server_stands_by_and_takes_over_the_next_time() -> None:
    async def test(rig: Rig) -> None:
        rig.vioses["vios1"].kill()
        await rig.until(lambda: rig.states()["vios2"] == "active")
        rig.vioses["vios1"].up = True
        await rig.until(lambda: rig.states()["vios1"] == "standby")
        rig.vioses["vios2"].kill()
        await rig.until(lambda: rig.states() == {"vios1": "active", "vios2": "failed"})
        assert rig.volume.epoch == 3

    with_rig(test)


def test_without_another_path_a_slow_server_is_suspect_and_its_late_answer_counts() -> None:
    async def test(rig: Rig) -> None:
        rig.vioses["vios1"].hang()
        read = rig.read(0)
        await rig.until(lambda: rig.states() == {"vios1": "suspect"})
        rig.vioses["vios1"].resume()
        await rig.until(lambda: read == [0])
        assert rig.states() == {"vios1": "active"}
        assert rig.events.epochs == []

    with_rig(test, paths=1)


def test_a_suspect_path_is_left_as_soon_as_another_comes_back() -> None:
    async def test(rig: Rig) -> None:
        rig.vioses["vios2"].kill()
        rig.vioses["vios1"].hang()
        read = rig.read(0)
        await rig.until(lambda: rig.states()["vios1"] == "suspect")
        rig.vioses["vios2"].up = True
        await rig.until(lambda: read == [0])
        assert rig.states()["vios2"] == "active"

    with_rig(test)


@pytest.mark.parametrize(("paths", "state"), [(2, "failed"), (1, "suspect")])
def test_a_vios_that_does_not_answer_is_doubted_whether_or_not_there_is_another_path(
    paths: int, state: str
) -> None:
    async def test(rig: Rig) -> None:
        rig.vioses["vios1"].hang()
        read = rig.read(0)
        await rig.until(lambda: rig.states()["vios1"] == state)
        assert rig.events.doubted == ["vios1"]
        rig.vioses["vios1"].resume()
        await rig.until(lambda: read == [0])

    with_rig(test, paths=paths)


def test_with_no_path_left_commands_wait_until_one_is_back() -> None:
    async def test(rig: Rig) -> None:
        for vios in rig.vioses.values():
            vios.kill()
        read, written = rig.read(0), rig.write(1, 4)
        await asyncio.sleep(300)
        assert (read, written) == ([], [])
        assert "no_path" in rig.events.alarms
        rig.vioses["vios2"].up = True
        await rig.until(lambda: (read, written) == ([0], [0]))

    with_rig(test)


def test_an_idle_path_that_hangs_is_noticed_by_its_probe() -> None:
    async def test(rig: Rig) -> None:
        rig.vioses["vios2"].hang()
        await rig.until(lambda: rig.states()["vios2"] == "failed", 5.0)
        assert rig.states()["vios1"] == "active"

    with_rig(test)


def test_an_io_error_of_one_server_moves_the_command_to_the_other() -> None:
    async def test(rig: Rig) -> None:
        rig.vioses["vios1"].error = errno.EIO
        written = rig.write(1, 3)
        await rig.until(lambda: written == [0])
        assert rig.states()["vios2"] == "active"

    with_rig(test)


def test_an_io_error_on_every_path_is_waited_out_with_one_alarm() -> None:
    async def test(rig: Rig) -> None:
        rig.vioses["vios1"].error = errno.EIO
        written = rig.write(1, 3)
        await asyncio.sleep(30)
        assert written == []
        assert rig.events.alarms.count("device_error") == 1
        rig.vioses["vios1"].error = 0
        await rig.until(lambda: written == [0])

    with_rig(test, paths=1)


def test_a_full_device_keeps_the_write_waiting_and_fails_no_path() -> None:
    async def test(rig: Rig) -> None:
        rig.vioses["vios1"].error = errno.ENOSPC
        written = rig.write(1, 3)
        await asyncio.sleep(0.2)
        assert (written, rig.states()["vios1"]) == ([], "active")
        rig.vioses["vios1"].error = 0
        await rig.until(lambda: written == [0])

    with_rig(test)


def test_abandoning_ends_every_command_with_eshutdown() -> None:
    async def test(rig: Rig) -> None:
        rig.vioses["vios1"].hang()
        written = rig.write(1, 3)
        await rig.volume.abandon()
        assert written == [errno.ESHUTDOWN]

    with_rig(test)


def test_opening_without_any_server_says_why() -> None:
    async def main() -> None:
        rig = Rig()
        for vios in rig.vioses.values():
            vios.kill()
        try:
            await rig.volume.open(2.0)
        except NoPath as error:
            assert "vios1" in str(error)
            assert "vios2" in str(error)
        else:
            raise AssertionError("it opened")

    run_simulated(main)


def test_an_owner_whose_client_was_claimed_anew_is_fenced_and_never_comes_back() -> None:
    async def test(rig: Rig) -> None:
        for vios in rig.vioses.values():
            vios.claim(Claim(2, OTHER))
        read: list[int] = []
        rig.volume.read(0, PAGE, lambda error, _: read.append(error))
        written = rig.write(1, 7)
        await rig.until(lambda: bool(rig.volume.ownership.fenced))
        await asyncio.sleep(300)
        assert (read, written) == ([], [])
        assert {path.reason for path in rig.volume.status()} == {"another owner has the volume at epoch 2"}
        assert set(rig.states().values()) == {"failed"}
        assert rig.events.alarms.count("fenced") == 1
        assert all(vios.claims.current == Claim(2, OTHER) for vios in rig.vioses.values())

    with_rig(test)


def test_an_owner_cut_off_for_long_comes_back_to_no_epoch_above_the_new_owner_s() -> None:
    async def test(rig: Rig) -> None:
        first, second = rig.vioses.values()
        for vios in (first, second):
            vios.kill()
        await asyncio.sleep(60)
        second.claims.add(Claim(2, OTHER))
        second.up = True
        await rig.until(lambda: bool(rig.volume.ownership.fenced))
        assert second.claims.current == Claim(2, OTHER)

    with_rig(test)


def test_a_volume_shares_its_epochs_with_the_client_s_other_replica() -> None:
    async def test(rig: Rig) -> None:
        rig.volume.ownership.raise_epoch()
        rig.volume.ownership.raise_epoch()
        assert rig.volume.epoch == 1, "what another replica does moves this one only when it takes over"
        rig.vioses["vios1"].kill()
        await rig.until(lambda: rig.states()["vios2"] == "active")
        assert (rig.volume.epoch, rig.vioses["vios2"].epoch) == (3, 3)
        assert rig.volume.ownership.epoch == 3

    with_rig(test)


def test_a_path_let_go_of_for_another_replica_s_epoch_is_opened_at_once_without_an_alarm() -> None:
    async def test(rig: Rig) -> None:
        vios = rig.vioses["vios1"]
        vios.claim(Claim(rig.volume.ownership.raise_epoch(), OWNER))
        read = rig.read(0)
        await rig.until(lambda: read == [0], 0.03)
        assert vios.opened == [1, 2]
        assert "path_failed" not in rig.events.alarms

    with_rig(test, paths=1)


def test_a_path_that_fails_under_an_older_epoch_than_another_replica_s_is_told_of() -> None:
    async def test(rig: Rig) -> None:
        rig.volume.ownership.raise_epoch()
        rig.vioses["vios1"].kill()
        await rig.until(lambda: rig.states()["vios2"] == "active")
        await rig.until(lambda: rig.events.alarms.count("path_failed") == 1)
        assert rig.events.doubted == ["vios1"]

    with_rig(test)


def test_a_server_that_comes_back_alone_is_opened_once() -> None:
    async def test(rig: Rig) -> None:
        vios = rig.vioses["vios1"]
        vios.kill()
        vios.up = True
        read = rig.read(0)
        await rig.until(lambda: read == [0])
        assert vios.opened == [1, 2]

    with_rig(test, paths=1)


def test_an_older_epoch_of_its_own_makes_an_owner_come_back_under_the_newer() -> None:
    async def test(rig: Rig) -> None:
        for vios in rig.vioses.values():
            vios.claim(Claim(5, OWNER))
        read = rig.read(0)
        await rig.until(lambda: read == [0])
        assert rig.volume.epoch >= 5
        assert rig.volume.ownership.fenced == ""

    with_rig(test)


def test_opening_what_another_owner_has_says_so() -> None:
    async def main() -> None:
        rig = Rig()
        for vios in rig.vioses.values():
            vios.claim(Claim(1, OTHER))
        with pytest.raises(ClientFenced, match="another owner has the volume at epoch 1"):
            await rig.volume.open(2.0)

    run_simulated(main)


def test_a_slow_device_does_not_make_both_paths_flap_for_ever() -> None:
    """Each time-out doubles the patience, so a device slower than the timeout is waited for in the end."""

    async def test(rig: Rig) -> None:
        loop = asyncio.get_running_loop()
        for vios in rig.vioses.values():
            do = vios.do
            vios.do = lambda work, do=do: loop.call_later(1.5, do, work)  # type: ignore[method-assign, misc, assignment]
        read = rig.read(0)
        await rig.until(lambda: bool(read), 60.0)

    with_rig(test)


async def seconds_of_a_read_while(rig: Rig, hung: str) -> float:
    """Return how long a read takes that finds a VIOS hanging; it is answered by another."""
    loop = asyncio.get_running_loop()
    rig.vioses[hung].hang()
    began = loop.time()
    read = rig.read(0)
    await rig.until(lambda: bool(read))
    rig.vioses[hung].resume()
    return loop.time() - began


def test_servers_that_hang_one_after_the_other_are_each_waited_for_once() -> None:
    """The patience grows when the device is slow, not when a server is and another answers in time."""

    async def test(rig: Rig) -> None:
        for hung, other in (("vios1", "vios2"), ("vios2", "vios1"), ("vios1", "vios2")):
            await rig.until(partial(rig.is_in, {hung: "active", other: "standby"}))
            assert await seconds_of_a_read_while(rig, hung) <= 1.1

    with_rig(test)


def test_a_volume_is_let_go_at_the_very_moment_at_which_a_probe_is_answered() -> None:
    async def test(rig: Rig) -> None:
        standby = rig.vioses["vios2"]
        standby.hang()
        await rig.until(lambda: bool(standby.backlog))
        standby.resume()
        async with asyncio.timeout(1):
            await rig.volume.abandon()

    with_rig(test)
