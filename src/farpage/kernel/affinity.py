"""On which CPUs threads may run, and lists of CPUs as the kernel writes them.

See sched_setaffinity(2), proc(5) and cpuset(7), "List format".

Uses the standard library alone, as it is loaded before a hypervisor starts its workers.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Final, TypeAlias

from farpage.errors import InvalidInput

Cpus: TypeAlias = frozenset[int]

CPU_COUNT_MAX: Final = 8192
"""As many as the kernel can be built for on x86-64 (CONFIG_NR_CPUS)."""

_RANGE = re.compile(r"([0-9]{1,5})(?:-([0-9]{1,5}))?")


def parse_cpus(text: str, *, field: str = "cpus") -> Cpus:
    """Return the CPUs of a list such as `0-3,8`.

    :raise InvalidInput: naming `field`, for anything else, for a range that falls and for no CPU at all.
    """
    cpus: set[int] = set()
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise InvalidInput(field, f"{text!r} is not a list of CPUs", "write a list like 0-3,8")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise InvalidInput(field, f"{part.strip()!r} ends before it begins", "write a list like 0-3,8")
        if last >= CPU_COUNT_MAX:
            raise InvalidInput(
                field, f"{last} is no CPU's number", f"write numbers from 0 to {CPU_COUNT_MAX - 1}"
            )
        cpus.update(range(first, last + 1))
    return frozenset(cpus)


def format_cpus(cpus: Iterable[int]) -> str:
    """Return the list of some CPUs, as short as it can be: `0-3,8`."""
    ordered = sorted(cpus)
    begins = [b for a, b in pairwise([-2, *ordered]) if b != a + 1]
    ends = [a for a, b in pairwise([*ordered, CPU_COUNT_MAX + 1]) if b != a + 1]
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in zip(begins, ends, strict=True))


def own_cpus() -> Cpus:
    """Return the CPUs that this process may run on, and those that it starts."""
    return frozenset(os.sched_getaffinity(0))


def cpus_of(thread: int) -> Cpus | None:
    """Return the CPUs that a thread may run on, or a process's main thread; None when it has ended."""
    try:
        return frozenset(os.sched_getaffinity(thread))
    except OSError:
        return None


def cpus_by_thread(pid: int) -> dict[int, Cpus]:
    """Return the CPUs of each thread of a process, without those that end meanwhile; empty when it has."""
    found = {}
    with suppress(OSError):
        for folder in Path(f"/proc/{pid}/task").iterdir():
            cpus = cpus_of(int(folder.name))
            if cpus is not None:
                found[int(folder.name)] = cpus
    return found


def thread_name(pid: int, thread: int) -> str:
    """Return the name of a process's thread (15 bytes at most); empty when it has ended."""
    try:
        return Path(f"/proc/{pid}/task/{thread}/comm").read_text(errors="replace").rstrip("\n")
    except OSError:
        return ""


def confine(pid: int, cpus: Cpus) -> None:
    """Have a process run on these CPUs alone, with all its threads; those to come inherit it.

    The kernel's own threads in it (io_uring's) stay where they are.

    :raise OSError: EINVAL when none of them may be used, EPERM without permission, ESRCH when it has ended.
    """
    os.sched_setaffinity(pid, cpus)
    for folder in Path(f"/proc/{pid}/task").iterdir():
        with suppress(OSError):
            os.sched_setaffinity(int(folder.name), cpus)
