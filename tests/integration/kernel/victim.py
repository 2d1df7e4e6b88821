"""A process that tells whether it was disturbed; see victim.c."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from types import TracebackType


@dataclass(frozen=True)
class Verdict:
    signals: int
    failures: int
    messages: str


class Victim:
    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        self.threads: dict[str, int] = {}
        assert self.process.stdout is not None
        for line in iter(self.process.stdout.readline, "ready\n"):
            thread, name = line.split()
            self.threads[name] = int(thread)

    @property
    def pid(self) -> int:
        return self.process.pid

    def finish(self) -> Verdict:
        """Let it end by itself and return what it noticed."""
        output, messages = self.process.communicate("q", timeout=20)
        found = re.search(r"signals=(\d+) failures=(\d+)", output)
        assert found, f"ended with {self.process.returncode}: {messages}"
        return Verdict(int(found[1]), int(found[2]), messages)

    def __enter__(self) -> Victim:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.communicate()
