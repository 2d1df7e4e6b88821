"""The label of a directory, and the headers of its volumes: what all VIOS that share it agree on."""

from __future__ import annotations

import contextlib
import datetime
import os
import struct
import uuid
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from farpage.device.base import EPOCH_MAX

LABEL_NAME = "label.json"

_HEADER = struct.Struct("<8s16sQ")
_MAGIC = b"farpage\x01"
_EPOCH_OFFSET = 24


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
    """A volume's identity and epoch, in a small file that every VIOS looks at before it changes the volume.

    The file: magic, UUID, epoch (little-endian, 64 bits). It is read anew each time and not mapped:
    a mapping would end the process with SIGBUS if somebody cut the file.
    """

    def __init__(self, path: Path) -> None:
        """Open an existing header.

        :raise FileNotFoundError: there is none.
        :raise ValueError: it is damaged.
        """
        self._descriptor = -1
        self._descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        content = os.pread(self._descriptor, _HEADER.size, 0)
        if len(content) != _HEADER.size or not content.startswith(_MAGIC):
            self.close()
            raise ValueError(f"{path} is not a volume's header")
        _magic, identity, _epoch = _HEADER.unpack(content)
        self.id = str(uuid.UUID(bytes=identity))

    @staticmethod
    def create(path: Path) -> None:
        """Write the header of a new volume durably; one that is there already stays."""
        temporary = path.with_name(f".{path.name}.{uuid.uuid4()}")
        replace_durably(temporary, _HEADER.pack(_MAGIC, uuid.uuid4().bytes, 0))
        try:
            # Unlike a rename this never takes another process's new header away.
            with contextlib.suppress(FileExistsError):
                path.hardlink_to(temporary)
        finally:
            temporary.unlink()
        sync_folder(path.parent)

    @property
    def epoch(self) -> int:
        """The highest epoch that any process has recorded; the highest possible if it cannot be read."""
        content = os.pread(self._descriptor, 8, _EPOCH_OFFSET)
        return int.from_bytes(content, "little") if len(content) == 8 else EPOCH_MAX

    def set_epoch(self, epoch: int) -> None:
        """Record an epoch durably; the caller holds the device's lock and never lowers it."""
        os.pwrite(self._descriptor, epoch.to_bytes(8, "little"), _EPOCH_OFFSET)
        os.fdatasync(self._descriptor)

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
