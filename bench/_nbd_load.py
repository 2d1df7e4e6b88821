"""Builds `nbd_load.c` and runs it: an NBD client that needs little and checks what it reads."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from pydantic import BaseModel, ConfigDict

from bench._compile import compiled
from farpage.errors import FarpageError

UNIT_BYTES: Final = 4096
"""Each so many bytes of an export begin and end with their stamp, as `nbd_load.c` calls it."""
_STAMP_FACTOR: Final = 0x9E3779B97F4A7C15


class Load(BaseModel):
    """What the client did, all connections together."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    commands: int
    seconds: float
    bytes: int
    wrong: int
    """Units that did not hold their stamps."""
    cpu_seconds: float
    """Processor time of the client."""

    @property
    def per_second(self) -> float:
        """Commands a second."""
        return self.commands / self.seconds


@dataclass(eq=False)
class LoadFailed(FarpageError):
    """A server broke the protocol, failed a command, or gave something else than was written."""

    code = "load_failed"
    template = "the client ended with status {status}: {last_words}"
    remedy = "no figure of this run counts; where it is farpage's server that failed, report it as a bug"
    status: int
    last_words: str


def build(folder: Path) -> Path:
    """Compile `nbd_load.c` into `folder` and return the program.

    :raise Unsupported: there is no C compiler, or it refuses.
    """
    return compiled("nbd_load", folder)


def stamped(offset: int, length: int, filler: bytes) -> bytes:
    """Return what an export holds from `offset` on, between the stamps `filler`; all in whole units."""
    units = np.frombuffer(filler, np.uint64)[: length // 8].reshape(-1, UNIT_BYTES // 8).copy()
    first = offset // UNIT_BYTES + 1
    stamps = np.arange(first, first + len(units), dtype=np.uint64) * np.uint64(_STAMP_FACTOR)
    units[:, 0] = units[:, -1] = stamps
    return units.tobytes()


async def run(
    program: Path,
    address: str,
    export: str,
    work: str,
    *,
    block_bytes: int,
    depth: int,
    connections: int,
    seconds: float,
    seed: int,
    before: Sequence[str] = (),
) -> Load:
    """Run the client; `before` goes before its command line.

    :raise LoadFailed: a reply, an error or a content is wrong.
    """
    numbers = (block_bytes, depth, connections, seconds, seed)
    process = await asyncio.create_subprocess_exec(
        *before,
        *(str(program), address, export, work, *map(str, numbers)),
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        output, complaints = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        lines = complaints.decode(errors="replace").strip().splitlines()
        raise LoadFailed(process.returncode, lines[0] if lines else "it said nothing")
    return Load.model_validate_json(output)
