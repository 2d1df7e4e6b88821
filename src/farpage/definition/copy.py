"""A definition in a file of its own: replaced whole, and durable when it is said to be."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from pydantic import ValidationError

from farpage.definition.document import canonical_json
from farpage.definition.errors import StoreDamaged, StoreFailed
from farpage.definition.model import Definition


class DefinitionCopy:
    """One file with one definition; every call blocks."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def load(self) -> Definition | None:
        """Return the definition; None when none was ever stored.

        :raise StoreDamaged: what is there is no definition.
        :raise StoreFailed: the file cannot be read.
        """
        try:
            content = self._path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreFailed(str(self._path), error.strerror or "unreadable") from error
        try:
            return Definition.model_validate_json(content)
        except ValidationError as error:
            raise StoreDamaged(str(self._path), f"no definition: {error.errors()[0]['msg']}") from error

    def save(self, definition: Definition) -> None:
        """Store a definition in the place of the one before; on return it survives a loss of power.

        On an error the file is removed if that is possible: a copy that is older than what was last
        agreed on must not pass for the newest.

        :raise StoreFailed: it could not be written.
        """
        fresh = self._path.with_suffix(".new")
        try:
            with fresh.open("wb") as file:
                file.write(canonical_json(definition).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            fresh.replace(self._path)
            self._sync_folder()
        except OSError as error:
            self.discard()
            raise StoreFailed(str(self._path), error.strerror or "unwritable") from error

    def discard(self) -> None:
        """Remove the file, if that is possible: it may be older than what was last agreed on."""
        with contextlib.suppress(OSError):
            self._path.unlink(missing_ok=True)
            self._sync_folder()

    def _sync_folder(self) -> None:
        """Make the file's name durable (fsync(2): a file's name is content of its folder)."""
        folder = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
