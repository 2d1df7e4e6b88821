from __future__ import annotations

import errno
from collections.abc import Callable

from farpage.blockio import ReadDone
from farpage.volume.direct import FIRST_PAUSE_SECONDS
from tests.support.simulated_loop import run_simulated
from tests.unit.volume.model import PAGE, Rig


class LentDisk:
    """The storage of a rig's VIOSes, as they lend it."""

    def __init__(self, rig: Rig) -> None:
        self._rig = rig
        self.reads = 0
        self.error = 0
        self.hangs = False
        self.held: list[Callable[[], None]] = []
        self.closed = 0

    place: tuple[int, int] | None = None

    def read(self, offset: int, length: int, done: ReadDone) -> bool:
        self.reads += 1

        def answer() -> None:
            content = memoryview(bytes(self._rig.disk.content[offset : offset + length]))
            done(self.error, None if self.error else content)

        self.held.append(answer)
        return True

    def push(self) -> None:
        if not self.hangs:
            self.resume()

    def resume(self) -> None:
        """Answer everything."""
        self.hangs = False
        held, self.held = self.held, []
        for answer in held:
            answer()

    def close(self) -> None:
        self.closed += 1


async def opened(paths: int = 2) -> tuple[Rig, LentDisk]:
    rig = Rig(paths)
    disk = rig.lends = LentDisk(rig)
    await rig.volume.open(5.0)
    if paths > 1:
        await rig.until(lambda: "standby" in rig.states().values())
    return rig, disk


def served(rig: Rig) -> int:
    """Commands that wait for VIOSes."""
    return sum(path.in_flight for path in rig.volume.status())


def test_a_read_goes_past_the_server_that_has_lent_the_storage() -> None:
    async def test() -> None:
        rig, disk = await opened()
        rig.disk.content[0] = 7
        found = rig.read(0)
        assert not found
        rig.volume.push()
        assert found == [7]
        assert disk.reads == 1
        assert [(path.direct, path.direct_reads) for path in rig.volume.status()] == [(True, 1), (True, 0)]
        await rig.volume.close()
        assert disk.closed == 2

    run_simulated(test)


def test_reads_go_on_while_no_server_is_there() -> None:
    async def test() -> None:
        rig, _ = await opened()
        for vios in rig.vioses.values():
            vios.kill()
        await rig.until(lambda: set(rig.states().values()) == {"failed"})
        rig.disk.content[PAGE] = 8
        found = rig.read(1)
        rig.volume.push()
        assert found == [8]
        await rig.volume.abandon()

    run_simulated(test)


def test_a_read_that_fails_is_served_and_so_are_those_after_it_for_a_while() -> None:
    async def test() -> None:
        rig, disk = await opened(1)
        disk.error = errno.EIO
        rig.disk.content[0] = 7
        found = rig.read(0)
        rig.volume.push()
        await rig.until(lambda: found == [7])
        disk.error = 0
        again = rig.read(0)
        await rig.until(lambda: again == [7])
        (status,) = rig.volume.status()
        assert (disk.reads, status.direct_reads, status.direct_failures) == (1, 0, 1)
        await rig.until(lambda: _tried_again(rig, disk), FIRST_PAUSE_SECONDS * 2)
        await rig.volume.abandon()

    run_simulated(test)


def _tried_again(rig: Rig, disk: LentDisk) -> bool:
    rig.read(0)
    rig.volume.push()
    return disk.reads == 2


def test_a_late_read_is_served_and_its_answer_dropped() -> None:
    async def test() -> None:
        rig, disk = await opened(1)
        disk.hangs = True
        rig.disk.content[0] = 7
        found = rig.read(0)
        rig.volume.push()
        await rig.until(lambda: found == [7], 0.5)
        more = rig.read(0)  # while that one hangs all are served
        await rig.until(lambda: more == [7], 0.5)
        assert disk.reads == 1
        disk.resume()
        assert found == [7]
        assert _tried_again(rig, disk)
        await rig.volume.abandon()

    run_simulated(test)


def test_the_late_answer_counts_while_no_server_gives_one() -> None:
    async def test() -> None:
        rig, disk = await opened(1)
        disk.hangs = True
        rig.vioses["vios1"].hang()
        rig.disk.content[0] = 7
        found = rig.read(0)
        rig.volume.push()
        await rig.until(lambda: served(rig) == 1)
        disk.resume()
        assert found == [7]
        rig.vioses["vios1"].resume()
        await rig.volume.close()
        assert found == [7]

    run_simulated(test)


def test_nothing_is_read_past_the_servers_once_another_owner_is_known() -> None:
    async def test() -> None:
        rig, disk = await opened(1)
        disk.hangs = True
        errors: list[int] = []
        for _ in range(2):
            rig.volume.read(0, PAGE, lambda error, _: errors.append(error))
            rig.volume.push()
            rig.volume.ownership.fence("another owner has the volume")
        disk.resume()
        assert not errors
        assert (disk.reads, disk.closed) == (1, 1)
        await rig.volume.abandon()

    run_simulated(test)


def test_dropping_a_volume_ends_its_direct_reads_at_once() -> None:
    async def test() -> None:
        rig, disk = await opened(1)
        disk.hangs = True
        errors: list[int] = []
        rig.volume.read(0, PAGE, lambda error, _: errors.append(error))
        rig.volume.push()
        rig.volume.drop("lost")
        assert errors == [errno.ECANCELED]
        disk.resume()
        assert errors == [errno.ECANCELED]
        await rig.volume.abandon()

    run_simulated(test)


def test_what_one_replica_holds_is_always_asked_of_its_server() -> None:
    async def test() -> None:
        rig, disk = await opened(1)
        errors: list[int] = []
        rig.volume.read_replica("disk-1", 0, PAGE, lambda error, _: errors.append(error))
        rig.volume.push()
        await rig.until(lambda: errors == [0])
        assert disk.reads == 0
        await rig.volume.abandon()

    run_simulated(test)
