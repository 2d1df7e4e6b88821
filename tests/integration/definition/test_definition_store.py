from __future__ import annotations

import sqlite3
import subprocess
import sys
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from farpage.definition.database import Database
from farpage.definition.document import canonical_json
from farpage.definition.errors import InvalidDefinition, RevisionConflict, StoreDamaged, StoreFailed
from farpage.definition.model import Access, Definition, Grant, PagingCommand, ViosRecord
from farpage.definition.rules import FoundDevice, add_client, next_revision, raise_epoch, register_vios
from farpage.definition.store import HISTORY_MAX, DefinitionStore, EpochStore


@pytest.fixture
def database(tmp_path: Path) -> Iterator[Database]:
    opened = Database(tmp_path / "vios.db")
    yield opened
    opened.close()


def successor(definition: Definition, name: str = "one") -> Definition:
    address = f"unix:/run/{name}-{definition.revision}"
    return next_revision(definition, vioses={name: ViosRecord(control=address, data=(address,))})


def test_a_new_store_has_the_empty_definition(database: Database) -> None:
    assert DefinitionStore(database).current() == Definition()


def test_what_was_stored_is_there_after_reopening(database: Database, tmp_path: Path) -> None:
    definition = successor(Definition())
    DefinitionStore(database).compare_and_swap(0, definition)
    database.close()
    again = Database(tmp_path / "vios.db")
    assert canonical_json(DefinitionStore(again).current()) == canonical_json(definition)
    again.close()


def test_another_revision_than_expected_is_a_conflict_that_names_the_current_one(database: Database) -> None:
    store = DefinitionStore(database)
    first = store.compare_and_swap(0, successor(Definition()))
    with pytest.raises(RevisionConflict) as caught:
        store.compare_and_swap(0, successor(Definition(), "other"))
    assert caught.value.current_revision == 1
    assert store.current() == first


def test_the_same_document_again_is_accepted(database: Database) -> None:
    store = DefinitionStore(database)
    definition = successor(Definition())
    store.compare_and_swap(0, definition)
    assert store.compare_and_swap(0, definition) == definition
    assert len(store.history()) == 1


def test_a_revision_may_jump_but_not_fall(database: Database) -> None:
    store = DefinitionStore(database)
    ahead = successor(Definition()).model_copy(update={"revision": 40})
    store.compare_and_swap(0, ahead)
    with pytest.raises(InvalidDefinition, match="above"):
        store.compare_and_swap(40, successor(Definition(), "other"))
    assert store.current() == ahead


def test_a_later_owner_overrides_a_higher_revision(database: Database, tmp_path: Path) -> None:
    store = DefinitionStore(database)
    device = FoundDevice(str(uuid.UUID(int=1)), "a", "dir", "dir:/a", 1 << 20, tuple(PagingCommand))
    base = register_vios(Definition(), "one", ViosRecord(control="unix:/c", data=("unix:/d",)), [device])
    base = add_client(base, "vm1", memory_bytes=4096, hypervisor="host")
    cut_off = base
    for number in range(5):
        cut_off = add_client(cut_off, f"other{number}", memory_bytes=4096, hypervisor="host")
    store.compare_and_swap(0, cut_off)
    with pytest.raises(InvalidDefinition):
        store.compare_and_swap(cut_off.revision, base)
    taken_over = raise_epoch(base, "vm1")
    assert taken_over.revision < cut_off.revision
    store.compare_and_swap(cut_off.revision, taken_over)
    database.close()
    again = Database(tmp_path / "vios.db")
    assert DefinitionStore(again).current() == taken_over
    again.close()


def test_a_document_that_contradicts_itself_changes_nothing(database: Database) -> None:
    store = DefinitionStore(database)
    dangling = Definition(revision=1, grants=(Grant(principal="x", volume="ghost", access=Access.READ),))
    with pytest.raises(InvalidDefinition, match="ghost"):
        store.compare_and_swap(0, dangling)
    assert store.current() == Definition()


def test_the_history_is_bounded_and_newest_first(database: Database) -> None:
    store = DefinitionStore(database)
    definition = Definition()
    for _ in range(HISTORY_MAX + 5):
        definition = store.compare_and_swap(definition.revision, successor(definition))
    assert [kept.revision for kept in store.history()] == list(range(HISTORY_MAX + 5, 5, -1))


def test_of_two_writers_at_once_one_wins_each_revision(database: Database) -> None:
    store = DefinitionStore(database)
    won: dict[str, int] = {"one": 0, "two": 0}
    barrier = threading.Barrier(2)

    def write(name: str) -> None:
        barrier.wait()
        while (current := store.current()).revision < 40:
            try:
                store.compare_and_swap(current.revision, successor(current, name))
            except RevisionConflict:
                continue
            won[name] += 1

    threads = [threading.Thread(target=write, args=(name,)) for name in won]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(won.values()) == store.current().revision
    assert len(store.history()) == store.current().revision


def test_an_epoch_only_rises(database: Database) -> None:
    epochs = EpochStore(database)
    assert epochs.highest("volume") == (0, "")
    epochs.raise_to("volume", 5, "00000000000000aa")
    epochs.raise_to("volume", 3)
    epochs.raise_to("volume", 5, "00000000000000bb")
    assert epochs.highest("volume") == (5, "00000000000000aa")
    assert EpochStore(database).highest("volume") == (5, "00000000000000aa")
    epochs.forget("volume")
    assert epochs.highest("volume") == (0, "")


WRITE_UNTIL_KILLED = """
import sys
from farpage.definition.database import Database
from farpage.definition.store import EpochStore
epochs = EpochStore(Database(sys.argv[1]))
number = 0
while True:
    number += 1
    epochs.raise_to("volume", number)
    print(number, flush=True)
"""


def test_an_epoch_that_was_acknowledged_survives_a_kill(tmp_path: Path) -> None:
    path = tmp_path / "vios.db"
    process = subprocess.Popen(
        [sys.executable, "-c", WRITE_UNTIL_KILLED, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for _ in range(50):
        last = process.stdout.readline()
    process.kill()
    last = (process.stdout.read().split() or [last])[-1]
    process.wait()
    process.stdout.close()
    database = Database(path)
    assert EpochStore(database).highest("volume")[0] >= int(last)
    database.close()


@pytest.mark.parametrize("content", [b"not a database at all" * 100, b"SQLite format 3\0" + b"\xff" * 4096])
def test_a_damaged_file_is_reported_with_a_remedy(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "vios.db"
    path.write_bytes(content)
    with pytest.raises(StoreDamaged, match="move the file"):
        Database(path)
    assert path.read_bytes() == content


def test_a_damaged_page_is_found_when_opening(tmp_path: Path) -> None:
    path = tmp_path / "vios.db"
    database = Database(path)
    store = DefinitionStore(database)
    definition = Definition()
    for _ in range(60):
        definition = store.compare_and_swap(definition.revision, successor(definition))
    database.close()
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\xa5" * (size - 4096))
    with pytest.raises(StoreDamaged):
        DefinitionStore(Database(path))


def test_a_stored_text_that_is_no_definition_is_reported(database: Database) -> None:
    with database.transaction() as connection:
        connection.execute("INSERT INTO definitions (document, stored_at) VALUES ('{\"format\": 7}', 'now')")
    with pytest.raises(StoreDamaged, match="no definition"):
        DefinitionStore(database)


def test_a_layout_of_a_newer_farpage_is_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "vios.db"
    Database(path).close()
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA user_version=99")
    connection.close()
    with pytest.raises(StoreDamaged, match="version 99"):
        Database(path)


def test_a_layout_without_owners_is_brought_up_to_date(tmp_path: Path) -> None:
    path = tmp_path / "vios.db"
    connection = sqlite3.connect(path)
    connection.executescript(
        "CREATE TABLE definitions (number INTEGER PRIMARY KEY AUTOINCREMENT, document TEXT NOT NULL,"
        " stored_at TEXT NOT NULL);"
        "CREATE TABLE epochs (volume_id TEXT PRIMARY KEY, epoch INTEGER NOT NULL) WITHOUT ROWID;"
        "CREATE TABLE devices (spec TEXT PRIMARY KEY, name TEXT, size_bytes INTEGER, added_at TEXT NOT NULL)"
        " WITHOUT ROWID;"
        "INSERT INTO epochs VALUES ('volume', 3); PRAGMA user_version=1;"
    )
    connection.close()
    for _ in range(2):
        database = Database(path)
        assert EpochStore(database).highest("volume") == (3, "")
        database.close()


def test_a_folder_that_cannot_be_written_is_reported(tmp_path: Path) -> None:
    with pytest.raises(StoreFailed, match="check that the folder exists"):
        Database(tmp_path / "nothing" / "vios.db")


def test_a_failed_change_is_undone_whole(database: Database) -> None:
    with pytest.raises(RuntimeError), database.transaction() as connection:
        connection.execute("INSERT INTO epochs VALUES ('volume', 3, '')")
        raise RuntimeError
    assert EpochStore(database).highest("volume") == (0, "")
    EpochStore(database).raise_to("volume", 1)
    assert EpochStore(database).highest("volume") == (1, "")
