"""The devices that were added through the API: they come back when the VIOS does."""

from __future__ import annotations

import datetime
from dataclasses import dataclass

from farpage.definition.database import Database


@dataclass(frozen=True)
class RememberedDevice:
    """What `POST /v1/devices` was given."""

    spec: str
    name: str | None
    size_bytes: int | None


class RememberedDevices:
    """Their list in the VIOS' database."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def all(self) -> list[RememberedDevice]:
        """Return them in the order of their specifications.

        :raise StoreFailed: the database cannot be read.
        """
        with self._database.transaction() as connection:
            rows = connection.execute("SELECT spec, name, size_bytes FROM devices ORDER BY spec").fetchall()
        return [RememberedDevice(*row) for row in rows]

    def add(self, device: RememberedDevice) -> None:
        """Remember one durably, in place of one of the same specification.

        :raise StoreFailed: the database cannot be written.
        """
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        with self._database.transaction() as connection:
            connection.execute(
                "INSERT OR REPLACE INTO devices (spec, name, size_bytes, added_at) VALUES (?, ?, ?, ?)",
                (device.spec, device.name, device.size_bytes, now),
            )
