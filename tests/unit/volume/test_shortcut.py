"""What of a volume's storage is told to who reads it past the volume."""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable

import numpy as np
import pytest

from farpage.blockio import ReadDone
from farpage.volume.command import Command
from farpage.volume.direct import FIRST_PAUSE_SECONDS
from farpage.volume.dirty import DirtyMap
from farpage.volume.mirrorshortcut import LATE_SECONDS
from farpage.volume.pace import Pace
from farpage.volume.paged import PagedVolume
from farpage.volume.replica import Mode, Replica
from farpage.volume.replicas import Replicas
from farpage.volume.shortcut import Place, Shortcut
from farpage.volume.writing import Writes
from tests.support.simulated_loop import run_simulated
from tests.unit.volume.mirror_model import PAGES, MirrorRig
from tests.unit.volume.model import PAGE, Rig


class Lent:
    """Storage that is read past the volume alone; `place` is what a file's is."""

    def __init__(self, descriptor: int, origin_bytes: int = 0) -> None:
        self.place: tuple[int, int] | None = (descriptor, origin_bytes)
        self.takes_reads = False
        self.closed = False
        self.held: list[ReadDone] = []

    def read(self, offset: int, length: int, done: ReadDone) -> bool:
        if self.takes_reads:
            self.held.append(done)
        return self.takes_reads

    def push(self) -> None:
        """Everything hangs."""

    def close(self) -> None:
        self.closed = True


class Follower:
    """Who reads past a volume: what it was told, and where it read then."""

    def __init__(self, volume: PagedVolume) -> None:
        assert volume.shortcut is not None
        self.shortcut: Shortcut = volume.shortcut
        self.told: list[bool] = []
        self.reads_from = self.shortcut.place
        self.shortcut.on_change = self._changed

    def _changed(self, useless: bool) -> None:
        self.told.append(useless)
        self.reads_from = self.shortcut.place

    @property
    def descriptor(self) -> int | None:
        """The descriptor that it reads; None for none."""
        assert self.reads_from == self.shortcut.place, "it was not told of a change"
        return self.reads_from.descriptor if self.reads_from else None


# A volume of one replica


def with_volume(scenario: Callable[[Rig, Follower], Awaitable[None]], paths: int = 1) -> None:
    """Run a scenario on a volume whose storage is lent, as descriptor 77 from 2 MiB on."""

    async def main() -> None:
        rig = Rig(paths)
        rig.lends = Lent(77, 2 << 20)
        follower = Follower(rig.volume)
        assert follower.descriptor is None
        await rig.volume.open(5.0)
        await scenario(rig, follower)
        await rig.volume.abandon()
        assert follower.descriptor is None

    run_simulated(main)


def test_the_place_is_that_of_the_storage_that_was_lent() -> None:
    async def scenario(_rig: Rig, follower: Follower) -> None:
        assert follower.told == [False]
        assert follower.reads_from == Place(77, 2 << 20, 0.25)

    with_volume(scenario)


def test_there_is_no_place_while_nothing_is_lent() -> None:
    async def main() -> None:
        rig = Rig(1)
        await rig.volume.open(5.0)
        assert Follower(rig.volume).descriptor is None
        await rig.volume.abandon()

    run_simulated(main)


def test_what_was_read_past_it_is_counted_on_the_path() -> None:
    async def scenario(rig: Rig, follower: Follower) -> None:
        follower.shortcut.answered(3, 0.001)
        follower.shortcut.answered(4, 0.001)
        (status,) = rig.volume.status()
        assert (status.direct_reads, status.direct_failures) == (7, 0)
        assert follower.told == [False]

    with_volume(scenario)


def test_after_a_failed_read_there_is_no_place_for_a_while() -> None:
    async def scenario(rig: Rig, follower: Follower) -> None:
        loop = asyncio.get_running_loop()
        follower.shortcut.failed()
        follower.shortcut.failed()
        (status,) = rig.volume.status()
        assert (status.direct_reads, status.direct_failures) == (0, 2)
        assert (follower.descriptor, follower.told) == (None, [False, False])
        began = loop.time()
        await rig.until(lambda: follower.descriptor == 77)
        assert loop.time() - began == pytest.approx(FIRST_PAUSE_SECONDS, abs=0.02)
        assert follower.told == [False, False, False]
        follower.shortcut.failed()
        began = loop.time()
        await rig.until(lambda: follower.descriptor == 77)
        assert loop.time() - began == pytest.approx(FIRST_PAUSE_SECONDS * 2, abs=0.02)

    with_volume(scenario)


def test_there_is_no_place_while_a_read_of_the_volumes_own_hangs() -> None:
    async def scenario(rig: Rig, follower: Follower) -> None:
        lent = rig.lends
        assert isinstance(lent, Lent)
        lent.takes_reads = True
        found = rig.read(0)
        await rig.until(lambda: bool(found))
        assert (follower.descriptor, follower.told) == (None, [False, False])
        lent.held[0](errno.EIO, None)
        assert follower.descriptor == 77
        assert follower.told == [False, False, False]

    with_volume(scenario)


def test_who_is_replaced_by_another_owner_is_told_that_reads_are_of_no_use() -> None:
    async def scenario(rig: Rig, follower: Follower) -> None:
        rig.volume.ownership.fence("another owner has the volume")
        assert follower.descriptor is None
        assert follower.told[-1]

    with_volume(scenario)


def test_when_a_volume_is_dropped_reads_are_of_no_use_until_it_is_lent_again() -> None:
    async def scenario(rig: Rig, follower: Follower) -> None:
        lent = rig.lends
        assert isinstance(lent, Lent)
        rig.lends = Lent(78)
        rig.volume.drop("lost")
        assert follower.descriptor is None
        assert follower.told[-1]
        await rig.until(lambda: follower.descriptor == 78)
        assert not follower.told[-1]
        assert lent.closed

    with_volume(scenario)


def test_reads_go_on_when_another_path_takes_over() -> None:
    async def scenario(rig: Rig, follower: Follower) -> None:
        await rig.until(lambda: "standby" in rig.states().values())
        rig.vioses["vios1"].kill()
        await rig.until(lambda: rig.states()["vios2"] == "active")
        assert follower.descriptor == 77
        assert True not in follower.told

    with_volume(scenario, paths=2)


def test_a_volume_that_is_closed_tells_that_there_is_no_place_any_more() -> None:
    async def scenario(rig: Rig, follower: Follower) -> None:
        await rig.volume.close()
        assert follower.descriptor is None
        assert follower.told[1]

    with_volume(scenario)


# A mirror


def with_mirror(scenario: Callable[[MirrorRig, Follower], Awaitable[None]]) -> None:
    """Run a scenario on a mirror of two replicas, whose VIOSes lend descriptors 71 and 72."""

    async def main() -> None:
        rig = MirrorRig()
        rig.lends = {"vios1": Lent(71), "vios2": Lent(72)}
        follower = Follower(rig.volume)
        await rig.volume.open(5.0)
        await scenario(rig, follower)
        await rig.volume.abandon()
        assert follower.descriptor is None
        assert follower.told[-1]

    run_simulated(main)


def test_the_place_of_a_mirror_is_that_of_the_replica_that_is_read() -> None:
    async def scenario(_rig: MirrorRig, follower: Follower) -> None:
        assert follower.reads_from == Place(71, 0, LATE_SECONDS)
        assert True not in follower.told

    with_mirror(scenario)


def test_the_place_of_a_mirror_follows_when_another_replica_is_clearly_faster() -> None:
    async def scenario(rig: MirrorRig, follower: Follower) -> None:
        for _ in range(100):
            follower.shortcut.answered(1, 0.009)
        await rig.until(lambda: follower.descriptor == 72)
        assert True not in follower.told
        follower.shortcut.answered(5, 0.0001)
        assert [status.direct_reads for status in rig.volume.status()] == [100, 5]

    with_mirror(scenario)


def test_a_replica_that_lets_reads_wait_is_read_no_more() -> None:
    async def scenario(rig: MirrorRig, follower: Follower) -> None:
        for _ in range(200):
            follower.shortcut.failed()
        follower.shortcut.answered(1, 0.009)
        await rig.until(lambda: follower.descriptor == 72)
        assert [status.direct_failures for status in rig.volume.status()] == [0, 0]

    with_mirror(scenario)


def test_when_the_replica_that_is_read_is_lost_reads_are_of_no_use_and_go_to_another() -> None:
    async def scenario(rig: MirrorRig, follower: Follower) -> None:
        rig.vioses["vios1"].hang()
        rig.write(3, 7)
        await rig.until(lambda: rig.health()["disk1"] == "stale")
        assert follower.descriptor == 72
        assert True in follower.told

    with_mirror(scenario)


def test_the_loss_of_another_replica_does_not_matter_to_who_reads() -> None:
    async def scenario(rig: MirrorRig, follower: Follower) -> None:
        told = list(follower.told)
        rig.vioses["vios2"].kill()
        await rig.written(3, 7)
        assert rig.health()["disk2"] == "stale"
        assert (follower.descriptor, follower.told) == (71, told)

    with_mirror(scenario)


def test_a_replica_is_not_read_before_it_has_everything_again() -> None:
    async def scenario(rig: MirrorRig, follower: Follower) -> None:
        rig.vioses["vios1"].kill()
        await rig.written(3, 7)
        rig.events.reachable = False
        rig.vioses["vios2"].kill()
        rig.lends["vios1"] = Lent(73)
        rig.restart("vios1")
        await asyncio.sleep(5)
        assert rig.health()["disk1"] != "in_sync"
        assert follower.descriptor == 72
        rig.lends["vios2"] = Lent(74)
        rig.restart("vios2")
        await rig.until(lambda: follower.descriptor in (73, 74))
        rig.events.reachable = True
        await rig.in_sync()

    with_mirror(scenario)


def test_a_pause_of_the_replica_that_is_read_is_told() -> None:
    async def scenario(rig: MirrorRig, follower: Follower) -> None:
        lent = rig.lends["vios1"]
        assert isinstance(lent, Lent)
        lent.takes_reads = True
        found = rig.read(0)
        await rig.until(lambda: follower.descriptor is None)
        assert True not in follower.told
        await rig.until(lambda: bool(found))
        lent.held[0](errno.EIO, None)
        assert follower.descriptor == 71

    with_mirror(scenario)


def test_a_mirror_that_a_volume_has_become_goes_on_with_its_place() -> None:
    async def main() -> None:
        rig = MirrorRig(count=1)
        rig.lends = {"vios1": Lent(71), "vios2": Lent(72)}
        plain = rig.plain()
        await plain.open(5)
        assert Follower(plain).descriptor == 71
        rig.volume.adopt(plain)
        follower = Follower(rig.volume)
        rig.add("disk2")
        await rig.in_sync()
        await rig.volume.retire("disk1")
        assert follower.descriptor == 72
        assert True in follower.told
        await rig.volume.abandon()
        assert follower.descriptor is None

    run_simulated(main)


# Several runs in one command


def write_runs(volume: PagedVolume, pages: dict[int, int]) -> list[int]:
    """Write pages, a run each, with one call; returns the list that its error will be put into."""
    result: list[int] = []
    runs = [(page * PAGE, memoryview(bytes([fill]) * PAGE)) for page, fill in pages.items()]
    volume.write_runs(runs, result.append)
    return result


def test_runs_are_one_command_that_is_done_when_all_are_written() -> None:
    async def main() -> None:
        rig = Rig(1)
        await rig.volume.open(5)
        rig.vioses["vios1"].hang()
        result = write_runs(rig.volume, {1: 11, 5: 15, 9: 19})
        rig.volume.push()
        (status,) = rig.volume.status()
        backlog = rig.vioses["vios1"].backlog
        assert (status.in_flight, len(backlog)) == (1, 3)
        backlog.pop(0)()
        backlog.pop(0)()
        assert result == []
        rig.vioses["vios1"].resume()
        assert result == [0]
        assert [rig.disk.content[page * PAGE] for page in (1, 2, 5, 9)] == [11, 0, 15, 19]
        await rig.volume.abandon()

    run_simulated(main)


def test_runs_are_replayed_whole_on_the_next_path() -> None:
    async def main() -> None:
        rig = Rig(2)
        await rig.volume.open(5)
        await rig.until(lambda: rig.is_in({"vios1": "active", "vios2": "standby"}))
        replayed: list[int] = []

        def seen(offset: int) -> int:
            replayed.append(offset // PAGE)
            return 0

        rig.vioses["vios2"].write_error = seen
        rig.vioses["vios1"].hang()
        result = write_runs(rig.volume, {1: 11, 5: 15, 9: 19})
        rig.vioses["vios1"].backlog.pop(0)()
        rig.vioses["vios1"].kill()
        rig.vioses["vios1"].resume()
        rig.vioses["vios1"].up = True  # which shows that it has nothing of them left
        await rig.until(lambda: result == [0])
        assert replayed == [1, 5, 9]
        assert [rig.disk.content[page * PAGE] for page in (1, 2, 5, 9)] == [11, 0, 15, 19]
        await rig.volume.abandon()

    run_simulated(main)


def test_runs_of_which_one_is_refused_are_repeated_whole() -> None:
    async def main() -> None:
        rig = Rig(1)
        await rig.volume.open(5)
        tried: list[int] = []

        def refuses(offset: int) -> int:
            tried.append(offset // PAGE)
            return errno.EIO if len(tried) == 2 else 0

        rig.vioses["vios1"].write_error = refuses
        result = write_runs(rig.volume, {1: 11, 5: 15, 9: 19})
        await rig.until(lambda: result == [0])
        assert tried == [1, 5, 9] * 2
        assert [rig.disk.content[page * PAGE] for page in (1, 2, 5, 9)] == [11, 0, 15, 19]
        await rig.volume.abandon()

    run_simulated(main)


def test_runs_go_to_every_replica_of_a_mirror() -> None:
    async def scenario(rig: MirrorRig, _follower: Follower) -> None:
        rig.vioses["vios2"].hang()
        result = write_runs(rig.volume, {1: 11, 9: 19})
        await rig.until(lambda: rig.page("disk1", 9) == 19)
        assert result == []
        rig.vioses["vios2"].resume()
        await rig.until(lambda: result == [0])
        for disk in rig.disks:
            assert [rig.page(disk, page) for page in (1, 5, 9)] == [11, 0, 19]

    with_mirror(scenario)


def test_what_a_replica_misses_of_runs_is_copied_to_it() -> None:
    async def scenario(rig: MirrorRig, _follower: Follower) -> None:
        rig.vioses["vios1"].kill()
        result = write_runs(rig.volume, {1: 11, 9: 19})
        await rig.until(lambda: result == [0])
        rig.restart("vios1")
        await rig.in_sync()
        assert [rig.page("disk1", page) for page in (1, 5, 9)] == [11, 0, 19]
        assert rig.volume.replica_status()[0].resynced_pages == 2

    with_mirror(scenario)


def test_runs_in_flight_when_a_volume_becomes_a_mirror_are_missed_by_a_new_replica() -> None:
    async def main() -> None:
        rig = MirrorRig(count=1)
        plain = rig.plain()
        await plain.open(5)
        rig.vioses["vios1"].hang()
        result = write_runs(plain, {1: 11, 9: 19})
        rig.volume.adopt(plain)
        rig.add("disk2")
        rig.vioses["vios1"].resume()
        await rig.in_sync()
        assert result == [0]
        assert [rig.page("disk2", page) for page in (1, 5, 9)] == [11, 0, 19]
        await rig.volume.abandon()

    run_simulated(main)


def test_runs_that_a_device_is_too_full_for_are_written_to_one_with_room() -> None:
    async def main() -> None:
        rig = MirrorRig(count=1)
        plain = rig.plain()
        await plain.open(5)
        written: list[int] = []
        plain.write(5 * PAGE, memoryview(bytes([5]) * PAGE), written.append)
        await rig.until(lambda: written == [0])
        rig.vioses["vios1"].write_error = lambda offset: errno.ENOSPC if offset else 0
        result = write_runs(plain, {1: 11, 9: 19})
        await rig.until(lambda: plain.full)
        rig.volume.adopt(plain)
        rig.add("disk2")
        await rig.until(lambda: result == [0])
        assert [rig.page("disk2", page) for page in (1, 5, 9)] == [11, 5, 19]
        await rig.volume.retire("disk1")
        await rig.volume.abandon()

    run_simulated(main)


def adopted_runs() -> tuple[Writes, Replica, DirtyMap, Command]:
    """Pages 1 and 9 that were on their way to the one replica when there was no mirror yet."""
    volume = MirrorRig(count=1).plain()
    replica = Replica("disk1", "disk1", volume, Pace(1.0), Mode.COUNTS, 0.0)
    replicas = Replicas(PAGES * PAGE, None)
    replicas.all.append(replica)
    runs = [(page * PAGE, memoryview(bytes(PAGE))) for page in (1, 9)]
    command = Command(
        lambda _io, _end: None,
        lambda _error, _result: None,
        2 * PAGE,
        mutates=True,
        offset=PAGE,
        span_bytes=9 * PAGE,
        runs=runs,
    )
    writes = Writes(replicas, _never_lost, lambda _replica: None, lambda _device: False)
    writes.adopt(replica, command)
    return writes, replica, replicas.dirty(replica), command


def _never_lost(replica: Replica, reason: str, *, pause: bool = False) -> None:
    raise AssertionError(f"{replica.device} is lost: {reason}, {pause}")


def dirty_pages(dirty: DirtyMap) -> list[int]:
    """Return what a replica misses."""
    return [page for page in range(PAGES) if dirty.any(page, 1)]


def test_a_replica_that_has_runs_after_all_may_lack_the_pages_between_them() -> None:
    async def main() -> None:
        writes, replica, dirty, command = adopted_runs()
        dirty.mark(0, 12)
        replica.become(Mode.RESYNCING, 0.0)
        command.finished(0, None)
        assert dirty_pages(dirty) == [0, *range(2, 9), 10, 11]
        assert not writes

    run_simulated(main)


def test_a_replica_misses_no_more_of_runs_than_their_pages() -> None:
    async def main() -> None:
        writes, replica, dirty, command = adopted_runs()
        wanted = np.zeros(PAGES, np.bool_)
        writes.mark(wanted)
        assert np.flatnonzero(wanted).tolist() == [1, 9]
        replica.become(Mode.AWAY, 0.0)
        command.finished(errno.ECANCELED, None)
        assert dirty_pages(dirty) == [1, 9]
        assert replica.busy == {1, 9}
        writes.release(replica)
        assert replica.busy == set()
        assert not writes

    run_simulated(main)
