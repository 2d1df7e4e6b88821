"""The storage of a volume for who reads it past the volume, page by page, as long as nothing is special.

Who does so says afterwards how it went, and asks the volume itself for what did not come.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol


class Place(NamedTuple):
    """Where the storage is: a file, opened with O_DIRECT, of which the volume begins at `origin_bytes`.

    The descriptor is valid until `on_change` is called; a read that takes longer than `late_seconds` is to be
    asked of the volume.
    """

    descriptor: int
    origin_bytes: int
    late_seconds: float


class Shortcut(Protocol):
    """What is read past the volume."""

    on_change: Callable[[bool], None]
    """Called when `place` is another one; with True when also what is under way is of no use any more."""

    @property
    def place(self) -> Place | None:
        """Where to read; None while everything is to be asked of the volume."""

    def answered(self, reads: int, seconds: float) -> None:
        """Take note of reads that were answered, and how long each took."""

    def failed(self) -> None:
        """Take note of a read that failed, was late or had not the content that was expected."""
