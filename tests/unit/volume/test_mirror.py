"""A volume with replicas on several devices: what one of them loses, the others have."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable
from unittest import mock

import pytest

from farpage.definition.model import ReplicaState
from farpage.device.claim import Claim
from farpage.volume.dirty import MemoryDirtyStore
from farpage.volume.errors import ClientFenced, NoPath
from farpage.volume.reading import Reads
from tests.support.simulated_loop import run_simulated
from tests.unit.volume.mirror_model import IN_SYNC, PAGES, STALE, MirrorRig
from tests.unit.volume.model import PAGE, Disk


def with_mirror(scenario: Callable[[MirrorRig], Awaitable[None]], *, common: bool = False) -> None:
    """Run a scenario on an open mirror of two replicas."""

    async def main() -> None:
        rig = MirrorRig(common=common)
        await rig.volume.open(5)
        await scenario(rig)
        await rig.volume.abandon()

    run_simulated(main)


def test_a_write_is_done_when_every_replica_has_it() -> None:
    async def scenario(rig: MirrorRig) -> None:
        rig.vioses["vios2"].hang()
        written = rig.write(3, 7)
        await rig.until(lambda: rig.page("disk1", 3) == 7)
        assert written == []
        rig.vioses["vios2"].resume()
        await rig.until(lambda: written == [0])
        assert rig.page("disk2", 3) == 7

    with_mirror(scenario)


def test_a_lost_replica_is_recorded_stale_before_a_write_goes_on_without_it() -> None:
    async def scenario(rig: MirrorRig) -> None:
        rig.events.gate.clear()
        rig.vioses["vios1"].kill()
        written = rig.write(3, 7)
        await rig.until(lambda: rig.page("disk2", 3) == 7 and rig.events.attempts > 0)
        assert written == []
        assert rig.dirty("disk1") == 1
        rig.events.gate.set()
        await rig.until(lambda: written == [0])
        assert rig.events.stored == {"disk1": STALE, "disk2": IN_SYNC}
        assert "replica_stale" in rig.events.alarms

    with_mirror(scenario)


def test_writes_wait_while_nobody_can_store_that_a_replica_is_stale() -> None:
    async def scenario(rig: MirrorRig) -> None:
        rig.events.reachable = False
        rig.vioses["vios1"].kill()
        written = rig.write(3, 7)
        await rig.until(lambda: rig.events.attempts > 1)
        assert written == []
        rig.events.reachable = True
        await rig.until(lambda: written == [0])

    with_mirror(scenario)


def test_a_replica_that_does_not_answer_within_the_path_timeout_is_given_up() -> None:
    async def scenario(rig: MirrorRig) -> None:
        rig.vioses["vios1"].hang()
        written = rig.write(3, 7)
        await rig.until(lambda: written == [0], seconds=1.5)
        assert rig.health() == {"disk1": "stale", "disk2": "in_sync"}

    with_mirror(scenario)


def test_a_returned_replica_gets_just_what_it_has_missed() -> None:
    async def scenario(rig: MirrorRig) -> None:
        await rig.written(1, 1)
        rig.vioses["vios1"].kill()
        for page in range(10, 20):
            await rig.written(page, page)
        rig.disks["disk1"].content[PAGE] = 99  # what is not missing is not copied
        rig.restart("vios1")
        await rig.in_sync()
        assert [rig.page("disk1", page) for page in (1, *range(10, 20))] == [99, *range(10, 20)]
        assert rig.volume.replica_status()[0].resynced_pages == 10
        assert "replica_resynced" in rig.events.alarms
        assert rig.store.dirty_maps == ()

    with_mirror(scenario)


def test_a_replica_that_has_everything_again_is_in_sync_when_that_is_recorded() -> None:
    async def scenario(rig: MirrorRig) -> None:
        rig.vioses["vios1"].kill()
        await rig.written(3, 7)
        rig.events.reachable = False
        attempts = rig.events.attempts
        rig.restart("vios1")
        await rig.until(lambda: rig.events.attempts > attempts)
        assert rig.dirty("disk1") == 0
        assert rig.health()["disk1"] == "resyncing"
        rig.events.reachable = True
        await rig.in_sync()

    with_mirror(scenario)


def test_the_late_write_of_a_server_that_hung_never_replaces_what_was_resynced() -> None:
    async def scenario(rig: MirrorRig) -> None:
        rig.vioses["vios1"].hang()
        await rig.written(5, 1)
        await rig.written(5, 2)
        rig.vioses["vios1"].resume()  # carries out the first write, late
        await rig.in_sync()
        assert rig.page("disk1", 5) == 2
        assert rig.vioses["vios1"].opened[-1] > 1

    with_mirror(scenario)


def test_a_common_device_is_not_written_to_before_its_other_server_is_fenced() -> None:
    async def scenario(rig: MirrorRig) -> None:
        rig.vioses["vios1"].hang()
        rig.write(5, 1)
        rig.vioses["spare"].kill()
        await rig.until(lambda: rig.health()["disk1"] == "stale")
        rig.restart("spare")
        await rig.written(5, 2)
        await rig.until(lambda: any(p.state.value == "active" for p in rig.volume.status()[:2]))
        assert rig.health()["disk1"] == "stale"
        rig.vioses["vios1"].resume()
        await rig.in_sync()
        assert rig.page("disk1", 5) == 2

    with_mirror(scenario, common=True)


def test_new_data_wins_over_the_resync_of_the_same_pages() -> None:
    async def main() -> None:
        rig = MirrorRig(bandwidth=16 * PAGE)
        await rig.volume.open(5)
        rig.vioses["vios1"].kill()
        for page in range(0, PAGES, 2):
            await rig.written(page, 1)
        rig.restart("vios1")
        await rig.until(lambda: rig.health()["disk1"] == "resyncing")
        written = [rig.write(page, 2) for page in range(PAGES)]
        await rig.in_sync()
        await rig.until(lambda: all(result == [0] for result in written))
        for disk in rig.disks:
            assert {rig.page(disk, page) for page in range(PAGES)} == {2}
        await rig.volume.abandon()

    run_simulated(main)


def test_a_write_waits_for_the_copy_of_its_page_that_is_being_written() -> None:
    async def main() -> None:
        rig = MirrorRig(bandwidth=4 * PAGE)
        await rig.volume.open(5)
        rig.vioses["vios1"].kill()
        await rig.written(5, 1)
        await rig.written(7, 1)
        rig.restart("vios1")
        target = rig.vioses["vios1"]
        await rig.until(lambda: rig.health()["disk1"] == "resyncing" and rig.dirty("disk1") == 1)
        target.hang()
        await rig.until(lambda: bool(target.backlog))
        written = rig.write(7, 2)
        assert len(target.backlog) == 1
        target.resume()
        await rig.until(lambda: written == [0])
        await rig.in_sync()
        assert rig.page("disk1", 7) == rig.page("disk2", 7) == 2
        await rig.volume.abandon()

    run_simulated(main)


def test_the_copy_keeps_to_its_bandwidth_and_tells_how_far_it_is() -> None:
    async def main() -> None:
        rig = MirrorRig(bandwidth=64 * PAGE / 8)
        await rig.volume.open(5)
        rig.vioses["vios1"].kill()
        for page in range(0, PAGES, 2):
            await rig.written(page, 1)
        rig.restart("vios1")
        await rig.until(lambda: rig.health()["disk1"] == "resyncing")
        began = asyncio.get_running_loop().time()
        await rig.until(lambda: rig.dirty("disk1") < PAGES // 4)
        status = rig.volume.replica_status()[0]
        assert status.rate_bytes == pytest.approx(64 * PAGE / 8, rel=0.5)
        assert status.eta_seconds is not None
        await rig.in_sync()
        assert 3 < asyncio.get_running_loop().time() - began < 6
        await rig.volume.abandon()

    run_simulated(main)


def test_the_last_replica_is_never_given_up() -> None:
    async def scenario(rig: MirrorRig) -> None:
        told: list[bool] = []
        rig.volume.on_no_path = told.append
        rig.vioses["vios1"].kill()
        await rig.written(5, 1)
        rig.vioses["vios2"].kill()
        written, read = rig.write(6, 2), rig.read(5)
        await rig.until(lambda: told == [True])
        assert rig.events.alarms[-1] == "no_path"
        rig.restart("vios2")
        await rig.until(lambda: written == [0] and read == [1])
        assert told == [True, False]
        assert rig.events.stored == {"disk1": STALE, "disk2": IN_SYNC}

    with_mirror(scenario)


@pytest.mark.parametrize("first", ["vios1", "vios2"])
def test_when_all_are_lost_at_once_the_first_that_returns_serves(first: str) -> None:
    async def scenario(rig: MirrorRig) -> None:
        await rig.written(5, 1)
        rig.events.reachable = False
        written = rig.write(6, 2)
        rig.vioses["vios1"].kill()
        rig.vioses["vios2"].kill()
        read = rig.read(5)
        rig.restart(first)
        rig.events.reachable = True
        await rig.until(lambda: written == [0] and read == [1])
        lost = {"vios1": "disk2", "vios2": "disk1"}[first]
        assert rig.events.stored[lost] is STALE

    with_mirror(scenario)


def test_pages_that_a_stale_replica_has_are_read_from_it_when_nothing_else_answers() -> None:
    async def main() -> None:
        rig = MirrorRig(bandwidth=1.0)
        await rig.volume.open(5)
        await rig.written(1, 1)
        rig.vioses["vios1"].kill()
        for page in range(3, PAGES, 2):
            await rig.written(page, page)
        rig.restart("vios1")
        await rig.until(lambda: rig.health()["disk1"] == "resyncing")
        rig.vioses["vios2"].kill()
        has, lacks = rig.read(1), rig.read(PAGES - 1)
        await rig.until(lambda: has == [1], seconds=1)
        assert lacks == []
        rig.restart("vios2")
        await rig.until(lambda: lacks == [PAGES - 1])
        await rig.volume.abandon()

    run_simulated(main)


def test_reading_the_last_replica_for_itself_waits_until_it_answers() -> None:
    async def scenario(rig: MirrorRig) -> None:
        written = rig.write(3, 7)
        await rig.until(lambda: written == [0])
        rig.vioses["vios1"].kill()
        await rig.until(lambda: rig.events.stored["disk1"] is STALE)
        rig.vioses["vios2"].kill()
        await rig.until(lambda: rig.volume.replicas == ("disk2",) and "path_failed" in rig.events.alarms)
        answers: list[tuple[int, bytes]] = []
        rig.volume.read_replica(
            "disk2",
            3 * PAGE,
            PAGE,
            lambda error, payload: answers.append((error, bytes(payload[:1]) if payload else b"")),
        )
        await asyncio.sleep(30)
        assert answers == []
        rig.vioses["vios2"].up = True
        await rig.until(lambda: bool(answers))
        assert answers == [(0, b"\x07")]

    with_mirror(scenario)


def test_a_full_device_lets_the_other_replica_take_the_pages() -> None:
    async def scenario(rig: MirrorRig) -> None:
        rig.vioses["vios1"].write_error = lambda _offset: errno.ENOSPC
        await rig.written(5, 1)
        assert rig.events.stored == {"disk1": STALE, "disk2": IN_SYNC}
        assert "ENOSPC" in rig.volume.replica_status()[0].reason
        rig.vioses["vios1"].write_error = None
        await rig.in_sync()
        assert rig.page("disk1", 5) == 1

    with_mirror(scenario)


def test_only_the_last_replica_waits_for_room() -> None:
    async def scenario(rig: MirrorRig) -> None:
        told: list[bool] = []
        rig.volume.on_full = told.append
        for vios in ("vios1", "vios2"):
            rig.vioses[vios].write_error = lambda _offset: errno.ENOSPC
        written = rig.write(5, 1)
        await rig.until(lambda: told == [True])
        assert written == []
        for vios in ("vios1", "vios2"):
            rig.vioses[vios].write_error = None
        await rig.until(lambda: written == [0])
        assert told == [True, False]
        await rig.in_sync()

    with_mirror(scenario)


def test_a_page_that_a_device_cannot_read_comes_from_the_other_and_is_put_there() -> None:
    async def scenario(rig: MirrorRig) -> None:
        await rig.written(5, 1)
        rig.vioses["vios1"].error = rig.vioses["vios2"].error = 0
        preferred = rig.vioses["vios1"]
        preferred.error = errno.EIO
        read = rig.read(5)
        await rig.until(lambda: read == [1])
        preferred.error = 0
        rig.disks["disk1"].content[5 * PAGE] = 0
        await rig.in_sync()
        assert rig.page("disk1", 5) == 1

    with_mirror(scenario)


async def read_often(rig: MirrorRig) -> None:
    """Write page 5 and read it so often that it is known how long a read takes."""
    await rig.written(5, 1)
    for _ in range(100):
        await rig.has_read(5, 1)


def test_a_late_read_is_repeated_on_the_other_replica() -> None:
    async def scenario(rig: MirrorRig) -> None:
        await read_often(rig)
        rig.vioses["vios1"].hang()
        rig.vioses["vios2"].hang()
        read = rig.read(5)
        await rig.until(lambda: rig.volume.counts.hedged_reads == 1, seconds=0.1)
        slower = next(v for v in rig.vioses.values() if v.backlog)
        other = next(v for v in rig.vioses.values() if v is not slower or len(v.backlog) > 1)
        other.resume()
        await rig.until(lambda: read == [1], seconds=0.1)
        assert rig.volume.counts.hedges_won <= 1

    with_mirror(scenario)


def test_no_more_reads_are_repeated_than_the_budget_allows() -> None:
    async def scenario(rig: MirrorRig) -> None:
        await read_often(rig)
        for vios in rig.vioses.values():
            vios.hang()
        for _ in range(20):
            rig.read(5)
        began = asyncio.get_running_loop().time()
        await rig.until(lambda: asyncio.get_running_loop().time() - began > 0.5)
        assert 0 < rig.volume.counts.hedged_reads <= 0.05 * 120
        for vios in rig.vioses.values():
            vios.resume()

    with_mirror(scenario)


def test_reads_that_nobody_answers_are_looked_at_ever_more_seldom() -> None:
    looks = []
    look = Reads._tick

    def counted(reads: Reads) -> None:
        looks.append(reads)
        look(reads)

    async def scenario(rig: MirrorRig) -> None:
        await read_often(rig)
        for vios in rig.vioses.values():
            vios.hang()
        rig.read(5)
        looks.clear()
        began = asyncio.get_running_loop().time()
        await rig.until(lambda: asyncio.get_running_loop().time() - began > 0.9)
        assert 0 < len(looks) < 60
        for vios in rig.vioses.values():
            vios.resume()

    with mock.patch.object(Reads, "_tick", counted):
        with_mirror(scenario)


def test_reads_go_to_the_replica_that_answers_while_the_other_hangs() -> None:
    async def scenario(rig: MirrorRig) -> None:
        await read_often(rig)
        rig.vioses["vios1"].hang()
        longest = 0.0
        for _ in range(50):
            began = asyncio.get_running_loop().time()
            await rig.has_read(5, 1)
            longest = max(longest, asyncio.get_running_loop().time() - began)
        assert longest < 0.05

    with_mirror(scenario)


def test_a_fresh_attachment_takes_every_replica_that_opens_for_in_sync() -> None:
    async def main() -> None:
        rig = MirrorRig(stored={"disk1": STALE, "disk2": IN_SYNC})
        rig.vioses["vios2"].up = False
        await rig.volume.open(5)
        await rig.written(5, 1)
        assert rig.events.stored == {"disk1": IN_SYNC, "disk2": STALE}
        rig.restart("vios2")
        await rig.in_sync()
        assert rig.volume.replica_status()[1].resynced_pages == 1
        await rig.volume.abandon()

    run_simulated(main)


@pytest.mark.parametrize(("kept", "copied"), [(True, 3), (False, PAGES)])
def test_after_a_restart_a_stale_replica_misses_what_its_map_says_or_everything(
    kept: bool, copied: int
) -> None:
    async def main() -> None:
        disks = {"disk1": Disk(), "disk2": Disk()}
        before = MirrorRig(disks=disks)
        await before.volume.open(5)
        before.vioses["vios1"].kill()
        for page in (1, 2, 3):
            await before.written(page, 9)
        store = MemoryDirtyStore(PAGES)
        if kept:
            store.dirty_map("disk1")[:] = before.store.dirty_map("disk1")
        await before.volume.abandon()
        states: dict[str, ReplicaState] = dict(before.events.stored)
        rig = MirrorRig(disks=disks, stored=states, store=store, recover=True, epoch=10)
        await rig.volume.open(5)
        await rig.in_sync()
        assert rig.volume.replica_status()[0].resynced_pages == copied
        assert [rig.page("disk1", page) for page in (1, 2, 3)] == [9, 9, 9]
        await rig.volume.abandon()

    run_simulated(main)


def test_after_a_recovery_nothing_is_copied_while_a_server_may_still_write_for_the_dead_worker() -> None:
    async def main() -> None:
        rig = MirrorRig(common=True, stored={"disk1": STALE, "disk2": IN_SYNC}, recover=True, epoch=10)
        spare = rig.vioses["spare"]
        spare.hang()
        late = rig.disks["disk1"].content
        spare.backlog.append(lambda: late.__setitem__(slice(PAGE, 2 * PAGE), bytes([1]) * PAGE))
        rig.disks["disk2"].content[PAGE : 2 * PAGE] = bytes([2]) * PAGE
        await rig.volume.open(5)
        await asyncio.sleep(5)
        assert rig.health()["disk1"] == "stale"
        spare.resume()
        await rig.in_sync()
        assert rig.page("disk1", 1) == 2
        await rig.volume.abandon()

    run_simulated(main)


def test_what_a_dead_worker_sent_to_a_lost_replica_counts_until_that_is_recorded_as_stale() -> None:
    async def main() -> None:
        rig = MirrorRig(common=True, recover=True, epoch=10)
        rig.vioses["spare"].hang()
        await rig.volume.open(5)
        assert not rig.volume.predecessors_gone
        rig.events.gate.clear()
        rig.vioses["vios1"].kill()
        await rig.until(lambda: rig.health()["disk1"] == "stale")
        assert not rig.volume.predecessors_gone
        rig.events.gate.set()
        await rig.until(lambda: rig.volume.predecessors_gone)
        assert rig.events.stored["disk1"] is STALE
        await rig.volume.abandon()

    run_simulated(main)


def test_who_finds_another_owner_at_the_only_replica_that_answers_is_told_at_once() -> None:
    async def main() -> None:
        rig = MirrorRig()
        rig.vioses["vios2"].hang()
        rig.vioses["vios1"].claim(Claim(5, "bbbbbbbbbbbbbbbb"))
        began = asyncio.get_running_loop().time()
        with pytest.raises(ClientFenced, match="another owner"):
            await rig.volume.open(60)
        assert asyncio.get_running_loop().time() - began < 1

    run_simulated(main)


def test_a_stale_replica_alone_does_not_open() -> None:
    async def main() -> None:
        rig = MirrorRig(stored={"disk1": STALE, "disk2": IN_SYNC}, recover=True)
        rig.vioses["vios2"].up = False
        with pytest.raises(NoPath, match="disk2"):
            await rig.volume.open(2)

    run_simulated(main)


def test_a_repair_goes_to_one_replica_alone() -> None:
    async def scenario(rig: MirrorRig) -> None:
        await rig.written(5, 1)
        rig.disks["disk2"].content[5 * PAGE] = 8
        errors: list[int] = []
        rig.volume.rewrite_replica("disk2", 5 * PAGE, memoryview(b"\1" * PAGE), errors.append)
        await rig.until(lambda: errors == [0])
        assert (rig.page("disk1", 5), rig.page("disk2", 5)) == (1, 1)
        rig.vioses["vios1"].kill()
        rig.volume.rewrite_replica("disk1", 5 * PAGE, memoryview(b"\1" * PAGE), errors.append)
        assert errors == [0, errno.ESTALE]

    with_mirror(scenario)


def test_a_vios_that_is_about_to_stop_is_left_for_the_other_replica() -> None:
    async def scenario(rig: MirrorRig) -> None:
        await rig.volume.leave("vios1")
        await rig.written(5, 1)
        assert rig.events.stored == {"disk1": STALE, "disk2": IN_SYNC}
        with pytest.raises(NoPath):
            await rig.volume.leave("vios2")
        rig.volume.rejoin("vios1")
        await rig.in_sync()
        assert rig.page("disk1", 5) == 1

    with_mirror(scenario)


def test_three_replicas_survive_the_loss_of_two() -> None:
    async def main() -> None:
        rig = MirrorRig(3)
        await rig.volume.open(5)
        rig.vioses["vios1"].kill()
        rig.vioses["vios3"].kill()
        await rig.written(5, 1)
        assert rig.events.stored == {"disk1": STALE, "disk2": IN_SYNC, "disk3": STALE}
        rig.restart("vios1")
        rig.restart("vios3")
        await rig.in_sync()
        assert [rig.page(disk, 5) for disk in rig.disks] == [1, 1, 1]
        await rig.volume.abandon()

    run_simulated(main)


# Replaced


def test_a_new_replica_gets_everything_and_the_old_one_goes() -> None:
    async def scenario(rig: MirrorRig) -> None:
        for page in range(PAGES):
            await rig.written(page, 1)
        rig.add("disk3")
        written = [rig.write(page, 2) for page in range(0, PAGES, 3)]
        await rig.in_sync()
        await rig.until(lambda: all(result == [0] for result in written))
        await rig.volume.retire("disk1")
        assert rig.events.stored["disk1"] is ReplicaState.RETIRED
        assert rig.volume.replicas == ("disk2", "disk3")
        await rig.written(1, 9)
        assert rig.page("disk1", 1) == 1
        assert rig.disks["disk2"].content == rig.disks["disk3"].content
        assert [rig.page("disk3", page) for page in range(4)] == [2, 9, 1, 2]
        assert rig.store.dirty_maps == ()

    with_mirror(scenario)


@pytest.mark.parametrize("common", [False, True])
def test_a_replica_that_is_replaced_is_no_failure(common: bool) -> None:
    async def scenario(rig: MirrorRig) -> None:
        await rig.written(5, 1)
        rig.add("disk3")
        await rig.in_sync()
        await rig.volume.retire("disk1")
        await rig.written(5, 2)
        assert (rig.events.alarms, rig.events.doubted) == (["replica_resynced"], [])
        assert not rig.volume.failovers.records

    with_mirror(scenario, common=common)


def test_a_write_in_flight_when_a_replica_is_added_is_not_missed_by_it() -> None:
    async def scenario(rig: MirrorRig) -> None:
        await rig.written(5, 1)
        rig.vioses["vios1"].hang()
        written = rig.write(5, 2)
        await rig.until(lambda: rig.page("disk2", 5) == 2)
        rig.add("disk3")
        await asyncio.sleep(0.2)
        assert rig.dirty("disk3") > 0
        rig.vioses["vios1"].resume()
        await rig.in_sync()
        assert (written, rig.page("disk3", 5)) == ([0], 2)

    with_mirror(scenario)


def test_no_replica_is_retired_while_no_other_one_has_everything() -> None:
    async def scenario(rig: MirrorRig) -> None:
        await rig.written(5, 1)
        rig.vioses["vios2"].kill()
        await rig.until(lambda: rig.events.stored["disk2"] is STALE)
        retiring = asyncio.create_task(rig.volume.retire("disk1"))
        await asyncio.sleep(3)
        assert rig.events.stored["disk1"] is IN_SYNC
        rig.restart("vios2")
        await retiring
        assert rig.events.stored == {"disk1": ReplicaState.RETIRED, "disk2": IN_SYNC}

    with_mirror(scenario)


def test_a_replica_whose_successor_is_lost_while_it_is_retired_stays() -> None:
    async def scenario(rig: MirrorRig) -> None:
        rig.events.gate.clear()
        retiring = asyncio.create_task(rig.volume.retire("disk1"))
        await rig.until(lambda: rig.events.attempts == 1)
        rig.vioses["vios2"].kill()
        await rig.until(lambda: rig.health()["disk2"] == "stale")
        written = rig.write(5, 7)
        rig.events.gate.set()
        await rig.until(lambda: written == [0])
        assert rig.events.stored == {"disk1": IN_SYNC, "disk2": STALE}
        rig.restart("vios2")
        await retiring
        assert rig.page("disk2", 5) == 7

    with_mirror(scenario)


def test_reads_and_writes_in_flight_on_a_retired_replica_are_done_by_the_others() -> None:
    async def scenario(rig: MirrorRig) -> None:
        await rig.written(5, 1)
        rig.add("disk3")
        await rig.in_sync()
        retiring = asyncio.create_task(rig.volume.retire("disk1"))
        rig.vioses["vios1"].hang()
        written, read = rig.write(6, 2), rig.read(5)
        await retiring
        await rig.until(lambda: (written, read) == ([0], [1]))

    with_mirror(scenario)


def test_a_volume_of_one_replica_becomes_a_mirror_in_the_middle_of_its_writes() -> None:
    async def main() -> None:
        rig = MirrorRig(count=1)
        plain = rig.plain()
        await plain.open(5)
        results: list[list[int]] = [[] for _ in range(PAGES)]
        for page in range(PAGES):
            plain.write(page * PAGE, memoryview(bytes([page]) * PAGE), results[page].append)
        rig.vioses["vios1"].hang()
        plain.write(0, memoryview(bytes([99]) * PAGE), results[0].append)
        rig.volume.adopt(plain)
        rig.add("disk2")
        assert rig.volume.failovers is plain.failovers
        await asyncio.sleep(0.2)
        rig.vioses["vios1"].resume()
        await rig.in_sync()
        await rig.until(lambda: results == [[0, 0], *([0] for _ in range(1, PAGES))])
        await rig.volume.retire("disk1")
        assert [rig.page("disk2", page) for page in range(PAGES)] == [99, *range(1, PAGES)]
        assert rig.volume.replicas == ("disk2",)
        rig.vioses["vios2"].kill()
        written = rig.write(3, 8)
        await asyncio.sleep(3)
        assert written == []
        rig.restart("vios2")
        await rig.until(lambda: written == [0] and rig.page("disk2", 3) == 8)
        await rig.volume.abandon()

    run_simulated(main)


def test_a_read_begun_before_there_was_a_mirror_is_done_by_another_replica() -> None:
    async def main() -> None:
        rig = MirrorRig(count=1)
        plain = rig.plain()
        await plain.open(5)
        written: list[int] = []
        plain.write(5 * PAGE, memoryview(bytes([7]) * PAGE), written.append)
        await rig.until(lambda: written == [0])
        vios = rig.vioses["vios1"]
        vios.hang()
        answers: list[tuple[int, int]] = []
        plain.read(5 * PAGE, PAGE, lambda error, found: answers.append((error, found[0] if found else -1)))
        vios.backlog.clear()  # its answer never comes
        vios.resume()
        rig.volume.adopt(plain)
        rig.add("disk2")
        await rig.in_sync()
        await rig.volume.retire("disk1")
        await rig.until(lambda: bool(answers))
        assert answers == [(0, 7)]
        await rig.volume.abandon()

    run_simulated(main)


def test_what_may_be_recorded_is_recorded_anew_before_a_write_goes_by_it() -> None:
    async def main() -> None:
        rig = MirrorRig(stored={"disk1": IN_SYNC, "disk2": STALE}, unsure={"disk2"}, recover=True)
        rig.vioses["vios2"].kill()
        rig.events.reachable = False
        await rig.volume.open(5)
        written = rig.write(5, 1)
        await asyncio.sleep(3)
        assert written == []
        rig.events.reachable = True
        await rig.until(lambda: written == [0])
        assert rig.events.stored["disk2"] is STALE
        await rig.volume.abandon()

    run_simulated(main)


def test_a_full_device_is_left_for_one_with_room() -> None:
    async def main() -> None:
        rig = MirrorRig(count=1)
        plain = rig.plain()
        await plain.open(5)
        rig.vioses["vios1"].write_error = lambda offset: errno.ENOSPC if offset else 0
        result: list[int] = []
        plain.write(5 * PAGE, memoryview(bytes([5]) * PAGE), result.append)
        await rig.until(lambda: plain.full)
        rig.volume.adopt(plain)
        rig.add("disk2")
        await rig.until(lambda: result == [0])
        assert rig.page("disk2", 5) == 5
        await rig.volume.retire("disk1")
        await rig.volume.abandon()

    run_simulated(main)


def test_a_client_that_is_recovered_goes_on_with_the_copy_to_a_new_replica() -> None:
    async def main() -> None:
        store = MemoryDirtyStore(PAGES)
        first = MirrorRig(store=store)
        await first.volume.open(5)
        for page in range(PAGES):
            await first.written(page, page)
        first.add("disk3")
        stored = first.events.stored
        kept = MemoryDirtyStore(PAGES)
        kept.dirty_map("disk3")[:] = store.dirty_map("disk3")
        await first.volume.abandon()
        again = MirrorRig(3, disks=first.disks, stored=stored, store=kept, recover=True, epoch=2)
        assert again.dirty("disk3") == PAGES
        await again.volume.open(5)
        await again.in_sync()
        assert [again.page("disk3", page) for page in range(PAGES)] == list(range(PAGES))
        await again.volume.abandon()

    run_simulated(main)
