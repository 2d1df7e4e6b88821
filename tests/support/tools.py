"""Foreign programs: run one to its end, or have one serve while a test runs."""

from __future__ import annotations

import asyncio
import shutil
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from farpage.address import UnixAddress
from tests.support.commands import condition


def need(*programs: str) -> None:
    """Skip the test where a program is not installed; apt.txt names the packages."""
    for program in programs:
        if shutil.which(program) is None:
            pytest.skip(f"{program} is not installed")


async def run(*command: str, fails: bool = False, timeout_seconds: float = 60.0) -> str:
    """Run a command to its end and return what it printed on both outputs."""
    process = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(timeout_seconds):
            output, _ = await process.communicate()
    except BaseException:
        process.kill()
        await process.wait()
        raise
    text = output.decode(errors="replace")
    assert (process.returncode != 0) is fails, f"{' '.join(command)}: status {process.returncode}\n{text}"
    return text


@asynccontextmanager
async def running(path: Path, *command: str) -> AsyncIterator[UnixAddress]:
    """Run a server in the foreground until it listens on `path`, and end it afterwards."""
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.DEVNULL
    )
    try:
        await condition(lambda: process.returncode is not None or listening(path))
        assert process.returncode is None, f"{' '.join(command)}: status {process.returncode}"
        yield UnixAddress(str(path))
    finally:
        if process.returncode is None:
            process.send_signal(signal.SIGTERM)
            try:
                async with asyncio.timeout(5):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()


def listening(path: Path) -> bool:
    """Look whether the kernel lists a listening socket; connecting would use up servers for one client."""
    if not path.exists():
        return False
    return any(
        line.split()[3] == "00010000" and line.endswith(f" {path}")
        for line in Path("/proc/net/unix").read_text().splitlines()[1:]
    )
