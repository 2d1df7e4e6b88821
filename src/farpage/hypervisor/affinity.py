"""Keeps data workers on the CPUs that they are to run on, while what these are changes.

The control process does it, not the workers: their loops answer clients, and reading what the threads of many
clients may run on takes milliseconds. A worker without a control process stays where it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Final

from farpage.hypervisor.workercpus import WorkerCpus, client_cpus
from farpage.hypervisor.workers import TICK_SECONDS, WorkerProcess
from farpage.kernel.affinity import Cpus, confine, cpus_by_thread, cpus_of, format_cpus, thread_name
from farpage.log import get_logger

log = get_logger()

LOOK_SECONDS: Final = 2.0
"""Clients' threads are looked at so often, and when a worker has got a client or lost one."""

LOOK_TICKS: Final = round(LOOK_SECONDS / TICK_SECONDS)


@dataclass
class _Confined:
    """What is known of a worker: where it runs, for which processes, and whether a failure was told."""

    cpus: Cpus | None
    clients: frozenset[int] | None = None
    told: bool = False


class WorkerAffinity:
    """The CPUs of all data workers of a hypervisor."""

    def __init__(
        self,
        setting: WorkerCpus,
        workers: Callable[[], Iterable[WorkerProcess]],
        pid_of: Callable[[str], int | None],
    ) -> None:
        """`workers` returns those that there are, `pid_of` the process of a client that is attached."""
        self._setting = setting
        self._workers = workers
        self._pid_of = pid_of
        self._known: dict[int, _Confined] = {}
        self._ticks = 0

    def look(self) -> None:
        """Move each worker that is to run elsewhere; call it each `TICK_SECONDS`. It raises nothing."""
        self._ticks += 1
        known = self._known
        self._known = {}
        for worker in self._workers():
            if worker.lost:
                continue
            confined = known.get(worker.pid) or _Confined(cpus_of(worker.pid))
            self._known[worker.pid] = confined
            clients = self._processes(worker)
            if worker.clients and not clients:
                continue  # adopted, and so are its clients in a moment
            if confined.clients != clients or self._ticks % LOOK_TICKS == 0:
                confined.clients = clients
                self._move(worker, confined)

    def _processes(self, worker: WorkerProcess) -> frozenset[int]:
        pids = (self._pid_of(client) for client in worker.clients)
        return frozenset(pid for pid in pids if pid is not None)

    def _move(self, worker: WorkerProcess, confined: _Confined) -> None:
        wanted = self._setting.wanted(_cpus_of_all(confined.clients or ()))
        if wanted == confined.cpus:
            return
        try:
            confine(worker.pid, wanted)
        except OSError as error:
            if not confined.told:
                log.warning(
                    "worker_not_moved", pid=worker.pid, cpus=format_cpus(wanted), problem=error.strerror
                )
            confined.told = True
        else:
            confined.cpus = wanted
            log.info("worker_moved", pid=worker.pid, cpus=format_cpus(wanted))


def _cpus_of_all(pids: Iterable[int]) -> Iterator[Cpus]:
    return (client_cpus(cpus_by_thread(pid), partial(thread_name, pid)) for pid in pids)
