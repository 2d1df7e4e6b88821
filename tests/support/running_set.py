"""Commands run against a set of real daemons."""

from __future__ import annotations

import json
import os
import select
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

Found = TypeVar("Found")

EVENTUALLY_SECONDS = 60.0


@dataclass(frozen=True)
class RunningSet:
    """A `farpage up` that is ready, and the document that it printed."""

    state: Path
    process: subprocess.Popen[str]
    document: dict[str, Any]


@dataclass(frozen=True)
class Answer:
    """What a command printed and returned."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Farpage = Callable[..., Answer]


def eventually(look: Callable[[], Found], good: Callable[[Found], bool]) -> Found:
    """Look again until what is found is good, for what a set does by itself within moments; return it."""
    deadline = time.monotonic() + EVENTUALLY_SECONDS
    while not good(found := look()):
        assert time.monotonic() < deadline, found
        time.sleep(0.05)
    return found


def wrong_pages(process: subprocess.Popen[str]) -> int:
    """Have a `memory_process` count the pages that do not hold their numbers."""
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write("check\n")
    process.stdin.flush()
    return int(process.stdout.readline())


def read_document(process: subprocess.Popen[str]) -> Any:
    """Read the indented JSON object that `up --json` prints when it is ready."""
    assert process.stdout is not None
    lines: list[str] = []
    for line in process.stdout:
        lines.append(line)
        if line == "}\n":
            return json.loads("".join(lines))
    raise AssertionError(f"farpage up ended with {process.wait()}")


def descendants(pid: int) -> list[int]:
    """Return the processes below a process (proc_pid_task_children(5))."""
    below: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in map(int, (task / "children").read_text().split()):
            below += [child, *descendants(child)]
    return below


class Watched:
    """Processes to wait for that are not children of this one."""

    def __init__(self, pids: list[int]) -> None:
        self._pidfds = [os.pidfd_open(pid) for pid in pids]

    def still_running(self, timeout_seconds: float) -> int:
        """Wait until all have ended, and return how many have not."""
        left = len(self._pidfds)
        for pidfd in self._pidfds:
            ended, _, _ = select.select([pidfd], [], [], timeout_seconds)
            left -= bool(ended)
            os.close(pidfd)
        return left
