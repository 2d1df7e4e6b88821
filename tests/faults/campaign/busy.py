"""The campaign's side of the busy clients: processes to start and to stop, and what they tell."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

PROGRAM = Path(__file__).with_name("busy_region.py")
SOURCE = Path(__file__).with_name("stamper.c")
ATTACH_SECONDS = 60.0


@dataclass(frozen=True)
class BusyClient:
    """What a busy client is; `number` makes its stamps its own."""

    name: str
    number: int
    redundancy: str
    pages: int
    limit_bytes: int
    threads: int = 2


@dataclass(frozen=True)
class Stall:
    """One access that took long; times are CLOCK_MONOTONIC."""

    client: str
    begin_seconds: float
    end_seconds: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end_seconds - self.begin_seconds


@dataclass(frozen=True)
class WrongPage:
    """One page that did not hold what was written there last."""

    client: str
    text: str


@dataclass
class Findings:
    """What all busy clients have told so far."""

    stalls: list[Stall] = field(default_factory=list)
    wrong: list[WrongPage] = field(default_factory=list)


class ClientDied(Exception):
    """A busy client ended without having been told to."""


def compile_stamper(folder: Path) -> Path:
    """Compile the threads' library into a folder."""
    library = folder / "stamper.so"
    command = [
        "gcc",
        "-O2",
        "-Wall",
        "-Wextra",
        "-shared",
        "-fPIC",
        "-o",
        str(library),
        str(SOURCE),
        "-lpthread",
    ]
    subprocess.run(command, check=True)
    return library


class BusyProcess:
    """One run of a busy client."""

    def __init__(self, client: BusyClient, process: asyncio.subprocess.Process, findings: Findings) -> None:
        self.client = client
        self.process = process
        self.reads = 0
        self.writes = 0
        self.wrong = 0
        self.waiting_since_seconds: float | None = None
        """Begin of the oldest access that is under way."""
        self.ready = asyncio.Event()
        self.closed = asyncio.Event()
        self.problem = ""
        self._findings = findings
        self._stopping = False
        self._reading = asyncio.get_running_loop().create_task(self._read())

    @classmethod
    async def start(
        cls, client: BusyClient, library: Path, state: Path, seed: int, findings: Findings
    ) -> BusyProcess:
        """Start the process and wait until its region is attached; it does nothing with it before `go`.

        :raise ClientDied: it was refused.
        :raise TimeoutError: no answer.
        """
        words = [library, state, client.name, client.number, client.pages, client.limit_bytes]
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(PROGRAM),
            *map(str, [*words, client.redundancy, client.threads, seed]),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            # Ctrl-C on a terminal is for the campaign alone.
            start_new_session=True,
        )
        busy = cls(client, process, findings)
        try:
            async with asyncio.timeout(ATTACH_SECONDS):
                await busy.ready.wait()
            if busy.problem:
                raise ClientDied(f"client {client.name!r} {busy.problem} before its region was attached")
        except BaseException:
            await busy.kill()
            raise
        return busy

    def go(self) -> None:
        """Let the threads loose."""
        self._send("go")

    async def finish(self, seconds: float) -> None:
        """Verify every page, close the region and end.

        :raise ClientDied: it ended in another way.
        :raise TimeoutError: that took longer than `seconds`.
        """
        self._stopping = True
        self._send("stop")
        async with asyncio.timeout(seconds):
            await self._reading
        if not self.closed.is_set() or self.process.returncode:
            raise ClientDied(f"client {self.client.name!r} {self.problem}")

    async def kill(self) -> None:
        """End the process, however it stands."""
        self._stopping = True
        if self.process.returncode is None:
            self.process.kill()
        await self._reading

    def _send(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n".encode())

    async def _read(self) -> None:
        assert self.process.stdout is not None
        async for line in self.process.stdout:
            self._take(line.decode().split())
        status = await self.process.wait()
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        self.problem = f"ended with {how}"
        self.ready.set()

    @property
    def died(self) -> str:
        """How it ended without having been told to; empty while it runs."""
        return "" if self._stopping else self.problem

    def _take(self, words: list[str]) -> None:
        match words:
            case ["ready"]:
                self.ready.set()
            case ["progress", reads, writes, wrong, oldest]:
                self.reads, self.writes, self.wrong = int(reads), int(writes), int(wrong)
                self.waiting_since_seconds = int(oldest) * 1e-9 or None
            case ["final", reads, writes, wrong]:
                self.reads, self.writes, self.wrong = int(reads), int(writes), int(wrong)
                self.waiting_since_seconds = None
            case ["stall", _, _, _, begin, end]:
                self._findings.stalls.append(Stall(self.client.name, int(begin) * 1e-9, int(end) * 1e-9))
            case ["wrong", *told]:
                self._findings.wrong.append(WrongPage(self.client.name, " ".join(told)))
            case ["closed"]:
                self.closed.set()
