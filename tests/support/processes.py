"""What the processes of a set have open, and which run."""

from __future__ import annotations

import asyncio
import ctypes
import os
import signal
import struct
import subprocess
from pathlib import Path

from farpage.embedded.set import EmbeddedSet
from farpage.kernel.ending import until_gone
from farpage.kernel.libc import syscall

DEADLINE_SECONDS = 60.0

_SCHED_GETATTR = 315
"""Of x86-64."""
_ATTRIBUTES = struct.Struct("=IIQiIQQQ")


async def worker_pid(embedded: EmbeddedSet, client: str) -> int:
    """Return the process number of the data worker that pages a client."""
    info = await embedded.hypervisor.client(client)
    return {worker.index: worker.pid for worker in (await embedded.hypervisor.info()).workers}[
        info.worker or 0
    ]


def workers_running(embedded: EmbeddedSet) -> set[int]:
    """Return the data workers of a set, whoever started them and whether or not anybody talks to them."""
    folder = str(embedded.layout.hypervisor_dir / "run" / "workers").encode()
    found: set[int] = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                arguments = (entry / "cmdline").read_bytes().split(b"\0")
            except OSError:
                continue
            if b"farpage.pager" in arguments and folder in arguments:
                found.add(int(entry.name))
    return found


async def until_no_worker(embedded: EmbeddedSet) -> None:
    """Wait until no data worker of a set is left."""
    async with asyncio.timeout(DEADLINE_SECONDS):
        while workers_running(embedded):
            await asyncio.sleep(0.05)


def slice_of(thread: int) -> float:
    """Return a thread's slice in seconds; 0 where the kernel has none for each, before Linux 6.12."""
    attributes = ctypes.create_string_buffer(_ATTRIBUTES.size)
    syscall(_SCHED_GETATTR, thread, ctypes.addressof(attributes), _ATTRIBUTES.size, 0)
    runtime: int = _ATTRIBUTES.unpack(attributes.raw)[5]
    return runtime / 1e9


def descriptors_of(pid: int, *, leave_out: frozenset[str] = frozenset()) -> list[str]:
    """Return what a process has open, sorted, sockets and pipes without their numbers."""
    found: list[str] = []
    for link in Path(f"/proc/{pid}/fd").iterdir():
        try:
            name = str(link.readlink())
        except OSError:
            continue
        if name not in leave_out:
            found.append(name.split(":[", maxsplit=1)[0])
    return sorted(found)


def control_connections() -> frozenset[str]:
    """Return both ends of all connections to control APIs, as `/proc/PID/fd` names them.

    They are kept for the next request, as many as there were requests at a time.
    """
    listed = subprocess.run(["ss", "-xH"], capture_output=True, text=True, check=True).stdout
    ends: set[str] = set()
    for line in listed.splitlines():
        # Netid State Recv-Q Send-Q, the own end's path and number, then the peer's
        columns = line.split()
        if len(columns) >= 8 and columns[4].endswith("/control.sock"):
            ends.update((f"socket:[{columns[5]}]", f"socket:[{columns[7]}]"))
    return frozenset(ends)


async def kill_and_wait(pid: int) -> None:
    """Kill a process, and wait until it is gone."""
    pidfd = os.pidfd_open(pid)
    try:
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(DEADLINE_SECONDS):
            await until_gone(pidfd)
    finally:
        os.close(pidfd)
