"""What is kept in the run folder of each client that is attached, for whoever goes on with it.

The control process writes it; a data worker that takes the place of a dead one while there is no control
process enters itself (`farpage.pager.heir`).
"""

from __future__ import annotations

from pathlib import Path

from msgspec import DecodeError

from farpage.attach.memory import ClientKind
from farpage.attach.retake import MemoryRecord
from farpage.kernel.process import ProcessIdentity
from farpage.log import get_logger
from farpage.message import Message
from farpage.pager.messages import Attach

log = get_logger()


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
    releases: int = 0
    """How often that was begun, so that a page table that comes late from one that was given up is known."""


def lock_path(run_folder: Path) -> Path:
    """Return the file that a control process holds the lock of, as long as it lives."""
    return run_folder / "lock"


def clients_folder(run_folder: Path) -> Path:
    """Return where records and state files are."""
    return run_folder / "clients"


def state_path(clients: Path, client: str) -> Path:
    """Return where a client's state file is."""
    return clients / f"{client}.state"


def record_path(clients: Path, client: str) -> Path:
    """Return where a client's record is."""
    return clients / f"{client}.json"


def save_record(clients: Path, record: AttachmentRecord) -> None:
    """Store a client's record, in place of any.

    :raise OSError: the folder cannot be written.
    """
    path = record_path(clients, record.client)
    fresh = path.with_suffix(".new")
    fresh.write_text(record.model_dump_json())
    fresh.replace(path)


def read_record(clients: Path, client: str) -> AttachmentRecord | None:
    """Read a client's record; None when there is none that can be read."""
    path = record_path(clients, client)
    return _read(path) if path.exists() else None


def read_records(clients: Path) -> list[AttachmentRecord]:
    """Read all records that can be read."""
    found = map(_read, sorted(clients.glob("*.json")))
    return [record for record in found if record is not None]


def _read(path: Path) -> AttachmentRecord | None:
    try:
        return AttachmentRecord.model_validate_json(path.read_bytes())
    except (OSError, DecodeError) as error:
        log.error("attachment_record_unreadable", path=str(path), problem=str(error))
        return None
