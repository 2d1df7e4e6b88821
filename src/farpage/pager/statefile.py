"""The state file of one attached client: what must outlive the process that pages it.

A file that the data worker maps, on tmpfs (/run) if possible: whatever is stored in the map is kept by the
kernel when the process is killed between any two instructions. It holds, in this order, each part from a
page boundary on:

    header        magic, pages, epoch, repair mark, foreign mark, and SLOTS slots that name the dirty maps
    page table    ENTRY_BYTES a page (`farpage.pager.table`)
    dirty maps    SLOTS times one byte a page; only those in use take room

A change that takes more than one store is made so that its last store puts it in force.
"""

from __future__ import annotations

import errno
import mmap
import os
import struct
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

from farpage.errors import ExitStatus, FarpageError
from farpage.kernel.memory import punch_hole
from farpage.pager.states import ENTRY_BYTES

MAGIC: Final = b"FPSTATE1"
SLOTS: Final = 4
"""Most dirty maps at a time: one for each replica that is not in sync."""

_HEADER_BYTES: Final = 4096
_ALIGNMENT: Final = 4096
_HEAD: Final = struct.Struct("=8sQQ")
_EPOCH_WORD: Final = 2
_REPAIR_WORD: Final = 3
_FOREIGN_WORD: Final = 4
_SLOTS_AT: Final = 64
_SLOT_BYTES: Final = 64
_NAME_BYTES: Final = _SLOT_BYTES - 2


@dataclass(eq=False)
class StateFileUnusable(FarpageError):
    """A client's state file cannot be made, or is not one."""

    code = "state_file_unusable"
    template = "state file {path}: {problem}"
    remedy = "{hint}"
    exit_status = ExitStatus.FAILURE
    path: str
    problem: str
    hint: str


class StateFile:
    """One client's state, mapped; see the module. Views of it must be let go before `close` frees the map."""

    def __init__(self, path: Path, descriptor: int, pages: int) -> None:
        """Map the file behind `descriptor`, which stays the caller's; use `create`, `open` or `attach`."""
        self.path: Final = path
        self.pages: Final = pages
        self._descriptor = os.dup(descriptor)
        try:
            self._map = mmap.mmap(self._descriptor, _size_bytes(pages))
        except BaseException:
            os.close(self._descriptor)
            raise
        self._view = memoryview(self._map)
        self._words = self._view[:_SLOTS_AT].cast("Q")

    @classmethod
    def create(cls, path: Path, pages: int, epoch: int = 0) -> Self:
        """Make the file of a client of `pages` pages, all ZERO, in place of any that is there.

        Its table is allocated now, so that paging never fails for lack of room.

        :raise StateFileUnusable: when there is no room, or the folder cannot be written.
        """
        fresh = path.with_name(path.name + ".new")
        try:
            descriptor = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _unusable(path, error) from error
        try:
            os.ftruncate(descriptor, _size_bytes(pages))
            os.posix_fallocate(descriptor, 0, _HEADER_BYTES + _aligned(pages * ENTRY_BYTES))
            os.pwrite(descriptor, _HEAD.pack(MAGIC, pages, epoch), 0)
            created = cls(path, descriptor, pages)
            fresh.replace(path)
        except OSError as error:
            with suppress(OSError):
                fresh.unlink()
            raise _unusable(path, error) from error
        finally:
            os.close(descriptor)
        return created

    @classmethod
    def open(cls, path: Path) -> Self:
        """Map a file that is there.

        :raise StateFileUnusable: when it is missing or is not a whole state file.
        """
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise _unusable(path, error) from error
        try:
            return cls.attach(descriptor, path)
        finally:
            os.close(descriptor)

    @classmethod
    def attach(cls, descriptor: int, path: Path) -> Self:
        """Map the file behind a descriptor, which stays the caller's; `path` is for messages.

        :raise StateFileUnusable: when it is not a whole state file.
        """
        try:
            head = os.pread(descriptor, _HEAD.size, 0)
            size_bytes = os.fstat(descriptor).st_size
            if len(head) < _HEAD.size or head[: len(MAGIC)] != MAGIC:
                raise _damaged(path, "it does not begin as one")
            pages: int = _HEAD.unpack(head)[1]
            if pages <= 0 or size_bytes != _size_bytes(pages):
                raise _damaged(path, f"{size_bytes} bytes do not fit {pages} pages")
            return cls(path, descriptor, pages)
        except OSError as error:
            raise _unusable(path, error) from error

    def fileno(self) -> int:
        """Return a descriptor of the file, which stays this object's."""
        return self._descriptor

    @property
    def epoch(self) -> int:
        """The newest epoch under which the volume may have been opened; stored before it is."""
        return self._words[_EPOCH_WORD]

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        self._words[_EPOCH_WORD] = epoch

    @property
    def repair_mark(self) -> memoryview:
        """One word: the page that a repair is under way for, plus one; 0 for none."""
        return self._words[_REPAIR_WORD : _REPAIR_WORD + 1]

    @property
    def foreign(self) -> bool:
        """What is in the client's memory is not of this table, which came from another hypervisor."""
        return bool(self._words[_FOREIGN_WORD])

    @foreign.setter
    def foreign(self, foreign: bool) -> None:
        self._words[_FOREIGN_WORD] = foreign

    @property
    def table_storage(self) -> memoryview:
        """The page table's bytes, `pages * ENTRY_BYTES` of them."""
        return self._view[_HEADER_BYTES : _HEADER_BYTES + self.pages * ENTRY_BYTES]

    # Dirty maps

    @property
    def dirty_maps(self) -> tuple[str, ...]:
        """The devices that have a dirty map."""
        return tuple(name for name in map(self._name, range(SLOTS)) if name)

    def dirty_map(self, device_id: str, *, missed: bool = False) -> memoryview:
        """Return the dirty map of a device, one byte a page; a new one is all zeros.

        When all is `missed` a new one is all ones, before anybody can find it.

        :raise StateFileUnusable: when all slots are taken, or there is no room.
        """
        slots = [self._name(slot) for slot in range(SLOTS)]
        if device_id in slots:
            return self._storage(slots.index(device_id))
        name = device_id.encode()
        if not 0 < len(name) <= _NAME_BYTES:
            raise ValueError(f"a device's name has 1 to {_NAME_BYTES} bytes, not {len(name)}")
        if None not in slots:
            raise StateFileUnusable(
                str(self.path), f"all {SLOTS} dirty maps are in use", "resync or replace a stale replica"
            )
        slot = slots.index(None)
        offset, length = self._place(slot)
        try:
            # What a map left that was dropped in its middle; then room, so that no store to it fails.
            punch_hole(self._descriptor, offset, length)
            os.posix_fallocate(self._descriptor, offset, length)
        except OSError as error:
            raise _unusable(self.path, error) from error
        if missed:
            self._storage(slot)[:] = b"\1" * self.pages
        at = _SLOTS_AT + slot * _SLOT_BYTES
        self._view[at + 2 : at + 2 + len(name)] = name
        self._view[at + 1] = len(name)
        self._view[at] = 1
        return self._storage(slot)

    def drop_dirty_map(self, device_id: str) -> None:
        """Free a device's dirty map; views of it show zeros then. Nothing happens when there is none."""
        for slot in range(SLOTS):
            if self._name(slot) == device_id:
                self._view[_SLOTS_AT + slot * _SLOT_BYTES] = 0
                punch_hole(self._descriptor, *self._place(slot))

    def _name(self, slot: int) -> str | None:
        at = _SLOTS_AT + slot * _SLOT_BYTES
        if not self._view[at]:
            return None
        return bytes(self._view[at + 2 : at + 2 + self._view[at + 1]]).decode()

    def _place(self, slot: int) -> tuple[int, int]:
        length = _aligned(self.pages)
        return _HEADER_BYTES + _aligned(self.pages * ENTRY_BYTES) + slot * length, length

    def _storage(self, slot: int) -> memoryview:
        offset, _ = self._place(slot)
        return self._view[offset : offset + self.pages]

    def close(self) -> None:
        """Let go of the file, which stays; the map goes with the last view of it. Safe to call twice."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor < 0:
            return
        os.close(descriptor)
        self._words.release()
        with suppress(BufferError):  # slices of the view are in use and keep the map
            self._view.release()
            self._map.close()

    def remove(self) -> None:
        """Let go of the file and delete it: the client has been detached or has ended."""
        self.close()
        with suppress(OSError):
            self.path.unlink()


def _aligned(length: int) -> int:
    return -(-length // _ALIGNMENT) * _ALIGNMENT


def _size_bytes(pages: int) -> int:
    return _HEADER_BYTES + _aligned(pages * ENTRY_BYTES) + SLOTS * _aligned(pages)


def _unusable(path: Path, error: OSError) -> StateFileUnusable:
    hint = "name a folder that you can write to with --run-dir"
    if error.errno in (errno.ENOSPC, errno.ENOMEM, errno.EDQUOT):
        hint = f"make room in {path.parent}: about 6 bytes for each page of a client's memory"
    return StateFileUnusable(str(path), os.strerror(error.errno or errno.EIO), hint)


def _damaged(path: Path, problem: str) -> StateFileUnusable:
    return StateFileUnusable(
        str(path), f"not a farpage state file: {problem}", "the client's memory cannot be paged in without it"
    )
