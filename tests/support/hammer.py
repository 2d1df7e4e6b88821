"""Unmodified processes with shared memory, for hypervisors to page; see hammer.c."""

from __future__ import annotations

import asyncio
import subprocess
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("hammer.c")
ANSWER_SECONDS = 60.0


def compile_hammer(folder: Path) -> Path:
    """Compile the program into a folder."""
    program = folder / "hammer"
    command = ["gcc", "-O2", "-Wall", "-Wextra", "-o", str(program), str(SOURCE), "-lpthread"]
    subprocess.run(command, check=True)
    return program


@dataclass(frozen=True)
class Touches:
    """What a hammer has found out."""

    touches: int
    wrong: int


@dataclass
class Hammer:
    """One such process."""

    process: asyncio.subprocess.Process

    @property
    def pid(self) -> int:
        return self.process.pid

    async def _line(self) -> str:
        assert self.process.stdout is not None
        async with asyncio.timeout(ANSWER_SECONDS):
            return (await self.process.stdout.readline()).decode().strip()

    async def _ask(self, question: str) -> Touches:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{question}\n".encode())
        words = (await self._line()).split()
        assert words[::2] == ["touches", "wrong"], words
        return Touches(int(words[1]), int(words[3]))

    async def check(self) -> Touches:
        """Have every byte compared."""
        return await self._ask("check")

    async def quit(self) -> Touches:
        """Have every byte compared, and the process end by itself."""
        found = await self._ask("quit")
        await self.process.wait()
        return found


@asynccontextmanager
async def hammering(
    program: Path, pages: int, threads: int = 1, *, naps: bool = True
) -> AsyncIterator[Hammer]:
    """Run a hammer of some pages; with `naps` it takes little processor time."""
    process = await asyncio.create_subprocess_exec(
        *(str(program), str(pages), str(threads), *(["nap"] if naps else [])),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    hammer = Hammer(process)
    try:
        assert await hammer._line() == "ready"
        yield hammer
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()
