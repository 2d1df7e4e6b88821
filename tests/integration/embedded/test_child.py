from __future__ import annotations

import asyncio
from pathlib import Path

from farpage.embedded.child import Child


async def test_a_process_that_has_just_ended_is_started_anew(tmp_path: Path) -> None:
    """Also in the turn of the loop in which its watcher has not heard of the end yet."""
    told: list[str] = []
    child = Child("daemon", ["--version"], tmp_path / "log", lambda event: told.append(event.message))
    await child.start()
    first, watcher = child.pid, child._watcher
    assert watcher is not None
    watcher.cancel()
    await child.exited()
    await child.start()
    assert child.pid not in (None, first)
    await child.exited()
    await child.stop(10)
    assert told == [
        f"started, pid {first}",
        "exited with status 0",
        told[2],
        "exited with status 0",
    ]


async def test_a_daemon_that_cannot_be_started_again_for_a_while_is_when_it_can(tmp_path: Path) -> None:
    launcher = tmp_path / "launcher"
    told: asyncio.Queue[str] = asyncio.Queue()

    def make_launcher() -> None:
        """Make a program that is there for one start alone."""
        launcher.write_text('#!/bin/sh\nrm "$0"\nexec "$@"\n')
        launcher.chmod(0o700)

    async def until_told(beginning: str) -> None:
        async with asyncio.timeout(60):
            while not (await told.get()).startswith(beginning):
                pass

    make_launcher()
    child = Child(
        "daemon",
        ["--version"],
        tmp_path / "log",
        lambda event: told.put_nowait(event.message),
        [str(launcher)],
    )
    child.supervised = True
    await child.start()
    await until_told("started")
    for _ in range(2):
        await until_told("cannot be started again: ")
    make_launcher()
    await until_told("started")
    await child.stop(10)
