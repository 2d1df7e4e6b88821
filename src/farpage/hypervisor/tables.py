"""Page tables of clients that go to another hypervisor: made from a state file, laid out in one.

Loaded when there is one to make or to lay out: it needs numpy, without which a control process starts sooner.
"""

from __future__ import annotations

import numpy as np

from farpage import handover
from farpage.handover import Handover, HandoverDamaged
from farpage.pager.statefile import StateFile
from farpage.pager.states import ON_DEVICE, POISONED, ZERO
from farpage.pager.table import PageTable


def table_of(client: str, epoch: int, attempt: int, state: StateFile) -> bytes:
    """Encode the table of a client that is all on its volume.

    :raise HandoverDamaged: it is not: a bug.
    """
    table = PageTable(state.pages, state.table_storage)
    on_device, lost = table.states == ON_DEVICE, table.states == POISONED
    if not np.all(on_device | lost | (table.states == ZERO)):
        raise HandoverDamaged(f"client {client!r}", "some of its pages are in memory still")
    return handover.encode(Handover(client, epoch, attempt, on_device, lost, table.checksums.copy()))


def lay_out(found: Handover, state: StateFile) -> None:
    """Enter a handover in a new state file: no page is in memory, whatever the memory holds."""
    table = PageTable(state.pages, state.table_storage)
    states = np.full(state.pages, ZERO, np.uint8)
    states[found.on_device] = ON_DEVICE
    states[found.lost] = POISONED
    table.checksums[:] = found.checksums
    table.restate(states)
    state.foreign = True
