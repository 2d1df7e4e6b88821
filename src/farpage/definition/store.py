"""Keeps the definition and the volumes' epochs in a VIOS' database."""

from __future__ import annotations

import datetime
import sqlite3
import threading

from pydantic import ValidationError

from farpage.definition.compare import is_newer
from farpage.definition.database import Database
from farpage.definition.document import canonical_json
from farpage.definition.errors import InvalidDefinition, RevisionConflict, StoreDamaged
from farpage.definition.model import Definition
from farpage.definition.rules import check

HISTORY_MAX = 100
"""So many revisions are kept."""


class DefinitionStore:
    """The current definition and its history. Safe to use from any thread."""

    def __init__(self, database: Database) -> None:
        """Read what is stored.

        :raise StoreDamaged: it is no definition of this format.
        """
        self._database = database
        self._lock = threading.Lock()
        with database.transaction() as connection:
            self._current = self._read(connection)

    def current(self) -> Definition:
        """Return the current definition; a new store has the empty one of revision 0."""
        with self._lock:
            return self._current

    def compare_and_swap(self, expected_revision: int, definition: Definition) -> Definition:
        """Store `definition` durably if the current revision is `expected_revision`; return what is current.

        A document that is current already is accepted again, because the sender of a request whose
        answer was lost must be able to repeat it. A later owner's document is accepted even with a lower
        revision than one which a hypervisor that was cut off has left here.

        :raise RevisionConflict: the current revision is another one.
        :raise InvalidDefinition: the document is not sound, or not newer than the current one.
        :raise StoreFailed: the database cannot be written; what it holds then shows at the next start.
        """
        check(definition)
        with self._lock:
            if definition == self._current:
                return definition
            if expected_revision != self._current.revision:
                raise RevisionConflict(expected_revision, self._current.revision)
            if not is_newer(definition, self._current):
                raise InvalidDefinition(
                    definition.revision,
                    f"revision: it must be above {expected_revision}, and no client's epoch may fall",
                )
            now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            with self._database.transaction() as connection:
                connection.execute(
                    "INSERT INTO definitions (document, stored_at) VALUES (?, ?)",
                    (canonical_json(definition), now),
                )
                connection.execute(
                    "DELETE FROM definitions WHERE number <= (SELECT max(number) FROM definitions) - ?",
                    (HISTORY_MAX,),
                )
            self._current = definition
            return definition

    def history(self) -> list[Definition]:
        """Return the revisions kept, newest first.

        :raise StoreDamaged: one of them cannot be read.
        """
        with self._database.transaction() as connection:
            rows = connection.execute("SELECT document FROM definitions ORDER BY number DESC").fetchall()
        return [self._parse(row[0]) for row in rows]

    def _read(self, connection: sqlite3.Connection) -> Definition:
        row = connection.execute("SELECT document FROM definitions ORDER BY number DESC LIMIT 1").fetchone()
        return Definition() if row is None else self._parse(row[0])

    def _parse(self, document: str) -> Definition:
        try:
            return Definition.model_validate_json(document)
        except ValidationError as error:
            raise StoreDamaged(self._database.path, f"no definition: {error.errors()[0]['msg']}") from error


class EpochStore:
    """The highest epoch seen of each volume and its owner, by the volume's identifier.

    Safe to use from any thread.
    """

    def __init__(self, database: Database) -> None:
        """Read what is stored.

        :raise StoreFailed: the database cannot be read.
        """
        self._database = database
        with database.transaction() as connection:
            rows = connection.execute("SELECT volume_id, epoch, owner FROM epochs").fetchall()
        self._highest: dict[str, tuple[int, str]] = {volume: (epoch, owner) for volume, epoch, owner in rows}

    def highest(self, volume_id: str) -> tuple[int, str]:
        """Return the highest epoch seen, 0 for none, and its owner; from memory."""
        return self._highest.get(volume_id, (0, ""))

    def all(self) -> dict[str, tuple[int, str]]:
        """Return the highest epochs of all volumes with their owners."""
        return self._highest.copy()

    def raise_to(self, volume_id: str, epoch: int, owner: str = "") -> None:
        """Record durably that `epoch` was seen with its owner, unless a higher one, or this one, was.

        :raise StoreFailed: the database cannot be written.
        """
        if epoch <= self.highest(volume_id)[0]:
            return
        with self._database.transaction() as connection:
            connection.execute(
                "INSERT INTO epochs (volume_id, epoch, owner) VALUES (?, ?, ?) ON CONFLICT (volume_id) "
                "DO UPDATE SET epoch = excluded.epoch, owner = excluded.owner WHERE excluded.epoch > epoch",
                (volume_id, epoch, owner),
            )
        if epoch > self.highest(volume_id)[0]:
            self._highest[volume_id] = (epoch, owner)

    def forget(self, volume_id: str) -> None:
        """Drop the record of a volume that was deleted.

        :raise StoreFailed: the database cannot be written.
        """
        with self._database.transaction() as connection:
            connection.execute("DELETE FROM epochs WHERE volume_id = ?", (volume_id,))
        self._highest.pop(volume_id, None)
