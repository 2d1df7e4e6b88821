"""A volume that is copied while its owner uses it, step by step."""

from __future__ import annotations

import errno
from collections.abc import Awaitable, Callable

from farpage.blockio import Allocation, Extent
from tests.support.simulated_loop import run_simulated
from tests.unit.vios.copying.model import ADDRESS, GARBAGE, PAGE, CopyRig


def with_copy(scenario: Callable[[CopyRig], Awaitable[None]]) -> None:
    """Run a scenario; page n of the old device holds 100 + n."""

    async def main() -> None:
        rig = CopyRig()
        for page in range(rig.pages):
            rig.old.content[page * PAGE : (page + 1) * PAGE] = bytes([100 + page]) * PAGE
        await rig.settle()
        await scenario(rig)
        await rig.volume.close()
        await rig.copy.close()

    run_simulated(main)


def test_an_older_copy_never_replaces_a_newer_page() -> None:
    async def scenario(rig: CopyRig) -> None:
        written = rig.write(3, 7)
        assert rig.fill(0, 50, rig.pages) == [0]  # while the write waits for the old device
        assert rig.link is not None
        rig.link.answer()
        assert written == [0]
        assert rig.fill(2, 51, 3) == [0]
        assert [rig.page(rig.new, page) for page in (2, 3, 4)] == [50, 7, 50]
        assert rig.page(rig.old, 3) == 7

    with_copy(scenario)


def test_a_change_is_done_when_both_devices_have_it() -> None:
    async def scenario(rig: CopyRig) -> None:
        assert rig.link is not None
        rig.new.hold = True
        written = rig.write(3, 7)
        rig.link.answer()
        assert written == []
        rig.new.release()
        assert written == [0]
        again = rig.write(3, 8)
        rig.new.release()
        assert again == []
        rig.link.answer()
        assert again == [0]
        assert rig.page(rig.new, 3) == rig.page(rig.old, 3) == 8
        rig.new.hold = False

    with_copy(scenario)


def test_absent_pages_come_over_the_relay_and_are_kept_unless_they_were_changed_meanwhile() -> None:
    async def scenario(rig: CopyRig) -> None:
        assert rig.link is not None
        read = rig.read(2, 3)
        written = rig.write(3, 7)
        rig.link.answer(1)  # the write
        rig.link.answer(0)
        assert written == [0]
        assert read in ([[102, 103, 104]], [[102, 7, 104]])
        assert rig.present() == [2, 3, 4]
        assert rig.read(2, 3) == [[102, 7, 104]]

    with_copy(scenario)


def test_a_read_is_put_together_from_both_places() -> None:
    async def scenario(rig: CopyRig) -> None:
        assert rig.link is not None
        assert rig.fill(4, 104, 2) == [0]
        read = rig.read(3, 4)
        while rig.link.commands:
            rig.link.answer(-1)
        assert read == [[103, 104, 104, 106]]

    with_copy(scenario)


def test_a_failed_change_leaves_the_page_absent_and_nothing_read_before_is_kept() -> None:
    async def scenario(rig: CopyRig) -> None:
        assert rig.link is not None
        rig.new.errors["write"] = errno.ENOSPC
        read, written = rig.read(3), rig.write(3, 7)
        assert written == [errno.ENOSPC]
        rig.new.errors.clear()
        rig.link.answer()
        assert read == [[103]]
        assert rig.present() == []

    with_copy(scenario)


def test_what_needs_the_relay_waits_for_it_and_present_pages_do_not() -> None:
    async def scenario(rig: CopyRig) -> None:
        assert rig.fill(5, 105) == [0]
        rig.lose_relay()
        written, absent = rig.write(5, 8), rig.read(6)
        assert rig.read(5) == [[8]]  # in flight
        assert (written, absent) == ([], [])
        rig.reachable = True
        rig.relay.announce(ADDRESS)
        await rig.settle()
        assert rig.link is not None
        while rig.link.commands:
            rig.link.answer()
        assert (written, absent) == ([0], [[106]])

    with_copy(scenario)


def test_who_is_given_up_waits_for_nothing_and_the_page_is_free() -> None:
    async def scenario(rig: CopyRig) -> None:
        rig.lose_relay()
        written, read = rig.write(5, 8), rig.read(6)
        rig.volume.give_up()
        await rig.settle()
        assert (written, read) == ([errno.ESHUTDOWN], [None])
        assert rig.write(5, 9) == [errno.ESHUTDOWN]
        assert rig.fill(5, 105) == [0]
        assert rig.page(rig.new, 5) == 105

    with_copy(scenario)


def test_presence_is_stored_after_the_data_and_is_what_the_next_process_goes_by() -> None:
    async def scenario(rig: CopyRig) -> None:
        assert rig.fill(1, 101) == [0]
        assert rig.copy.stored_pages == 0
        rig.new.errors["flush"] = errno.EIO
        assert not await rig.copy.store()
        assert rig.store.blocks == {}
        rig.new.errors.clear()
        assert await rig.copy.store()
        assert rig.copy.stored_pages == 1
        assert rig.fill(2, 102) == [0]
        rig.kill()
        rig.start()
        assert rig.present() == [1]
        await rig.settle()

    with_copy(scenario)


def test_the_filler_sees_absent_pages_as_holes_and_reads_nothing() -> None:
    async def scenario(rig: CopyRig) -> None:
        assert rig.fill(1, 101, 2) == [0]
        found: list[object] = []
        rig.fills.extents(0, 4 * PAGE, lambda error, extents: found.append((error, extents)))
        absent = Extent(PAGE, Allocation.HOLE | Allocation.ZERO)
        assert found == [(0, [absent, Extent(2 * PAGE, Allocation.DATA), absent])]
        errors: list[int] = []
        rig.fills.read(0, PAGE, lambda error, _payload: errors.append(error))
        assert errors == [errno.EPERM]

    with_copy(scenario)


def test_before_the_move_has_begun_nothing_becomes_present() -> None:
    async def scenario(rig: CopyRig) -> None:
        rig.copy.recording = False
        assert rig.link is not None
        written, read = rig.write(3, 7), rig.read(4)
        rig.link.answer()
        rig.link.answer()
        assert (written, read) == ([0], [[104]])
        assert rig.fill(5, 105) == [errno.ESHUTDOWN]
        assert rig.present() == []
        assert (rig.page(rig.old, 3), rig.page(rig.new, 3)) == (7, GARBAGE)

    with_copy(scenario)


def test_at_the_end_the_relay_is_dropped_between_two_commands() -> None:
    async def scenario(rig: CopyRig) -> None:
        assert rig.fill(0, 100, rig.pages) == [0]
        written = rig.write(3, 7)
        assert written == []
        rig.copy.finished = True
        rig.relay.drop()
        assert written == [0]
        assert rig.write(4, 8) == [0]
        assert rig.read(3, 2) == [[7, 8]]

    with_copy(scenario)


def test_nothing_is_filled_before_the_changes_of_the_old_device_alone_have_landed() -> None:
    async def scenario(rig: CopyRig) -> None:
        assert rig.link is not None
        rig.copy.recording = False
        read = rig.read(3, 1)
        written = rig.write(3, 7)
        rig.copy.recording = True  # the worker has gone over, and pages are copied from now on
        assert not rig.copy.fillable, "what is read now may be older than the write"
        rig.link.answer(1)
        assert (written, rig.copy.fillable) == ([0], True)
        rig.link.answer(0)
        assert len(read) == 1
        assert rig.present() == [], "what was read before the write is not kept"

    with_copy(scenario)
