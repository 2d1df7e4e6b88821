from __future__ import annotations

from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st

from farpage.vios.copying.presence import BLOCK_BYTES, BLOCK_PAGES, Presence, PresenceKey
from farpage.vios.copying.presencefile import PresenceFile, remove_other_moves, remove_presence

PAGES = 2 * BLOCK_PAGES + 100
KEY = PresenceKey("0b6f3d1e-0000-4000-8000-000000000001", "00000000000000aa", PAGES)


@given(st.lists(st.tuples(st.integers(0, 79), st.integers(1, 20))))
def test_runs_and_counts_are_those_of_a_set(spans: list[tuple[int, int]]) -> None:
    presence, model = Presence(100), set[int]()
    for start, length in spans:
        presence.add(start, start + length)
        model.update(range(start, start + length))
    assert presence.count == len(model)
    found = [page for start, end, here in presence.runs(0, 100) for page in range(start, end) if here]
    assert found == sorted(model)
    assert presence.has(10, 30) == (model >= set(range(10, 30)))


def store(folder: Path, *spans: tuple[int, int], key: PresenceKey = KEY) -> None:
    file = PresenceFile(folder, key)
    presence = file.load()
    for start, end in spans:
        presence.add(start, end)
    file.store(presence.take_changed(key))
    file.close()


def load(folder: Path, key: PresenceKey = KEY) -> Presence:
    file = PresenceFile(folder, key)
    try:
        return file.load()
    finally:
        file.close()


def test_what_was_stored_is_there_again(tmp_path: Path) -> None:
    store(tmp_path, (5, 9), (BLOCK_PAGES - 1, BLOCK_PAGES + 1), (PAGES - 1, PAGES))
    assert [run[:2] for run in load(tmp_path).runs(0, PAGES) if run[2]] == [
        (5, 9), (BLOCK_PAGES - 1, BLOCK_PAGES + 1), (PAGES - 1, PAGES),
    ]  # fmt: skip


def test_the_pages_of_a_block_that_was_torn_are_absent(tmp_path: Path) -> None:
    store(tmp_path, (5, 9), (BLOCK_PAGES, BLOCK_PAGES + 3))
    path = next(tmp_path.iterdir())
    with path.open("r+b") as file:
        file.seek(BLOCK_BYTES + 100)
        file.write(b"\xff")
    assert load(tmp_path).count == 3
    path.write_bytes(path.read_bytes()[: BLOCK_BYTES * 2 + 10])
    assert load(tmp_path).count == 0


def test_another_move_of_the_same_volume_begins_with_nothing(tmp_path: Path) -> None:
    store(tmp_path, (0, 10))
    other = PresenceKey(KEY.volume_id, "00000000000000bb", PAGES)
    next(tmp_path.iterdir()).rename(tmp_path / f"{other.volume_id}.{other.principal}")
    assert load(tmp_path, other).count == 0


def test_files_go_with_their_volume_and_with_their_move(tmp_path: Path) -> None:
    other = PresenceKey("0b6f3d1e-0000-4000-8000-000000000002", "00000000000000bb", 10)
    for key in (KEY, other):
        load(tmp_path, key)
    remove_other_moves(tmp_path, lambda: {KEY.principal, other.principal})
    assert len(list(tmp_path.iterdir())) == 2
    remove_other_moves(tmp_path, lambda: {other.principal})
    assert [path.name for path in tmp_path.iterdir()] == [f"{other.volume_id}.{other.principal}"]
    remove_presence(tmp_path, other.volume_id)
    assert list(tmp_path.iterdir()) == []


def test_what_is_stored_of_a_move_that_begins_while_others_are_removed_stays(tmp_path: Path) -> None:
    load(tmp_path, KEY)
    other = PresenceKey(KEY.volume_id, "00000000000000bb", PAGES)

    def meanwhile() -> set[str]:
        load(tmp_path, other)
        return set()

    remove_other_moves(tmp_path, meanwhile)
    assert [path.name for path in tmp_path.iterdir()] == [f"{other.volume_id}.{other.principal}"]
