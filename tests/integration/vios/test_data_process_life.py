"""One data process as its front has it, without the front around it."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from farpage.definition.document import canonical_json
from farpage.definition.model import Definition
from farpage.vios.figures import Figures
from farpage.vios.processes.errors import DataProcessAway, DataProcessLost
from farpage.vios.processes.leasetable import LeaseTable
from farpage.vios.processes.messages import Begin, Nothing, Volume
from farpage.vios.processes.process import DataProcess, Start

LIMIT_SECONDS = 60.0


async def no_requests(_method: str, _parameters: object, _descriptors: list[int]) -> Nothing:
    raise AssertionError


@asynccontextmanager
async def process(folder: Path) -> AsyncIterator[tuple[DataProcess, Start]]:
    """Start a data process that has not begun, and what it would be told."""
    lock, leases = os.open(folder, os.O_RDONLY), LeaseTable()
    started = DataProcess("one", 0, lock, no_requests)
    start = Start(
        Begin(vios="one", state_dir=str(folder), lease_seconds=5.0, devices=[f"dir:{folder}/disk?size=16M"]),
        files=(canonical_json(Definition()).encode(), b"{}"),
        descriptors=(leases.descriptor,),
    )
    try:
        yield started, start
    finally:
        await started.end()
        assert started.pid is None
        leases.close()
        os.close(lock)


async def another(started: DataProcess, than: int | None) -> int:
    """Wait until another process has the place."""
    async with asyncio.timeout(LIMIT_SECONDS):
        while started.pid in (None, than):
            await asyncio.sleep(0.001)
    assert started.pid is not None
    return started.pid


async def test_one_that_is_lost_before_it_begins_is_started_again(tmp_path: Path) -> None:
    async with process(tmp_path) as (started, start):
        first = await another(started, None)
        os.kill(first, signal.SIGKILL)
        await another(started, first)
        started.begin(lambda: start)
        await started.until_up(LIMIT_SECONDS)
        assert await started.ask("figures", Nothing(), Figures) == Figures()
        assert started.restarts == 1


async def test_who_waits_for_one_that_is_to_end_is_told(tmp_path: Path) -> None:
    async with process(tmp_path) as (started, _start):
        waiting = asyncio.create_task(started.until_up(LIMIT_SECONDS))
        await another(started, None)
        await started.stop()
        with pytest.raises(DataProcessAway):
            await waiting


async def test_what_is_asked_of_one_that_ends_fails(tmp_path: Path) -> None:
    async with process(tmp_path) as (started, start):
        ended: list[DataProcess] = []
        started.on_up = ended.append
        started.begin(lambda: start)
        await started.until_up(LIMIT_SECONDS)
        assert started.pid is not None
        os.kill(started.pid, signal.SIGSTOP)
        asked = asyncio.create_task(started.ask("refuse", Volume(name="v"), Nothing))
        await asyncio.sleep(0)
        os.kill(started.pid, signal.SIGKILL)
        with pytest.raises(DataProcessLost, match="before it answered 'refuse'"):
            await asked
        async with asyncio.timeout(LIMIT_SECONDS):
            while not ended:
                await asyncio.sleep(0.001)
        assert ended == [started]


async def test_an_unforeseen_error_is_answered(tmp_path: Path) -> None:
    async with process(tmp_path) as (started, start):
        started.begin(lambda: start)
        await started.until_up(LIMIT_SECONDS)
        with pytest.raises(Exception, match="failed unexpectedly"):
            await started.ask("nothing_like_that", Nothing(), Nothing)
        assert await started.ask("figures", Nothing(), Figures) == Figures()
