"""On which CPUs data workers run: what `--worker-cpus` says, and what follows from it. No I/O.

A page-in is two wake-ups, of the worker and of the client's thread: some 10 us each on one core, some 45 us
across cores. It is loaded before a hypervisor starts its workers, so it imports little.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from farpage.errors import InvalidInput
from farpage.kernel.affinity import Cpus, format_cpus, parse_cpus

OPTION: Final = "--worker-cpus"
ANY: Final = "any"
CLIENTS: Final = "clients"

_VCPU = re.compile(r"CPU [0-9]+/.*|.*vcpu ?[0-9]+")
"""Names of threads that run a guest: `CPU 0/KVM` of QEMU, `fc_vcpu 0` of Firecracker, `vcpu0` of others."""

_KERNEL_THREAD = re.compile(r"iou-(wrk|sqp)-.*")
"""Names of io_uring's threads in a process, which the kernel puts where it likes."""


@dataclass(frozen=True)
class WorkerCpus:
    """What `--worker-cpus` says, for a hypervisor that may use the CPUs `allowed`."""

    allowed: Cpus
    listed: Cpus | None = None
    """The CPUs of a list that may be used; None when there is none."""
    follow_clients: bool = False

    def wanted(self, clients: Iterable[Cpus]) -> Cpus:
        """Return the CPUs for a worker whose clients may run on these, which are looked at where it matters.

        Never none.
        """
        if self.follow_clients:
            return frozenset[int]().union(*clients) & self.allowed or self.allowed
        return self.listed or self.allowed


def parse_worker_cpus(text: str, allowed: Cpus) -> WorkerCpus:
    """Return what `any`, `clients` or a list such as `0-3,8` means where the CPUs `allowed` may be used.

    :raise InvalidInput: it is none of them, or a list without any CPU that may be used.
    """
    if text in (ANY, CLIENTS):
        return WorkerCpus(allowed, follow_clients=text == CLIENTS)
    try:
        listed = parse_cpus(text, field=OPTION)
    except InvalidInput as error:
        raise InvalidInput(OPTION, error.problem, f"{error.hint}, or '{ANY}' or '{CLIENTS}'") from None
    if not listed & allowed:
        raise InvalidInput(
            OPTION,
            f"the hypervisor may use none of the CPUs {text}",
            f"name some of those that it may use: {format_cpus(allowed)}",
        )
    return WorkerCpus(allowed, listed=listed & allowed)


def client_cpus(threads: Mapping[int, Cpus], name_of: Callable[[int], str]) -> Cpus:
    """Return the CPUs on which a client may wait for a page, from those of its process's threads.

    Where they differ, a guest's are those of its vCPUs: libvirt's vcpupin pins them, and leaves the others of
    the VMM on all CPUs. `name_of` is asked then alone.
    """
    if len(set(threads.values())) > 1:
        names = {thread: name_of(thread) for thread in threads}
        vcpus = [thread for thread, name in names.items() if _VCPU.fullmatch(name)]
        own = [thread for thread, name in names.items() if not _KERNEL_THREAD.fullmatch(name)]
        threads = {thread: threads[thread] for thread in vcpus or own}
    return frozenset[int]().union(*threads.values())
