"""A running volume goes over to another device that gets at the same content, in simulated time."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from farpage.device.claim import Claim
from farpage.volume.connector import Endpoint
from farpage.volume.errors import NoPath
from farpage.volume.lease import MARGIN
from tests.support.simulated_loop import run_simulated
from tests.unit.volume.model import LEASE_SECONDS, PAGE, ModelVios, Rig

PAGES = 16


class RelayVios(ModelVios):
    """A VIOS with a volume on its way: it works through the VIOS of the old device, in that one's order."""

    def __init__(self, name: str, old: ModelVios) -> None:
        super().__init__(name, old.disk)
        self.old = old
        self.present = False
        """What is asked for is there: nothing has to be relayed."""

    def claim(self, claim: Claim) -> None:
        super().claim(claim)
        # Opened for the owner over the relay: who is older there is cut off.
        self.old.claim(claim)

    def do(self, work: Callable[[], None]) -> None:
        if self.hung or self.present:
            super().do(work)
        else:
            self.old.do(work)


class MovingRig(Rig):
    """Two VIOS of the old device and one of the new one, which gets at the content through `vios1`."""

    def __init__(self, paths: int = 2, *, had_owner: bool = False, leases: bool = False) -> None:
        super().__init__(paths, had_owner=had_owner, leases=leases)
        there = self.vioses["vios3"] = RelayVios("vios3", self.vioses["vios1"])
        there.leases = self.vioses["vios1"].leases

    async def go(self) -> None:
        endpoint = Endpoint("vios3", self.endpoint("vios3").address, "new", source="disk-1")
        await self.volume.go_over([endpoint], "disk-2", "new", fences="vios1")

    async def go_back(self) -> None:
        # What the new device's VIOS may still write to the old one comes over vios1.
        await self.volume.go_over([self.endpoint("vios1")], "disk-1", "disk", fences="vios3")
        await self.volume.go_over([self.endpoint("vios1"), self.endpoint("vios2")], "disk-1", "disk")


def with_rig(test: Callable[[MovingRig], Awaitable[None]]) -> None:
    async def main() -> None:
        rig = MovingRig()
        await rig.volume.open(5.0)
        await rig.until(lambda: "standby" in rig.states().values())
        await test(rig)
        await rig.volume.abandon()

    run_simulated(main)


def test_it_is_opened_there_under_a_raised_epoch_and_used_nowhere_else() -> None:
    async def test(rig: MovingRig) -> None:
        await rig.go()
        assert rig.states() == {"vios3": "active"}
        assert rig.vioses["vios3"].opened == [2]
        assert rig.vioses["vios1"].connections == rig.vioses["vios2"].connections == []
        assert (rig.volume.device, rig.volume.device_name) == ("disk-2", "new")
        assert rig.events.epochs == [2]
        written = rig.write(1, 7)
        await rig.until(lambda: written == [0])
        assert rig.disk.content[PAGE] == 7

    with_rig(test)


def test_what_is_in_flight_is_repeated_there_and_nothing_is_held_back() -> None:
    async def test(rig: MovingRig) -> None:
        rig.vioses["vios1"].hang()
        written, read = rig.write(1, 7), rig.read(2)
        await rig.go()
        assert (rig.states(), rig.volume.held_bytes) == ({"vios3": "active"}, 0)
        assert written == []
        rig.vioses["vios1"].resume()
        await rig.until(lambda: (written, read) == ([0], [0]))

    with_rig(test)


def test_one_that_goes_over_before_it_has_opened_anything_writes_behind_what_an_older_owner_sent() -> None:
    async def main() -> None:
        rig = MovingRig(paths=1, had_owner=True)
        written = rig.write(1, 7)
        assert (written, rig.volume.predecessors_gone) == ([], False)
        await rig.go()
        await rig.until(lambda: written == [0])
        assert rig.volume.predecessors_gone
        await rig.volume.abandon()

    run_simulated(main)


def test_one_that_goes_over_before_it_has_opened_anything_waits_for_leases_at_the_sources_other_vios() -> (
    None
):
    async def main() -> None:
        rig = MovingRig(paths=2, had_owner=True, leases=True)
        loop = asyncio.get_running_loop()
        written, hung = rig.write(1, 7), rig.vioses["vios1"]
        hung.hang()  # what stands for the relay
        await rig.go()
        await asyncio.sleep(2 * LEASE_SECONDS)
        assert (written, rig.volume.predecessors_gone) == ([], False)
        hung.resume()
        began = loop.time()
        await rig.until(lambda: written == [0])
        assert LEASE_SECONDS <= loop.time() - began <= LEASE_SECONDS * (1 + MARGIN) + 0.2
        await rig.volume.abandon()
        rig.leases.close()

    run_simulated(main)


def test_a_volume_that_is_on_its_way_when_it_is_opened_waits_for_those_leases_too() -> None:
    async def main() -> None:
        rig = MovingRig(leases=True)
        there = Endpoint("vios3", rig.endpoint("vios3").address, "new", "disk-1", others=(("vios2", 5.0),))
        rig.volume = rig.made([there], device="disk-2", had_owner=True)
        hung = rig.vioses["vios1"]
        hung.hang()  # what stands for the relay
        await rig.volume.open(5.0)
        written, read = rig.write(1, 7), rig.read(2)
        await asyncio.sleep(2 * LEASE_SECONDS)
        assert (written, rig.volume.predecessors_gone) == ([], False)
        hung.resume()
        await rig.until(lambda: read == [0])
        await asyncio.sleep(LEASE_SECONDS)
        assert written == []
        await rig.until(lambda: written == [0], 1.0)
        await rig.volume.abandon()
        rig.leases.close()

    run_simulated(main)


def test_what_may_arrive_late_at_the_source_does_not_matter_once_the_target_has_everything() -> None:
    async def main() -> None:
        rig = MovingRig(paths=2, had_owner=True)
        written = rig.write(1, 7)
        await rig.go()
        await asyncio.sleep(2 * LEASE_SECONDS)
        assert (written, rig.volume.predecessors_gone) == ([], False)
        await rig.volume.go_over([Endpoint("vios3", rig.endpoint("vios3").address, "new")], "disk-2", "new")
        await rig.until(lambda: written == [0])
        await rig.volume.abandon()

    run_simulated(main)


def test_a_planned_switch_is_no_loss() -> None:
    async def test(rig: MovingRig) -> None:
        commands = [rig.write(page, page) for page in range(PAGES)]
        await rig.go()
        await rig.until(lambda: all(command == [0] for command in commands))
        assert rig.events.alarms == []
        (record,) = rig.volume.failovers.records
        assert (record.from_vios, record.to_vios) == ("vios1", "vios3")
        assert record.reason == "going over to another device"
        assert record.active_at_seconds is not None

    with_rig(test)


def test_writes_of_a_server_that_failed_before_are_repeated_too() -> None:
    async def test(rig: MovingRig) -> None:
        rig.vioses["vios1"].hang()
        written = rig.write(1, 7)
        await rig.until(lambda: rig.states()["vios2"] == "active")
        assert rig.volume.held_bytes == PAGE
        fenced: list[bool] = []
        rig.volume.on_fenced_server = lambda: fenced.append(True)
        going = asyncio.create_task(rig.go())
        await asyncio.sleep(0.1)
        rig.vioses["vios1"].resume()
        await going
        await rig.until(lambda: written == [0])
        assert (rig.volume.held_bytes, fenced) == (0, [True])

    with_rig(test)


def test_what_a_vios_has_that_is_not_fenced_by_it_finishes_or_is_held_back() -> None:
    async def test(rig: MovingRig) -> None:
        rig.vioses["vios1"].kill()
        rig.vioses["vios1"].up = True
        await rig.until(lambda: rig.is_in({"vios1": "standby", "vios2": "active"}))
        written = rig.write(1, 7)
        await rig.go()
        assert (written, rig.volume.held_bytes) == ([0], 0)
        await rig.go_back()
        await rig.until(lambda: rig.states()["vios2"] == "standby")
        rig.vioses["vios1"].kill()
        rig.vioses["vios1"].up = True
        await rig.until(lambda: rig.is_in({"vios1": "standby", "vios2": "active"}))
        rig.vioses["vios2"].hang()
        late, read = rig.write(2, 8), rig.read(3)
        await rig.go()
        await rig.until(lambda: read == [0])
        assert (late, rig.volume.held_bytes) == ([], PAGE)
        assert not rig.volume.ready
        after = rig.write(4, 9)
        await rig.until(lambda: after == [0])
        await rig.go_back()  # connects to it anew, under an epoch that drains it
        rig.vioses["vios2"].resume()
        await rig.until(lambda: late == [0])
        assert rig.volume.held_bytes == 0

    with_rig(test)


def test_without_a_way_there_it_goes_on_as_before() -> None:
    async def test(rig: MovingRig) -> None:
        rig.vioses["vios3"].kill()
        with pytest.raises(NoPath, match="vios3: "):
            await rig.go()
        assert rig.states() == {"vios1": "active", "vios2": "standby"}
        assert rig.volume.device == "disk-1"
        # A path that is lost later takes nothing along.
        rig.vioses["vios1"].kill()
        await rig.until(lambda: rig.states()["vios2"] == "active")

    with_rig(test)


def test_a_volume_without_any_path_goes_over() -> None:
    async def test(rig: MovingRig) -> None:
        for name in ("vios1", "vios2"):
            rig.vioses[name].kill()
        read = rig.read(3)
        await rig.until(lambda: rig.is_in({"vios1": "failed", "vios2": "failed"}))
        await rig.go()
        await rig.until(lambda: read == [0])

    with_rig(test)


def test_it_comes_back_as_it_went() -> None:
    async def test(rig: MovingRig) -> None:
        await rig.go()
        commands = [rig.write(page, page + 1) for page in range(PAGES)]
        await rig.go_back()
        await rig.until(lambda: all(command == [0] for command in commands))
        await rig.until(lambda: rig.is_in({"vios1": "active", "vios2": "standby"}))
        assert rig.vioses["vios1"].opened[-1] == 3

    with_rig(test)


def test_more_vios_of_the_same_device_are_used_beside_the_active_one() -> None:
    async def test(rig: MovingRig) -> None:
        await rig.go()
        rig.vioses["vios4"] = ModelVios("vios4", rig.disk)
        ends = [Endpoint(vios, rig.endpoint(vios).address, "new") for vios in ("vios3", "vios4")]
        await rig.volume.go_over(ends, "disk-2", "new")
        assert rig.states()["vios3"] == "active"
        await rig.until(lambda: rig.is_in({"vios3": "active", "vios4": "standby"}))
        assert [path.endpoint.source for path in rig.volume.status()] == ["", ""]
        assert rig.vioses["vios3"].opened == [2]

    with_rig(test)


def test_a_path_whose_pages_may_have_to_come_from_elsewhere_is_not_probed() -> None:
    async def test(rig: MovingRig) -> None:
        await rig.go()
        rig.vioses["vios1"].hang()  # what stands for the relay
        await asyncio.sleep(20)
        assert rig.states() == {"vios3": "active"}
        rig.vioses["vios3"].kill()
        rig.vioses["vios3"].up = True
        await rig.until(lambda: rig.is_in({"vios3": "active"}))

    with_rig(test)


def test_one_alarm_tells_that_some_accesses_wait_for_as_long_as_they_do() -> None:
    async def test(rig: MovingRig) -> None:
        await rig.go()
        here, there = rig.vioses["vios3"], rig.vioses["vios1"]
        there.hang()  # what stands for the relay
        waits = rig.read(1)
        assert isinstance(here, RelayVios)
        await asyncio.sleep(1.5)
        here.present = True
        for _ in range(20):
            read = rig.read(2)
            await asyncio.sleep(0.3)
            assert read == [0]
        assert (rig.states(), rig.events.alarms) == ({"vios3": "suspect"}, ["path_suspect"])
        there.resume()
        await rig.until(lambda: waits == [0])
        read = rig.read(2)
        await rig.until(lambda: rig.states() == {"vios3": "active"})

    with_rig(test)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 32))
def test_no_write_is_lost_or_comes_back_whenever_it_goes_over(seed: int) -> None:
    chance = random.Random(seed)

    async def test(rig: MovingRig) -> None:
        newest, acknowledged, busy = [0] * PAGES, [0] * PAGES, [False] * PAGES
        hung = rig.vioses["vios1"]

        def write(page: int) -> None:
            busy[page], newest[page] = True, newest[page] % 255 + 1
            value = newest[page]

            def done(error: int) -> None:
                assert error == 0
                busy[page], acknowledged[page] = False, value

            rig.volume.write(page * PAGE, memoryview(bytes([value]) * PAGE), done)

        async def moves() -> None:
            for _ in range(6):
                await asyncio.sleep(chance.random() * 3)
                try:
                    await (rig.go() if rig.volume.device == "disk-1" else rig.go_back())
                except NoPath:
                    continue

        async def faults() -> None:
            for _ in range(4):
                await asyncio.sleep(chance.random() * 4)
                hung.hang()
                await asyncio.sleep(chance.random() * 2)
                hung.resume()

        running = [asyncio.create_task(moves()), asyncio.create_task(faults())]
        while not all(task.done() for task in running):
            page = chance.randrange(PAGES)
            if not busy[page]:
                write(page)
            await asyncio.sleep(chance.random() * 0.02)
        for task in running:
            task.result()
        await rig.until(lambda: not any(busy))
        await asyncio.sleep(10)
        reads = [rig.read(page) for page in range(PAGES)]
        await rig.until(lambda: all(reads))
        assert [read[0] for read in reads] == acknowledged
        assert [rig.disk.content[page * PAGE] for page in range(PAGES)] == acknowledged

    with_rig(test)
