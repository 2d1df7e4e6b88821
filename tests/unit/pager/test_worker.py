"""What a data worker tells of a client whose process ends."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from farpage.kernel.process import is_gone
from farpage.pager import worker as paging
from farpage.pager.channel import Channel
from farpage.pager.worker import Worker


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs until it is killed."""
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as running:
        yield running
        running.kill()


@pytest.fixture
def pidfd(process: subprocess.Popen[bytes]) -> Iterator[int]:
    """Its pidfd."""
    descriptor = os.pidfd_open(process.pid)
    yield descriptor
    os.close(descriptor)


def client_of(pidfd: int) -> Any:
    """Return as much of a client as is let go of."""

    async def abandon() -> None:
        """Nothing is open."""

    space = SimpleNamespace(volume=SimpleNamespace(abandon=abandon))
    return SimpleNamespace(
        client=SimpleNamespace(pidfd=pidfd),
        paged=SimpleNamespace(abandon=lambda: None, space=space),
        opening=None,
        memory=SimpleNamespace(close=lambda: None),
        state=SimpleNamespace(close=lambda: None, remove=lambda: None),
    )


@pytest.mark.parametrize("lives", [False, True], ids=["with_its_process", "alone"])
async def test_a_client_whose_memory_has_ended_is_gone_when_its_process_is_or_after_a_while(
    process: subprocess.Popen[bytes],
    pidfd: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    lives: bool,
) -> None:
    if lives:
        monkeypatch.setattr(paging, "MEMORY_SECONDS", 0.01)
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    told: asyncio.Queue[tuple[str, bool, bool]] = asyncio.Queue()
    control = Channel(
        here, on_event=lambda event, lost: told.put_nowait((event, lost["lives"], is_gone(pidfd)))
    )
    (tmp_path / "workers").mkdir()
    worker = Worker(there, tmp_path / "workers")
    worker._clients["vm"] = cast(Any, client_of(pidfd))
    asyncio.get_running_loop().add_reader(pidfd, worker._client_gone, "vm")
    worker._client_gone("vm")
    for _ in range(10):
        await asyncio.sleep(0)
    if not lives:
        process.kill()
    assert await told.get() == ("client_gone", lives, not lives)
    control.close()
    worker.close()
