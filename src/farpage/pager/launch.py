"""Starts the processes of data workers. It imports little, as it runs before all else that takes time.

After a crash of the whole hypervisor its clients wait for a worker, which is busy importing for a while: the
control process starts workers first and imports what it needs itself meanwhile.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from farpage.errors import InvalidInput

SOCKET_SUFFIX = ".sock"
"""A worker without a control process waits for one at PID.sock in its folder."""


@dataclass
class LaunchedWorker:
    """A data worker's process and this process's end of the channel to it; closing that ends the worker."""

    child: subprocess.Popen[bytes]
    connection: socket.socket

    def forget(self) -> None:
        """Close the channel if nobody has; a worker that has got no client ends by itself then."""
        self.connection.close()
        if self.child.poll() is None:
            self.child.returncode = 0  # it is nobody's child from now on


def worker_count(wanted: int | None, cpus: Collection[int] | None = None) -> int:
    """Return how many workers to start: one for each processor when nobody says, or for each of `cpus`."""
    return wanted or len(cpus or os.sched_getaffinity(0))


def workers_folder(run_folder: Path) -> Path:
    """Return where workers without a control process wait for one."""
    return run_folder / "workers"


def launch(folder: Path) -> LaunchedWorker:
    """Start one data worker; it listens in `folder` when it is up.

    :raise OSError: the process cannot be started.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        try:
            # In a session of its own, so that what ends this process's group leaves the clients their pager.
            child = subprocess.Popen(
                [sys.executable, "-m", "farpage.pager", str(theirs.fileno()), str(folder)],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError:
            ours.close()
            raise
    return LaunchedWorker(child, ours)


def launch_missing(folder: Path, count: int) -> list[LaunchedWorker]:
    """Start as many workers as are missing to `count`, going by the processes that sockets are named after.

    :raise InvalidInput: the folder cannot be made.
    :raise OSError: a process cannot be started.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise InvalidInput(
            "--run-dir", f"{error.filename}: {error.strerror}", "name a folder that you can write to"
        ) from error
    running = sum(Path("/proc", path.stem).exists() for path in folder.glob(f"*{SOCKET_SUFFIX}"))
    return [launch(folder) for _ in range(count - running)]
