"""State files: what is stored in one is there for whoever opens it next."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from farpage.pager.statefile import SLOTS, StateFile, StateFileUnusable
from farpage.pager.states import DIRTY, ENTRY_BYTES, ON_DEVICE
from farpage.pager.table import PageTable

PAGES = 5000
DEVICES = [f"00000000-0000-0000-0000-{number:012x}" for number in range(SLOTS + 1)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "vm.state"


def test_a_table_is_found_again_as_it_was_left(path: Path) -> None:
    left = StateFile.create(path, PAGES, epoch=7)
    table = PageTable(PAGES, left.table_storage)
    table.put(0, DIRTY)
    table.put(PAGES - 1, ON_DEVICE)
    table.checksums[PAGES - 1] = 0xDEADBEEF
    left.epoch = 1 << 40
    found = StateFile.open(path)
    again = PageTable(found.pages, found.table_storage)
    assert (found.pages, found.epoch) == (PAGES, 1 << 40)
    assert (again.state[0], again.state[PAGES - 1]) == (DIRTY, ON_DEVICE)
    assert again.checksums[PAGES - 1] == 0xDEADBEEF
    assert again.counts[DIRTY] == again.counts[ON_DEVICE] == 1


def test_the_page_under_repair_is_known_afterwards(path: Path) -> None:
    state = StateFile.create(path, 10)
    assert list(state.repair_mark) == [0]
    state.repair_mark[0] = 8
    assert list(StateFile.open(path).repair_mark) == [8]


def test_a_new_file_is_empty_and_private(path: Path) -> None:
    with_old_content = StateFile.create(path, PAGES)
    with_old_content.table_storage[:] = b"\x01" * (PAGES * ENTRY_BYTES)
    fresh = StateFile.create(path, PAGES, epoch=3)
    assert not any(fresh.table_storage)
    assert (fresh.epoch, fresh.dirty_maps) == (3, ())
    assert path.stat().st_mode & 0o777 == 0o600
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


def test_dirty_maps_are_found_again_by_their_device(path: Path) -> None:
    left = StateFile.create(path, PAGES)
    left.dirty_map(DEVICES[0])[1] = 1
    left.dirty_map(DEVICES[1])[PAGES - 1] = 1
    left.dirty_map(DEVICES[0])[2] = 1
    found = StateFile.open(path)
    assert found.dirty_maps == (DEVICES[0], DEVICES[1])
    assert [page for page, dirty in enumerate(found.dirty_map(DEVICES[0])) if dirty] == [1, 2]
    assert [page for page, dirty in enumerate(found.dirty_map(DEVICES[1])) if dirty] == [PAGES - 1]
    assert not any(found.table_storage)


def test_a_dropped_map_makes_room_for_another_that_is_empty(path: Path) -> None:
    state = StateFile.create(path, PAGES)
    for device in DEVICES[:SLOTS]:
        state.dirty_map(device)[:] = b"\x01" * PAGES
    with pytest.raises(StateFileUnusable, match="all 4 dirty maps"):
        state.dirty_map(DEVICES[SLOTS])
    full = os.fstat(state.fileno()).st_blocks
    state.drop_dirty_map(DEVICES[1])
    assert os.fstat(state.fileno()).st_blocks < full
    assert not any(state.dirty_map(DEVICES[SLOTS]))
    assert state.dirty_maps == (DEVICES[0], DEVICES[SLOTS], DEVICES[2], DEVICES[3])


def test_a_slot_of_a_map_that_was_not_dropped_to_the_end_is_cleaned_when_it_is_used(path: Path) -> None:
    state = StateFile.create(path, PAGES)
    view = state.dirty_map(DEVICES[0])
    state.drop_dirty_map(DEVICES[0])
    view[5] = 1
    assert not any(state.dirty_map(DEVICES[1]))


def test_dirty_maps_take_no_room_before_they_are_used(path: Path) -> None:
    state = StateFile.create(path, 1 << 20)
    assert os.fstat(state.fileno()).st_blocks * 512 < (1 << 20) * ENTRY_BYTES + (64 << 10)


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"", "begin"), (b"x" * 8192, "begin"), (b"FPSTATE1" + b"\x01" + bytes(8183), "do not fit")],
)
def test_a_file_that_is_none_is_refused(path: Path, content: bytes, problem: str) -> None:
    path.write_bytes(content)
    with pytest.raises(StateFileUnusable, match=problem):
        StateFile.open(path)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(StateFileUnusable, match="No such file"):
        StateFile.create(tmp_path / "none" / "vm.state", PAGES)
    with pytest.raises(StateFileUnusable, match="No such file"):
        StateFile.open(tmp_path / "none" / "vm.state")


def test_a_file_that_is_removed_stays_usable_for_views_of_it(path: Path) -> None:
    state = StateFile.create(path, PAGES)
    table = PageTable(PAGES, state.table_storage)
    state.remove()
    state.close()
    table.put(3, DIRTY)
    assert table.counts[DIRTY] == 1
    assert not path.exists()
