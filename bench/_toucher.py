"""Builds `touch.c` and drives it: the process whose memory the contenders page."""

from __future__ import annotations

import asyncio
import contextlib
import enum
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self, TypeAlias

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict

from bench._compile import compiled
from farpage.errors import FarpageError

SWEEP_SECONDS = 300.0
"""A sequential phase ends after one sweep; this only ends one that makes no progress."""
END_SECONDS = 10.0

Waits: TypeAlias = npt.NDArray[np.uint64]


class MemoryKind(enum.StrEnum):
    """What kind of memory is touched, as `touch.c` calls it."""

    ANONYMOUS = "anonymous"
    SHARED = "shared"
    FILE = "file"
    FILE_RANDOM = "file-random"


class Pattern(enum.StrEnum):
    """In which order pages are touched, as `touch.c` calls it."""

    POPULATE = "populate"
    SEQUENTIAL = "sequential"
    STRIDED = "strided"
    RANDOM = "random"
    ZIPF = "zipf"


@dataclass(frozen=True)
class Phase:
    """One thing to measure; `write_percent` of the touches store, the others load.

    `compressible` populates with pages that LZ4 makes half as large, `scattered` does so in random order. A
    phase that is `warmed` runs twice and is measured the second time: what is in memory at its beginning is
    its own then.
    """

    pattern: Pattern
    write_percent: int = 0
    threads: int = 1
    compressible: bool = False
    warmed: bool = False
    scattered: bool = False

    @property
    def name(self) -> str:
        """What it is called in tables."""
        if self.pattern is Pattern.POPULATE:
            if self.scattered:
                return "populate in random order"
            return "populate, compressible" if self.compressible else "populate"
        return (
            f"{self.pattern} {self.write_percent}% writes" if self.write_percent else f"{self.pattern} reads"
        )


class _Answer(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Times(_Answer):
    """Latencies of some touches; all are 0 where `count` is."""

    count: int
    mean_us: float = 0.0
    p50_us: float = 0.0
    p99_us: float = 0.0
    p999_us: float = 0.0
    longest_us: float = 0.0


class PhaseReport(_Answer):
    """What `touch.c` measured in one phase; `waited` are touches of pages that were not in memory."""

    phase: str
    write_percent: int
    threads: int
    seconds: float
    wrong_pages: int
    major_faults: int
    waited: Times
    present: Times
    all: Times

    @property
    def touches_per_second(self) -> float:
        """Rate of all touches, of those that waited and the others."""
        return self.all.count / self.seconds


class _Ready(_Answer):
    pid: int
    pages: int


@dataclass(eq=False)
class ToucherFailed(FarpageError):
    """The touching process ended before it answered."""

    code = "toucher_failed"
    template = "the touching process ended with status {status}: {last_words}"
    remedy = "a status of -9 under a memory limit is the kernel's: try a larger --limit"
    status: int
    last_words: str


@dataclass(eq=False)
class WrongPages(FarpageError):
    """A contender gave back something else than was written."""

    code = "wrong_pages"
    template = "{contender}: {pages} pages held something else than was written to them ({phase})"
    remedy = "no figure of this run counts; report it as a bug"
    contender: str
    pages: int
    phase: str


def build(folder: Path) -> Path:
    """Compile `touch.c` into `folder` and return the program.

    :raise Unsupported: there is no C compiler, or it refuses.
    """
    return compiled("touch", folder, ["-lm"])


class Toucher:
    """A running `touch.c`; an asynchronous context manager that ends it."""

    def __init__(self, process: asyncio.subprocess.Process, log: Path) -> None:
        self._process = process
        self._log = log

    @classmethod
    async def start(cls, program: Path, kind: MemoryKind, memory_bytes: int, seed: int, folder: Path) -> Self:
        """Start it and wait until its memory is mapped; equal seeds touch equal pages.

        `folder` holds its log, and its memory where that is a file.

        :raise ToucherFailed: it has not come up.
        """
        log = folder / "touch.log"
        # A session of its own: Ctrl-C ends it through this process's clean-up, in order.
        with log.open("wb") as errors:
            process = await asyncio.create_subprocess_exec(
                *(str(program), kind.value, str(memory_bytes >> 20), str(seed)),
                stdin=asyncio.subprocess.PIPE,
                stdout=asyncio.subprocess.PIPE,
                stderr=errors,
                cwd=folder,
                start_new_session=True,
            )
        toucher = cls(process, log)
        try:
            _Ready.model_validate_json(await toucher._answer())
        except BaseException:
            await toucher.stop()
            raise
        return toucher

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    async def run(self, phase: Phase, seconds: float) -> PhaseReport:
        """Run one phase: sequential ones once through the memory, others for `seconds`.

        :raise ToucherFailed: it ended meanwhile.
        """
        command = "populate compressible" if phase.compressible else "populate"
        if phase.scattered:
            command = "populate scattered"
        if phase.pattern is not Pattern.POPULATE:
            limit = SWEEP_SECONDS if phase.pattern is Pattern.SEQUENTIAL else seconds
            command = f"run {phase.pattern} {phase.write_percent} {phase.threads} {limit}"
        await self._send(command)
        return PhaseReport.model_validate_json(await self._answer())

    async def trace(self, path: Path) -> None:
        """Append every wait of the phases from now on to a file; `waits_of` reads it."""
        await self._send(f"trace {path}")

    async def _send(self, command: str) -> None:
        assert self._process.stdin is not None
        with contextlib.suppress(ConnectionError):
            self._process.stdin.write(f"{command}\n".encode())
            await self._process.stdin.drain()

    async def stop(self) -> None:
        """End it; safe to call twice."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        await asyncio.wait_for(self._process.wait(), END_SECONDS)

    async def _answer(self) -> bytes:
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            status = await self._process.wait()
            last_words = self._log.read_text(errors="replace").strip().splitlines()
            raise ToucherFailed(status, last_words[-1] if last_words else "it said nothing")
        return line


def waits_of(path: Path) -> Waits:
    """Read a trace: in each row when a wait ended, by CLOCK_MONOTONIC, and how long it took, in ns."""
    return np.fromfile(path, np.uint64).reshape(-1, 2)
