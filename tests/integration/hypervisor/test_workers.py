"""The data workers of a control process: one that is lost is replaced, whenever that can be done."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import pytest_asyncio

from farpage.hypervisor.errors import NoWorker
from farpage.hypervisor.workers import WorkerPool, WorkerProcess
from farpage.message import Message
from tests.support.commands import condition


async def refuse(method: str, _parameters: Any, _descriptors: list[int]) -> Message:
    raise AssertionError(f"unexpected request {method!r}")


@pytest_asyncio.fixture
async def pool(tmp_path: Path) -> AsyncIterator[WorkerPool]:
    """One worker without a spare."""
    made = WorkerPool(lambda _event, _parameters: None, on_request=refuse, timeout_seconds=60.0)
    await made.adopt(tmp_path)
    made.start(1)
    yield made
    await made.stop()


class Starts:
    """No process can be started, from now on until one can be again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._monkeypatch = monkeypatch
        monkeypatch.setattr(sys, "executable", "/nowhere/python")

    def work_again(self) -> None:
        self._monkeypatch.undo()


async def test_a_lost_worker_is_replaced_as_soon_as_processes_can_be_started_again(
    pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead = asyncio.Event()
    pool.on_dead = lambda _worker: dead.set()
    starts, (lost,) = Starts(monkeypatch), pool.workers
    lost.kill()
    await dead.wait()
    with pytest.raises(NoWorker):
        pool.least_loaded()
    starts.work_again()
    await condition(lambda: bool(pool.workers and pool.spare))
    assert pool.least_loaded().pid not in (lost.pid, pool.spare and pool.spare.pid)
    assert [worker.index for worker in pool.workers] == [0]


async def test_a_spare_that_could_be_started_takes_the_place_of_a_worker_that_could_not(
    pool: WorkerPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead, starts, (lost,) = asyncio.Event(), Starts(monkeypatch), pool.workers

    def died(_worker: WorkerProcess) -> None:
        starts.work_again()
        dead.set()

    pool.on_dead = died
    lost.kill()
    await dead.wait()
    spare = pool.spare
    assert spare is not None
    await condition(lambda: pool.workers == [spare])
