"""Where a benchmark ran, in words."""

from __future__ import annotations

import os
from pathlib import Path


def describe_machine() -> str:
    """Return processor, memory and kernel."""
    model = "unknown processor"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{model}, {os.cpu_count()} CPUs, {memory_bytes >> 20} MiB, Linux {os.uname().release}"


def put_ahead(pid: int = 0) -> None:
    """Have a process and what it starts from now on run before everything else on the machine (SCHED_RR).

    On a machine that is busy with other work figures are then those of an idle one, but for memory and
    disk. It needs root, or RLIMIT_RTPRIO (sched(7)).

    :raise SystemExit: it is not allowed.
    """
    try:
        for task in Path(f"/proc/{pid or os.getpid()}/task").iterdir():
            os.sched_setscheduler(int(task.name), os.SCHED_RR, os.sched_param(1))
    except PermissionError as error:
        raise SystemExit(f"--realtime is not allowed: {error}") from error


def put_back() -> None:
    """Have this process be as others again; those that it has started stay as they are."""
    os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


def describe_placement() -> str:
    """Return the CPUs that this process and its children may use, and how busy the machine is."""
    cpus = ", ".join(str(number) for number in sorted(os.sched_getaffinity(0)))
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    return f"CPUs {cpus} (load averages {load})"


def describe_disk(folder: Path) -> str:
    """Return the device and the file system that a folder is on."""
    device, kind, longest = "unknown", "unknown", -1
    for line in Path("/proc/self/mounts").read_text().splitlines():
        source, mounted, file_system = line.split()[:3]
        if folder.is_relative_to(mounted) and len(mounted) >= longest:
            device, kind, longest = source, file_system, len(mounted)
    return f"{device} ({kind})"
