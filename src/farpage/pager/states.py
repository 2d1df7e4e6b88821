"""The words of page tables that those need who lay none over anything: they do not load numpy for them."""

from __future__ import annotations

from typing import Final

ENTRY_BYTES: Final = 5
"""Bytes of table for a page: its state, and the checksum of what was paged out."""

ZERO: Final = 0
CLEAN: Final = 1
DIRTY: Final = 2
WRITING: Final = 3
REWRITTEN: Final = 4
READING: Final = 5
ON_DEVICE: Final = 6
POISONED: Final = 7
STATE_COUNT: Final = 8
STATE_NAMES: Final = ("zero", "clean", "dirty", "writing", "rewritten", "reading", "on_device", "poisoned")

IN_MEMORY: Final = (CLEAN, DIRTY, WRITING, REWRITTEN)
"""States whose pages take room in the memory pool."""
STORED: Final = (ON_DEVICE, READING, CLEAN)
"""States in which the volume holds the page's content, and no write of it is in flight."""
