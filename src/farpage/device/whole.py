"""Devices that hold one volume behind a label: what block devices and remote exports have in common.

See `farpage.device.layout` for what lies where. How the storage is read and written is left to `Storage`.
"""

from __future__ import annotations

import abc
import contextlib
import uuid
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol

from farpage.device.base import (
    BLOCK_BYTES,
    Admit,
    PagingDevice,
    Usage,
    VolumeStat,
    check_new_volume,
    refuse_relabelling,
)
from farpage.device.claim import Claim
from farpage.device.errors import CapacityExceeded, DeviceUnusable, VolumeExists, VolumeInUse, VolumeMissing
from farpage.device.layout import (
    DATA_OFFSET_BYTES,
    HEADER_BYTES,
    DeviceLabel,
    Header,
    VolumeEntry,
    parse_header,
    room_bytes,
)
from farpage.device.spec import Allocate


class Storage(Protocol):
    """Blocking access to the storage; from any thread but an event loop's."""

    @property
    def size_bytes(self) -> int:
        """Size of all of it."""

    @property
    def read_only(self) -> bool:
        """Whether it refuses writes."""

    def read(self, offset: int, length: int) -> bytes:
        """Read whole blocks, as the storage has them now.

        :raise OSError:
        """

    def write(self, offset: int, data: bytes) -> None:
        """Write whole blocks durably.

        :raise OSError:
        """

    def zero(self, offset: int, length: int) -> None:
        """Make whole blocks read as zeros, as quickly as the storage can; durably.

        :raise OSError:
        """

    def locked(self) -> AbstractContextManager[None]:
        """Keep others from changing the header meanwhile, as far as the storage allows that.

        :raise OSError: ETIMEDOUT when another holds the lock too long.
        """


class HeaderReader:
    """Understands headers, and remembers the last: they are read before each change and rarely differ."""

    def __init__(self, label: DeviceLabel) -> None:
        self._last = (b"", Header(label, 0, ()))

    def parse(self, data: bytes) -> Header:
        """Understand a header.

        :raise ValueError: it is damaged.
        """
        # One assignment and one look, so that threads need no lock.
        known, header = self._last
        if data != known:
            header = parse_header(data)
            self._last = (data, header)
        return header

    @property
    def last(self) -> Header:
        """The header that was read last; before the first, one with the label alone."""
        return self._last[1]


@dataclass(frozen=True)
class Hold:
    """What an owner has opened: `owner` is None where no claim of that epoch was on the device then."""

    volume_id: str
    epoch: int
    owner: str | None

    @staticmethod
    def of(header: Header, entry: VolumeEntry, epoch: int) -> Hold:
        """Return the hold of an owner who opens the volume at `epoch`, which it has claimed."""
        current = header.claimed.current
        return Hold(entry.id, epoch, current.owner if current.epoch == epoch else None)

    def is_superseded(self, header: Header) -> bool:
        """Tell whether the owner may not change the volume any more: another has it, or it is gone."""
        entry = header.label.volume if header.label else None
        if entry is None or entry.id != self.volume_id:
            return True
        current = header.claimed.current
        if current.epoch == self.epoch:
            # Where the storage has no locks, of two claims of one epoch the one that was written last counts.
            return self.owner is not None and current.owner != self.owner
        return current.epoch > self.epoch


class WholeDevice(PagingDevice):
    """A labelled device with room for one volume."""

    allocate = Allocate.FULL
    hint = "check the device"
    """What a user can do when the storage does not answer."""

    def __init__(self, storage: Storage, label: DeviceLabel, *, text: str) -> None:
        """`text` is the specification as the user wrote it."""
        self.id, self.name, self.size_bytes = label.uuid, label.name, label.size_bytes
        self.spec = text
        self.headers = HeaderReader(label)
        self._storage = storage

    # Looking

    def volumes(self) -> list[VolumeStat]:
        """List the volume, if there is one."""
        header = self._header()
        return [_stat(header, header.label.volume)] if header.label and header.label.volume else []

    def names(self) -> list[str]:
        """List the volume as it was when the header was last read: at the latest change or look."""
        label = self.headers.last.label
        return [label.volume.name] if label and label.volume else []

    def volume(self, name: str) -> VolumeStat:
        """Look at the header."""
        header = self._header()
        return _stat(header, self._entry(header, name))

    def usage(self) -> Usage:
        """Look at the header. What a volume occupies of a device of its own is all of its size."""
        label = self._header().label
        size_bytes = label.volume.size_bytes if label and label.volume else 0
        return Usage(size_bytes, size_bytes, int(size_bytes > 0))

    # Changing

    def create_volume(self, name: str, size_bytes: int) -> VolumeStat:
        """Zero the volume's place, then enter it into the label."""
        check_new_volume(name, size_bytes)
        with self._problems_named(), self._storage.locked():
            header = self._header(for_change=True)
            present = header.label.volume if header.label else None
            if present is not None and present.name == name:
                raise VolumeExists(name, self.name)
            free_bytes = 0 if present is not None else self.size_bytes
            if size_bytes > free_bytes:
                raise CapacityExceeded(self.name, self.size_bytes, free_bytes, name, size_bytes)
            self._storage.zero(DATA_OFFSET_BYTES, size_bytes)
            entry = VolumeEntry(name=name, id=str(uuid.uuid4()), size_bytes=size_bytes)
            self._store(header, entry)
            return self.volume(name)

    def delete_volume(self, name: str, *, force: bool = False) -> None:
        """Take the volume out of the label; whoever has it open yet finds it gone and may not write."""
        with self._problems_named(), self._storage.locked():
            header = self._header(for_change=True)
            self._entry(header, name)
            by = "" if force else self.in_use()
            if by:
                raise VolumeInUse(name, self.name, by)
            self._store(header, None)

    def claim(self, name: str, claim: Claim) -> Claim:
        """Record the claim in the header, which every VIOS looks at before it writes."""
        with self._problems_named(), self._storage.locked():
            header = self._header(for_change=True)
            self._entry(header, name)
            if claim == header.claimed.current or header.claimed.refuses(claim):
                return header.claimed.current
            write = header.claim_write(claim)
            self._storage.write(write.offset, write.data)
            # Read again: where the storage has no locks, another may have written at the same moment.
            header = self._header()
            self._entry(header, name)
            return header.claimed.current

    @abc.abstractmethod
    def in_use(self) -> str:
        """Say, as the end of a sentence, through whom the volume is open; empty if it is not."""

    # Helpers

    def hold(self, name: str, epoch: int | None) -> tuple[VolumeEntry, Hold | None]:
        """Look a volume up for opening it. Blocks.

        :raise VolumeMissing: there is none.
        :raise DeviceUnusable: the storage does not answer, or is read-only and wanted for writing.
        """
        header = self._header(for_change=epoch is not None)
        entry = self._entry(header, name)
        return entry, None if epoch is None else Hold.of(header, entry, epoch)

    def _store(self, header: Header, entry: VolumeEntry | None) -> None:
        assert header.label is not None
        write = header.label_write(header.label.model_copy(update={"volume": entry}))
        self._storage.write(write.offset, write.data)
        stored = self._header().label
        if stored is None or stored.volume != entry:
            raise DeviceUnusable(
                self.spec,
                "another VIOS changed its label at the same moment",
                "look at the device and try again",
            )

    def _header(self, *, for_change: bool = False) -> Header:
        with self._problems_named():
            header = self.headers.parse(self._storage.read(0, HEADER_BYTES))
            if header.label is None or header.label.uuid != self.id:
                raise ValueError("it carries another label than when it was opened, or none")
            if for_change and self._storage.read_only:
                raise ValueError("it is read-only")
            return header

    def _entry(self, header: Header, name: str) -> VolumeEntry:
        entry = header.volume(name)
        if entry is None:
            raise VolumeMissing(name, f"device {self.name!r}")
        return entry

    @contextlib.contextmanager
    def _problems_named(self) -> Iterator[None]:
        try:
            yield
        except (OSError, ValueError) as error:
            raise unusable(self.spec, error, self.hint) from error


def unusable(spec: str, error: OSError | ValueError, hint: str) -> DeviceUnusable:
    """Say what the kernel, the server, or the parser of a header had to say."""
    problem = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
    return DeviceUnusable(spec, problem, hint)


def prepare_label(
    storage: Storage,
    *,
    text: str,
    default_name: str,
    name: str | None,
    size_bytes: int | None,
    refuse_foreign: Callable[[], None],
    admit: Admit,
) -> DeviceLabel:
    """Return the storage's label; label it first if it has none. Blocks.

    `refuse_foreign` raises if storage without a label holds something else. What a former use has left at the
    storage's both ends, where signatures lie, is zeroed.

    :raise DeviceUnusable: too small, read-only, or of another size or name than asked for.
    :raise OSError: the storage cannot be read or written.
    :raise ValueError: its label is damaged.
    """
    room = room_bytes(storage.size_bytes)
    with storage.locked():
        header = parse_header(storage.read(0, HEADER_BYTES)) if room else Header(None, 0, ())
        label = header.label
        admit(label.uuid if label else "", label.name if label else name or default_name)
        if label is None:
            if not room:
                raise DeviceUnusable(
                    text,
                    f"its {storage.size_bytes} bytes are too few",
                    f"use more than {DATA_OFFSET_BYTES} bytes",
                )
            if storage.read_only:
                raise DeviceUnusable(text, "it is read-only and has no farpage label", "let it be written to")
            wanted_bytes = room if size_bytes is None else size_bytes // BLOCK_BYTES * BLOCK_BYTES
            if not 0 < wanted_bytes <= room:
                raise DeviceUnusable(
                    text,
                    f"it has room for {room} bytes, not for {wanted_bytes}",
                    "leave the size out, or give less",
                )
            refuse_foreign()
            label = DeviceLabel(name=name or default_name, size_bytes=wanted_bytes)
            storage.zero(0, DATA_OFFSET_BYTES)
            end = storage.size_bytes // BLOCK_BYTES * BLOCK_BYTES
            tail = max(DATA_OFFSET_BYTES, end - DATA_OFFSET_BYTES)
            if tail < end:
                storage.zero(tail, end - tail)
            write = header.label_write(label)
            storage.write(write.offset, write.data)
            return label
    if label.size_bytes > room:
        raise DeviceUnusable(
            text,
            f"its label promises {label.size_bytes} bytes, and there are {room}",
            "give it back its size",
        )
    refuse_relabelling(text, label, name=name, size_bytes=size_bytes)
    return label


def _stat(header: Header, entry: VolumeEntry) -> VolumeStat:
    return VolumeStat(entry.name, entry.id, entry.size_bytes, entry.size_bytes, header.claimed.current)
