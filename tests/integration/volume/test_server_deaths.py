"""Being told that a process begins to die, of real processes with threads."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from farpage.kernel.process import open_thread, read_descriptors, take_descriptor
from farpage.volume.connector import ConnectNbd, Endpoint
from farpage.volume.deaths import ServerDeaths
from tests.support.nbd import short_folder
from tests.support.vios import until, vios_processes

LIMIT_SECONDS = 30.0

PROCESS = """
import sys, threading
ends = [threading.Event() for _ in range(int(sys.argv[1]))]
threads = [threading.Thread(target=end.wait) for end in ends]
for thread in threads:
    thread.start()
print("ready", flush=True)
for line in sys.stdin:
    for number in map(int, line.split()):
        ends[number].set()
        threads[number].join()
    print("ended", flush=True)
"""


class Threads:
    """A process with threads besides its main one, which end when told."""

    def __init__(self, count: int) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        self._hear()

    def end(self, *numbers: int) -> None:
        """Have threads end; returns when they have."""
        assert self.process.stdin is not None
        print(*numbers, file=self.process.stdin, flush=True)
        self._hear()

    def _hear(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture(autouse=True)
def threads_can_be_watched() -> None:
    try:
        os.close(open_thread(os.getpid()))
    except OSError as error:
        pytest.skip(f"this kernel watches no threads: {error}")


@pytest.fixture
def threads() -> Iterator[Threads]:
    threads = Threads(4)
    yield threads
    threads.kill()


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


async def test_all_who_watch_a_process_are_told_once_when_it_is_killed(threads: Threads) -> None:
    deaths, told = ServerDeaths(), list[str]()
    deaths.watch(threads.process.pid, lambda: told.append("first"))
    deaths.watch(threads.process.pid, lambda: told.append("second"))
    threads.process.kill()
    async with asyncio.timeout(LIMIT_SECONDS):
        await until(lambda: len(told) == 2)
    threads.process.wait()
    assert sorted(told) == ["first", "second"]


async def test_who_has_taken_it_back_is_not_told(threads: Threads) -> None:
    deaths, told = ServerDeaths(), list[str]()
    take_back = deaths.watch(threads.process.pid, lambda: told.append("gone"))
    deaths.watch(threads.process.pid, lambda: told.append("there"))
    take_back()
    threads.process.kill()
    async with asyncio.timeout(LIMIT_SECONDS):
        await until(lambda: "there" in told)
    assert told == ["there"]


async def test_threads_that_end_while_their_process_lives_are_no_death(threads: Threads) -> None:
    """Others are watched in their place."""
    deaths, told = ServerDeaths(), list[bool]()
    killed = False
    deaths.watch(threads.process.pid, lambda: told.append(killed))
    watched = descriptors()
    threads.end(0, 1)
    async with asyncio.timeout(LIMIT_SECONDS):
        await until(lambda: descriptors() < watched)  # they have been noticed
        await until(lambda: descriptors() == watched)
        assert told == []
        killed = True
        threads.process.kill()
        await until(lambda: bool(told))
    assert told == [True]


async def test_a_process_without_further_threads_can_be_watched_in_vain() -> None:
    threads = Threads(0)
    before = descriptors()
    deaths, told = ServerDeaths(), list[str]()
    take_back = deaths.watch(threads.process.pid, lambda: told.append("told"))
    assert descriptors() == before
    threads.kill()
    deaths.watch(threads.process.pid, lambda: told.append("told"))  # it has ended before
    take_back()
    assert told == []


async def test_nothing_is_left_open_when_nobody_watches(threads: Threads) -> None:
    before = descriptors()
    deaths = ServerDeaths()
    both = [deaths.watch(threads.process.pid, lambda: None) for _ in range(2)]
    assert descriptors() > before
    for take_back in both:
        take_back()
        take_back()
    assert descriptors() == before


async def test_a_connection_is_lost_with_its_server_though_its_socket_is_open() -> None:
    """As it is for as long as the kernel needs to end a killed process."""
    with (
        short_folder() as folder,
        vios_processes(folder, "one", devices=[f"dir:{folder}/disk?size=16M"]) as (vios,),
        ExitStack() as held_open,
    ):
        await vios.create("v", 4096)
        lost = list[Exception]()
        connect = ConnectNbd(ServerDeaths())
        connection = await connect(Endpoint("one", vios.data, "disk"), "v", LIMIT_SECONDS)
        connection.on_lost = lost.append
        pidfd = os.pidfd_open(vios.pid)
        held_open.callback(os.close, pidfd)
        for file in read_descriptors(vios.pid):
            if file.target.startswith("socket:"):
                held_open.callback(os.close, take_descriptor(pidfd, file.number))
        vios.kill()
        async with asyncio.timeout(LIMIT_SECONDS):
            await until(lambda: bool(lost))
    assert "process is ending" in str(lost[0])
