"""The run folder: what outlives the hypervisor's processes and makes up the next ones' knowledge.

    lock                 held by the control process
    workers/PID.sock     where a data worker waits for the next control process
    clients/NAME.json    a client that is attached, or half so: `AttachmentRecord`
    clients/NAME.state   its page table: `farpage.pager.statefile`

Best on tmpfs (/run): it is of no use after the host has been started anew, as then the clients are gone too.
"""

from __future__ import annotations

import fcntl
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from msgspec import DecodeError

from farpage.attach.memory import ClientKind
from farpage.attach.retake import MemoryRecord
from farpage.errors import ExitStatus, FarpageError, InvalidInput
from farpage.kernel.process import ProcessIdentity
from farpage.log import get_logger
from farpage.message import Message
from farpage.pager.launch import workers_folder
from farpage.pager.messages import Attach

log = get_logger()


@dataclass(eq=False)
class RunFolderInUse(FarpageError):
    """Another control process has the run folder, and so the data workers in it."""

    code = "run_folder_in_use"
    template = "a hypervisor runs with run folder {folder} already"
    remedy = "stop that one, or name another folder with --run-dir"
    exit_status = ExitStatus.CONFLICT
    folder: str


class AdoptedRelease(Message, frozen=True, kw_only=True):
    """`farpage.definition.model.Release`, as it is kept here."""

    hypervisor: str
    epoch: int
    digest: str
    adopter: str


class AttachmentRecord(Message, frozen=True, kw_only=True):
    """How far a client's attachment has come, and all that is needed to go on with it or to undo it.

    Written before the process is touched, again with `memory` and `order` before a worker is told, and
    removed after the last step of the detachment.
    """

    client: str
    kind: ClientKind
    process: ProcessIdentity
    uffds_before: tuple[int, ...] = ()
    """Userfaultfds that the process had before one was made in it."""
    made_for_it: bool = False
    """The client was created for this attachment, and is deleted when that ends."""
    memory: MemoryRecord | None = None
    order: Attach | None = None
    """What its worker was told; the epoch may have risen since, see the state file."""
    worker: ProcessIdentity | None = None
    qmp: str | None = None
    """QMP socket by which the guest is paused while no path works."""
    guest_paused: bool = False
    """It is paused by that now."""
    scrub_rate_bytes: int | None = None
    """A scrub at that rate is under way: a worker that takes over begins it anew."""
    handover: AdoptedRelease | None = None
    """What it begins with, while its worker has not said yet that it pages it."""
    releasing: bool = False
    """It is frozen, and about to be let go of for another hypervisor; the definition says how far that is."""


class RunFolder:
    """One run folder, of one control process at a time."""

    def __init__(self, path: Path) -> None:
        """Lock the folder and make what is missing in it.

        :raise RunFolderInUse: another control process has it.
        :raise InvalidInput: it cannot be made or written.
        """
        self.path = path
        self.workers = workers_folder(path)
        self._clients = path / "clients"
        try:
            for folder in (path, self.workers, self._clients):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise InvalidInput(
                "--run-dir", f"{error.filename}: {error.strerror}", "name a folder that you can write to"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            os.close(self._lock)
            raise RunFolderInUse(str(path)) from error

    def close(self) -> None:
        """Let another control process have the folder."""
        os.close(self._lock)

    def state_path(self, client: str) -> Path:
        """Return where a client's state file is."""
        return self._clients / f"{client}.state"

    def save(self, record: AttachmentRecord) -> None:
        """Store a client's record, in place of any.

        :raise InvalidInput: the folder cannot be written.
        """
        path = self._record_path(record.client)
        fresh = path.with_suffix(".new")
        try:
            fresh.write_text(record.model_dump_json())
            fresh.replace(path)
        except OSError as error:
            raise InvalidInput(
                "--run-dir", f"{error.filename}: {error.strerror}", "make room in the run folder"
            ) from error

    def remove(self, client: str) -> None:
        """Forget a client: nothing of its attachment is left. The record goes last."""
        for path in (self.state_path(client), self._record_path(client)):
            with suppress(FileNotFoundError):
                path.unlink()

    def record(self, client: str) -> AttachmentRecord | None:
        """Read a client's record; None when there is none that can be read."""
        path = self._record_path(client)
        return _read(path) if path.exists() else None

    def records(self) -> list[AttachmentRecord]:
        """Read all records."""
        found = map(_read, sorted(self._clients.glob("*.json")))
        return [record for record in found if record is not None]

    def _record_path(self, client: str) -> Path:
        return self._clients / f"{client}.json"


def _read(path: Path) -> AttachmentRecord | None:
    try:
        return AttachmentRecord.model_validate_json(path.read_bytes())
    except (OSError, DecodeError) as error:
        log.error("attachment_record_unreadable", path=str(path), problem=str(error))
        return None
