"""The label of a directory, and the headers of its volumes: what all VIOS that share it agree on."""

from __future__ import annotations

import contextlib
import datetime
import errno
import os
import struct
import uuid
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

LABEL_NAME = "label.json"

_HEADER = struct.Struct("<8s16s")
_MAGIC = b"farpage\x01"
_RECORD_BYTES = 8
_READ_BYTES = 512 * _RECORD_BYTES


class Label(BaseModel):
    """What identifies a device: the same `uuid` seen by two VIOS is the same device."""

    model_config = ConfigDict(frozen=True, extra="forbid")

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
    """A volume's identity and epochs, in a small file that every VIOS looks at before it changes the volume.

    The file: magic, UUID, then one record (little-endian, 64 bits) for each time that an epoch was
    raised; the highest counts. Records are only ever appended, which the kernel does one at a time, so no
    lock is needed: a VIOS that is stopped in the middle holds nobody up. The file is read and not
    mapped: a mapping would end the process with SIGBUS if somebody cut the file.
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
        if not content.startswith(_MAGIC) or size_bytes % _RECORD_BYTES or len(content) != _HEADER.size:
            self.close()
            raise ValueError(f"{path} is not a volume's header")
        _magic, identity = _HEADER.unpack(content)
        self.id = str(uuid.UUID(bytes=identity))
        self._known = (_HEADER.size, 0)
        """Where the records end that were read, and their highest."""

    @staticmethod
    def create(path: Path) -> None:
        """Write the header of a new volume durably; one that is there already stays."""
        temporary = path.with_name(f".{path.name}.{uuid.uuid4()}")
        replace_durably(temporary, _HEADER.pack(_MAGIC, uuid.uuid4().bytes))
        try:
            # Unlike a rename this never takes another process's new header away.
            with contextlib.suppress(FileExistsError):
                path.hardlink_to(temporary)
        finally:
            temporary.unlink()
        sync_folder(path.parent)

    @property
    def epoch(self) -> int:
        """The highest epoch that any process has recorded, 0 for none. Safe to ask from any thread."""
        end, highest = self._known
        while records := os.pread(self._descriptor, _READ_BYTES, end):
            whole = len(records) // _RECORD_BYTES * _RECORD_BYTES
            if whole == 0:
                break
            highest = max(highest, *struct.unpack(f"<{whole // _RECORD_BYTES}Q", records[:whole]))
            end += whole
        # One assignment, so that position and highest always belong together, whichever thread is last.
        self._known = (end, highest)
        return highest

    def raise_epoch(self, epoch: int) -> int:
        """Record an epoch durably if it is the highest; return the highest.

        :raise OSError: it could not be recorded.
        """
        if epoch > self.epoch:
            if os.write(self._descriptor, epoch.to_bytes(_RECORD_BYTES, "little")) != _RECORD_BYTES:
                raise OSError(errno.ENOSPC, "the epoch was recorded in part")
            os.fdatasync(self._descriptor)
        return self.epoch

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
