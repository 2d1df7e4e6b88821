"""Goes on with the clients of dead data workers while there is no control process to see to that.

A worker without clients that has lost its control process becomes an heir when records are left in the run
folder. As soon as the process of another worker is gone it does what a control process would do
(`farpage.hypervisor.recovery`): takes the client's memory from its process and its page table from the state
file, enters itself in the record, and recovers it. So the accesses of clients whose control process and
worker are killed at one time wait neither for a new control process nor for what that has to load.

Nobody else may do the same. It is done under the lock that a control process holds as long as it lives, and a
control process asks, when it has got that, every worker for its clients before it gives one away.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Final

from farpage.attach.memory import ClientMemory
from farpage.attach.retake import retake
from farpage.errors import FarpageError
from farpage.kernel.process import ProcessIdentity, identify, open_identified
from farpage.log import get_logger
from farpage.pager.attachmentrecord import (
    AttachmentRecord,
    clients_folder,
    lock_path,
    read_record,
    read_records,
    save_record,
    state_path,
)
from farpage.pager.messages import Attach
from farpage.pager.statefile import StateFile

log = get_logger()

WAIT_SECONDS: Final = 60.0
"""A worker without clients ends after so long without a control process."""
TICK_SECONDS: Final = 0.02

Recover = Callable[[Attach, ClientMemory, StateFile], Awaitable[None]]
"""Page a client; it counts as this worker's before this first waits for anything."""


class Heir:
    """What becomes of the clients of other workers of one run folder."""

    def __init__(self, run_folder: Path, recover: Recover) -> None:
        self._run_folder = run_folder
        self._clients = clients_folder(run_folder)
        self._recover = recover
        self._myself = identify(os.getpid())

    async def wait(self, alone: Callable[[], bool]) -> None:
        """Take clients over while `alone`; returns at once when there are none, or none is left."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + WAIT_SECONDS
        left: dict[ProcessIdentity, list[str]] = defaultdict(list)
        for record in read_records(self._clients):
            if _worker_of(record) not in (None, self._myself):
                assert record.worker is not None
                left[record.worker].append(record.client)
        while left and alone() and loop.time() < deadline:
            for worker in [worker for worker in left if _ended(worker)]:
                clients = left[worker]
                while clients and alone() and await self._take(clients[-1]):
                    clients.pop()
                if not clients:
                    del left[worker]
            await asyncio.sleep(TICK_SECONDS)

    async def _take(self, client: str) -> bool:
        """Go on with a client if nobody else does; False when a control process holds the lock."""
        with self._locked() as locked:
            if locked:
                try:
                    await self._go_on(client)
                except (OSError, FarpageError) as error:
                    # The next control process has the same in its way, and says so in an alarm.
                    log.warning("client_not_inherited", client=client, problem=str(error))
            return locked

    async def _go_on(self, client: str) -> None:
        record = read_record(self._clients, client)
        if record is None or record.memory is None or record.order is None:
            return
        worker = _worker_of(record)
        if worker is None or not _ended(worker):
            return  # another heir has it
        memory = retake(record.memory)
        if memory is None:
            return
        with ExitStack() as undo:
            undo.callback(memory.close_descriptors)
            if not memory.is_registered():
                return
            state = StateFile.open(state_path(self._clients, client))
            undo.callback(state.close)
            order = record.order.model_copy(update={"recover": True})
            save_record(self._clients, record.model_copy(update={"order": order, "worker": self._myself}))
            undo.pop_all()
        log.info("client_inherited", client=client, worker=worker.pid)
        await self._recover(order, memory, state)

    @contextmanager
    def _locked(self) -> Iterator[bool]:
        descriptor = os.open(lock_path(self._run_folder), os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        else:
            yield True
        finally:
            os.close(descriptor)


def _worker_of(record: AttachmentRecord) -> ProcessIdentity | None:
    """Return which worker a client was given; None where a control process has to decide first."""
    if record.memory is None or record.order is None or record.releasing or record.handover is not None:
        return None
    return record.worker


def _ended(process: ProcessIdentity) -> bool:
    pidfd = open_identified(process)
    if pidfd is None:
        return True
    os.close(pidfd)
    return False
