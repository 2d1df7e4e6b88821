"""A client over a real mirror of two replicas, each behind its own VIOS, in simulated time."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from farpage.pager.scrub import Scrub
from farpage.pager.table import PAGE_BYTES
from tests.support.paging import ModelClient, content_of
from tests.support.simulated_loop import run_simulated
from tests.unit.volume.mirror_model import PAGES, MirrorRig

PAGE = 3


def with_client(scenario: Callable[[MirrorRig, ModelClient], Awaitable[None]]) -> None:
    """Run a scenario with a client whose first pages are on both replicas."""

    async def main() -> None:
        rig = MirrorRig()
        await rig.volume.open(5)
        await rig.in_sync()
        client = ModelClient(PAGES, PAGES - 1, paged_to=rig.volume)
        for page in range(PAGES - 1):
            assert client.write(page)
        client.eviction.wake()
        await rig.until(lambda: client.states(*range(16)) == ["on_device"] * 16)
        await scenario(rig, client)
        client.close()
        await rig.volume.abandon()

    run_simulated(main)


def spoil(rig: MirrorRig, disk: str, page: int) -> None:
    rig.disks[disk].content[page * PAGE_BYTES + 100] ^= 0xFF


def on(rig: MirrorRig, disk: str, page: int) -> bytes:
    return bytes(rig.disks[disk].content[page * PAGE_BYTES : (page + 1) * PAGE_BYTES])


async def comes_in(rig: MirrorRig, client: ModelClient, page: int) -> None:
    client.read(page)
    await rig.until(lambda: client.states(page) == ["clean"])
    assert client.read(page) == content_of(page)


def test_a_page_changed_on_one_disk_is_right_on_both_after_it_came_in_or_after_a_scrub() -> None:
    async def scenario(rig: MirrorRig, client: ModelClient) -> None:
        spoil(rig, "disk1", PAGE)
        spoil(rig, "disk2", PAGE + 1)
        for page in (PAGE, PAGE + 1):
            await comes_in(rig, client, page)
        # One that came from the right disk has not been noticed to be wrong on the other.
        scrub = Scrub(client.space, client.faults, 1 << 30)
        await rig.until(lambda: not scrub.running)
        assert scrub.progress.lost_pages == 0
        for disk in rig.disks:
            assert on(rig, disk, PAGE) == content_of(PAGE)
            assert on(rig, disk, PAGE + 1) == content_of(PAGE + 1)
        assert client.space.counters.repaired_pages == 2
        assert client.space.counters.poisoned_pages == 0

    with_client(scenario)


def test_a_page_changed_on_both_disks_is_poisoned() -> None:
    async def scenario(rig: MirrorRig, client: ModelClient) -> None:
        for disk in rig.disks:
            spoil(rig, disk, PAGE)
        client.read(PAGE)
        await rig.until(lambda: client.states(PAGE) == ["poisoned"])
        assert client.memory.poisoned == {PAGE}

    with_client(scenario)


def test_with_one_replica_lost_a_page_that_is_wrong_on_the_other_is_not_used() -> None:
    async def scenario(rig: MirrorRig, client: ModelClient) -> None:
        rig.vioses["vios1"].kill()
        await rig.until(lambda: rig.health()["disk1"] != "in_sync")
        spoil(rig, "disk2", PAGE)
        client.read(PAGE)
        await rig.until(lambda: client.states(PAGE) == ["poisoned"])
        await comes_in(rig, client, PAGE + 1)

    with_client(scenario)
