"""A client whose memory is paged, as the control process knows it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from farpage.attach.memory import ClientKind, ClientMemory
from farpage.hypervisor.model import Attachment
from farpage.hypervisor.workers import WorkerProcess
from farpage.pager.attachmentrecord import AttachmentRecord
from farpage.pager.messages import ReplicaSpec
from farpage.pager.statefile import StateFile

ATTACHMENTS = {ClientKind.PROCESS: Attachment.PROCESS, ClientKind.REGION: Attachment.REGION}


@dataclass
class Attached:
    """A client whose memory is paged."""

    record: AttachmentRecord
    memory: ClientMemory
    state: StateFile
    worker: WorkerProcess
    limit_bytes: int
    attaching: bool = False
    """Its worker has not said yet that it pages it; should that end first, whoever asked it sees to that."""
    served: tuple[ReplicaSpec, ...] = ()
    """The replicas that its worker uses, or may use; the order in `record` has those of the next one."""
    replaced_epoch: int = 0
    """The newest epoch of a worker that was replaced: what it has asked for and was not begun is not done."""
    paged: asyncio.Event = field(default_factory=asyncio.Event)
    """It has a worker: cleared while a lost one is replaced."""

    finishing: asyncio.Task[None] | None = None
    """Lets go of a process whose worker ended after it had detached it, and before it could say so."""

    @property
    def ephemeral(self) -> bool:
        """Created for this attachment and deleted after it."""
        return self.record.kind is ClientKind.REGION and self.record.made_for_it

    @property
    def qmp(self) -> str | None:
        """QMP socket by which the guest is paused while no path works."""
        return self.record.qmp

    @property
    def guest_paused(self) -> bool:
        """It is paused by that now."""
        return self.record.guest_paused

    def descriptors(self) -> list[int]:
        """Return what goes with an `attach` to a worker."""
        return [self.memory.uffd.fileno(), self.memory.memfd, self.state.fileno(), self.memory.pidfd]
