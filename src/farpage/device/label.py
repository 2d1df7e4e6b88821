"""The label of a directory, and the headers of its volumes: what all VIOS that share it agree on."""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
import struct
import threading
import uuid
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from farpage.device.base import EPOCH_MAX
from farpage.device.claim import Claim, Claims

LABEL_NAME = "label.json"

_HEADER = struct.Struct("<8s16s")
_MAGIC = b"farpage\x01"
_MAGIC_FULL = b"farpage\x02"
_WORD_BYTES = 8
_READ_BYTES = 512 * _WORD_BYTES

_OWNER_FOLLOWS = 1 << 63
_HALF_OF_OWNER = 1 << 62
_SECOND_HALF = 1 << 61
"""Marks in a record's words; epochs are below 2**53, but for EPOCH_MAX of a deleted volume."""
_HALF_BITS = 32
_HALF_MASK = (1 << _HALF_BITS) - 1
_LONGEST_RECORD = 3


class Label(BaseModel):
    """What identifies a device: the same `uuid` seen by two VIOS is the same device."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

    format: Literal[1] = 1
    kind: Literal["dir"] = "dir"
    uuid: str = Field(
        pattern=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$", default_factory=lambda: str(uuid.uuid4())
    )
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    size_bytes: int = Field(gt=0)
    created: str = Field(
        default_factory=lambda: datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    )


def read_label(folder: Path) -> Label | None:
    """Read the label; None where there is none.

    :raise ValueError: it is damaged or of another format.
    :raise OSError: it cannot be read.
    """
    try:
        text = (folder / LABEL_NAME).read_bytes()
    except FileNotFoundError:
        return None
    try:
        return Label.model_validate_json(text)
    except ValidationError as error:
        problem = error.errors()[0]
        raise ValueError(f"{'.'.join(map(str, problem['loc'])) or 'contents'}: {problem['msg']}") from error


def write_label(folder: Path, label: Label) -> None:
    """Write the label durably.

    :raise OSError: as it comes from the file system.
    """
    replace_durably(folder / LABEL_NAME, label.model_dump_json(indent=2).encode() + b"\n")


def replace_durably(path: Path, content: bytes) -> None:
    """Write a file so that after a crash either the old or the new content is there, whole."""
    temporary = path.with_name(f".{path.name}.new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
    try:
        os.write(descriptor, content)
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
    temporary.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make the creation, renaming and removal of files durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Header:
    """A volume's identity and claims, in a small file that every VIOS looks at before it changes the volume.

    The file: magic, which tells whether the volume was allocated in full when it was made, UUID, then a
    record for each claim, in words of 64 bits (little-endian): the epoch, and where the owner gave a token,
    the epoch with a mark and the token's two halves with marks. Records are only ever appended, which the
    kernel does one at a time, so no lock is needed: a VIOS that is stopped in the middle holds nobody up, and
    of two claims of one epoch the first in the file counts. The file is read and not mapped: a mapping would
    end the process with SIGBUS if somebody cut the file.
    """

    def __init__(self, path: Path) -> None:
        """Open an existing header.

        :raise FileNotFoundError: there is none.
        :raise ValueError: it is damaged.
        """
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC)
        content = os.pread(self._descriptor, _HEADER.size, 0)
        size_bytes = os.fstat(self._descriptor).st_size
        if (
            not content.startswith((_MAGIC, _MAGIC_FULL))
            or size_bytes % _WORD_BYTES
            or len(content) != _HEADER.size
        ):
            self.close()
            raise ValueError(f"{path} is not a volume's header")
        magic, identity = _HEADER.unpack(content)
        self.id = str(uuid.UUID(bytes=identity))
        self.full = magic == _MAGIC_FULL
        """Whether the volume has all of its blocks, and keeps them."""
        self._end = _HEADER.size
        """Where the records end that were read."""
        self._claims = Claims()
        self._lock = threading.Lock()

    @staticmethod
    def create(path: Path, *, full: bool = False) -> None:
        """Write the header of a new volume durably; one that is there already stays."""
        temporary = path.with_name(f".{path.name}.{uuid.uuid4()}")
        replace_durably(temporary, _HEADER.pack(_MAGIC_FULL if full else _MAGIC, uuid.uuid4().bytes))
        try:
            # Unlike a rename this never takes another process's new header away.
            with contextlib.suppress(FileExistsError):
                path.hardlink_to(temporary)
        finally:
            temporary.unlink()
        sync_folder(path.parent)

    @property
    def current(self) -> Claim:
        """The present claim, whichever process has recorded it. Safe to ask from any thread."""
        # Most often nothing was appended: then no lock is taken.
        if os.pread(self._descriptor, 1, self._end):
            with self._lock:
                self._read_on()
        return self._claims.current

    def _read_on(self) -> None:
        while content := os.pread(self._descriptor, _READ_BYTES, self._end):
            words = struct.unpack(f"<{len(content) // _WORD_BYTES}Q", content[: len(content) & -_WORD_BYTES])
            used = 0
            while record := _record(words[used : used + _LONGEST_RECORD]):
                claim, length = record
                if claim is not None:
                    self._claims.add(claim)
                used += length
            if used == 0:
                return
            self._end += used * _WORD_BYTES

    def claim(self, claim: Claim) -> Claim:
        """Record a claim durably unless it is refused; return the present one, which then is another.

        :raise OSError: it could not be recorded.
        """
        current = self.current
        if claim != current and not self._claims.refuses(claim):
            record = _encode(claim)
            if os.write(self._descriptor, record) != len(record):
                raise OSError(errno.ENOSPC, "the claim was recorded in part")
            os.fdatasync(self._descriptor)
        return self.current

    def close(self) -> None:
        """Close the file."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __del__(self) -> None:
        """Close the file."""
        # An opened volume holds its header in a closure and lets it go with itself.
        self.close()

    def __enter__(self) -> Header:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()


def _encode(claim: Claim) -> bytes:
    if not claim.owner:
        return claim.epoch.to_bytes(_WORD_BYTES, "little")
    first, second = divmod(int(claim.owner, 16), 1 << _HALF_BITS)
    return struct.pack(
        "<3Q", claim.epoch | _OWNER_FOLLOWS, first | _HALF_OF_OWNER, second | _HALF_OF_OWNER | _SECOND_HALF
    )


def _record(words: tuple[int, ...]) -> tuple[Claim | None, int] | None:
    """Take the first record from `words`; returns it and its length in words, None while it is not whole.

    A record of which only a part was written, on a full device, counts as none.
    """
    if not words:
        return None
    epoch = words[0]
    if epoch == EPOCH_MAX or epoch < _SECOND_HALF:
        return Claim(epoch), 1
    if not epoch & _OWNER_FOLLOWS:
        return None, 1
    for index, marks in enumerate((_HALF_OF_OWNER, _HALF_OF_OWNER | _SECOND_HALF), start=1):
        if len(words) <= index:
            return None
        if words[index] >> 61 << 61 != marks:
            return None, index
    owner = (words[1] & _HALF_MASK) << _HALF_BITS | (words[2] & _HALF_MASK)
    return Claim(epoch & ~_OWNER_FOLLOWS, f"{owner:016x}"), 3
