"""What comes with an attachment as descriptors: the client's memory and the states of its pages."""

from __future__ import annotations

import os
from pathlib import Path

from farpage.attach.memory import ClientMemory
from farpage.definition.states import PAGE_BYTES
from farpage.kernel.userfaultfd import Userfaultfd
from farpage.pager.messages import Attach
from farpage.pager.statefile import StateFile, StateFileUnusable


def received(
    order: Attach, descriptors: list[int], *, remote_uffd: int | None = None
) -> tuple[ClientMemory, StateFile]:
    """Take what an attachment hands over: userfaultfd, memfd, state file and pidfd, in this order.

    `remote_uffd` is the number of the userfaultfd in the client's process.

    :raise StateFileUnusable: every descriptor is closed then.
    """
    uffd, memfd, table, pidfd = descriptors
    memory = ClientMemory(
        kind=order.kind,
        pid=order.pid,
        pidfd=pidfd,
        uffd=Userfaultfd(uffd),
        memfd=memfd,
        start_address=order.start_address,
        length_bytes=order.pages * PAGE_BYTES,
        memfd_offset_bytes=order.memfd_offset_bytes,
        remote_uffd=remote_uffd,
    )
    try:
        return memory, StateFile.attach(table, Path(order.state_path))
    except StateFileUnusable:
        memory.close_descriptors()
        raise
    finally:
        os.close(table)
