"""A VIOS' SQLite database: opened carefully, used from several threads, one at a time."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

from farpage.definition.errors import StoreDamaged, StoreFailed

SCHEMA_VERSION = 2

SCHEMA = """
CREATE TABLE definitions (
    number INTEGER PRIMARY KEY AUTOINCREMENT, document TEXT NOT NULL, stored_at TEXT NOT NULL
);
CREATE TABLE epochs (
    volume_id TEXT PRIMARY KEY, epoch INTEGER NOT NULL, owner TEXT NOT NULL DEFAULT ''
) WITHOUT ROWID;
CREATE TABLE devices (
    spec TEXT PRIMARY KEY, name TEXT, size_bytes INTEGER, added_at TEXT NOT NULL
) WITHOUT ROWID;
"""

MIGRATIONS = {1: "ALTER TABLE epochs ADD COLUMN owner TEXT NOT NULL DEFAULT '';"}
"""What brings a database of an older version to the next."""


class Database:
    """The file with the definition, the epochs and the devices that were added."""

    def __init__(self, path: Path | str) -> None:
        """Open or create it.

        :raise StoreDamaged: its content cannot be read, or a newer farpage has written it.
        :raise StoreFailed: its file cannot be opened.
        """
        self.path = str(path)
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        with self._damage_named():
            self._connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False)
            try:
                self._prepare(self._connection)
            except BaseException:
                self.close()
                raise

    def _prepare(self, connection: sqlite3.Connection) -> None:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        (verdict,) = connection.execute("PRAGMA quick_check(1)").fetchone()
        if verdict != "ok":
            raise sqlite3.DatabaseError(str(verdict))
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version == 0:
            connection.executescript(f"BEGIN IMMEDIATE;{SCHEMA}PRAGMA user_version={SCHEMA_VERSION};COMMIT;")
            return
        while version in MIGRATIONS:
            migration, version = MIGRATIONS[version], version + 1
            connection.executescript(f"BEGIN IMMEDIATE;{migration}PRAGMA user_version={version};COMMIT;")
        if version != SCHEMA_VERSION:
            raise sqlite3.DatabaseError(
                f"its layout has version {version}, this farpage knows {SCHEMA_VERSION}"
            )

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Run statements as one durable change; an exception undoes them all.

        :raise StoreDamaged: the content cannot be read.
        :raise StoreFailed: the file cannot be read or written.
        """
        with self._lock, self._damage_named():
            if self._connection is None:
                raise sqlite3.ProgrammingError("the database is closed")
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                with contextlib.suppress(sqlite3.Error):
                    self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    @contextlib.contextmanager
    def _damage_named(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise StoreFailed(self.path, str(error)) from error
        except sqlite3.Error as error:
            raise StoreDamaged(self.path, str(error)) from error

    def close(self) -> None:
        """Close it; a second call does nothing."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
                self._connection = None
