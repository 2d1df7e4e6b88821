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
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from farpage.errors import ExitStatus, FarpageError, InvalidInput
from farpage.pager.attachmentrecord import (
    AttachmentRecord,
    clients_folder,
    lock_path,
    read_record,
    read_records,
    record_path,
    save_record,
    state_path,
)
from farpage.pager.launch import workers_folder

LOCK_SECONDS = 1.0
"""A worker that goes on with a client of a dead one holds the lock for a moment."""
LOCK_PAUSE_SECONDS = 0.005


@dataclass(eq=False)
class RunFolderInUse(FarpageError):
    """Another control process has the run folder, and so the data workers in it."""

    code = "run_folder_in_use"
    template = "a hypervisor runs with run folder {folder} already"
    remedy = "stop that one, or name another folder with --run-dir"
    exit_status = ExitStatus.CONFLICT
    folder: str


class RunFolder:
    """One run folder, of one control process at a time."""

    def __init__(self, path: Path) -> None:
        """Lock the folder and make what is missing in it.

        :raise RunFolderInUse: another control process has it.
        :raise InvalidInput: it cannot be made or written.
        """
        self.path = path
        self.workers = workers_folder(path)
        self._clients = clients_folder(path)
        try:
            for folder in (path, self.workers, self._clients):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(lock_path(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise InvalidInput(
                "--run-dir", f"{error.filename}: {error.strerror}", "name a folder that you can write to"
            ) from error
        deadline = time.monotonic() + LOCK_SECONDS
        while not self._locked():
            if time.monotonic() > deadline:
                os.close(self._lock)
                raise RunFolderInUse(str(path))
            time.sleep(LOCK_PAUSE_SECONDS)

    def _locked(self) -> bool:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        """Let another control process have the folder."""
        os.close(self._lock)

    def state_path(self, client: str) -> Path:
        """Return where a client's state file is."""
        return state_path(self._clients, client)

    def save(self, record: AttachmentRecord) -> None:
        """Store a client's record, in place of any.

        :raise InvalidInput: the folder cannot be written.
        """
        try:
            save_record(self._clients, record)
        except OSError as error:
            raise InvalidInput(
                "--run-dir", f"{error.filename}: {error.strerror}", "make room in the run folder"
            ) from error

    def remove(self, client: str) -> None:
        """Forget a client: nothing of its attachment is left. The record goes last."""
        for path in (self.state_path(client), record_path(self._clients, client)):
            with suppress(FileNotFoundError):
                path.unlink()

    def record(self, client: str) -> AttachmentRecord | None:
        """Read a client's record; None when there is none that can be read."""
        return read_record(self._clients, client)

    def records(self) -> list[AttachmentRecord]:
        """Read all records."""
        return read_records(self._clients)
