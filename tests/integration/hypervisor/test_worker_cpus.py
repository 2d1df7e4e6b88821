"""Data workers on the CPUs of their clients, or on those of a list: as `hypervisor show` tells it."""

from __future__ import annotations

import asyncio
import os
from contextlib import AsyncExitStack
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from farpage.cli.main import main
from farpage.embedded.set import EmbeddedSet, SetSettings
from farpage.errors import ExitStatus
from farpage.hypervisor.model import ClientAttach
from farpage.kernel.affinity import confine, format_cpus, own_cpus
from tests.support.hammer import hammering
from tests.support.losses import kill_control
from tests.support.paged_set import running_set
from tests.support.processes import worker_pid, workers_running

pytestmark = pytest.mark.skipif(len(own_cpus()) < 2, reason="every CPU is the only one here")

MIB = 1 << 20
PAGES = 1024
FIRST, LAST = min(own_cpus()), max(own_cpus())
ALL = format_cpus(own_cpus())
SECONDS = 30.0


async def until_on(embedded: EmbeddedSet, *cpus: str) -> None:
    """Wait until the workers, in order, are shown to run on these CPUs, and do."""
    found: list[str] = []
    async with asyncio.timeout(SECONDS):
        while found != list(cpus):
            await asyncio.sleep(0.05)
            workers = (await embedded.hypervisor.info()).workers
            found = [worker.cpus for worker in workers]
    assert [format_cpus(os.sched_getaffinity(worker.pid)) for worker in workers] == found


async def test_a_worker_is_where_its_client_is_pinned(hammer_program: Path) -> None:
    async with (
        running_set(workers=1, worker_cpus="clients") as embedded,
        hammering(hammer_program, PAGES, threads=2) as hammer,
    ):
        await until_on(embedded, ALL)
        confine(hammer.pid, frozenset([FIRST]))
        await embedded.hypervisor.attach("vm", ClientAttach(pid=hammer.pid, limit_bytes=MIB))
        await until_on(embedded, str(FIRST))
        confine(hammer.pid, frozenset([LAST]))
        await until_on(embedded, str(LAST))
        confine(hammer.pid, own_cpus())
        await until_on(embedded, ALL)
        confine(hammer.pid, frozenset([LAST]))
        await until_on(embedded, str(LAST))
        await embedded.hypervisor.detach("vm")
        await until_on(embedded, ALL)
        assert (await hammer.quit()).wrong == 0


async def test_a_list_holds_for_all_workers_and_for_the_spare_one() -> None:
    async with running_set(worker_cpus=f"{LAST},8191") as embedded:
        await until_on(embedded, str(LAST))  # one worker for each CPU of the list
        async with asyncio.timeout(SECONDS):
            while len(workers := workers_running(embedded)) < 2:
                await asyncio.sleep(0.05)
            while {frozenset(os.sched_getaffinity(worker)) for worker in workers} != {frozenset([LAST])}:
                await asyncio.sleep(0.05)


async def test_the_next_hypervisor_s_setting_holds_for_the_workers_that_it_finds(
    hammer_program: Path,
) -> None:
    found: set[int] = set()
    async with AsyncExitStack() as stack:
        folder = stack.enter_context(TemporaryDirectory(prefix="fpset-", dir="/tmp"))
        hammer = await stack.enter_async_context(hammering(hammer_program, PAGES))
        confine(hammer.pid, frozenset([FIRST]))
        for setting, cpus in ((f"{LAST}", f"{LAST}"), ("clients", f"{FIRST}"), ("any", ALL)):
            embedded = EmbeddedSet(SetSettings(Path(folder, "s"), workers=1, worker_cpus=setting))
            stack.push_async_callback(embedded.stop)
            await embedded.start()
            if not found:
                await embedded.hypervisor.attach("vm", ClientAttach(pid=hammer.pid, limit_bytes=MIB))
            await until_on(embedded, cpus)
            found.add(worker := await worker_pid(embedded, "vm"))
            if setting != "any":
                await kill_control(embedded)
                await embedded.stop()
                assert format_cpus(os.sched_getaffinity(worker)) == cpus
        assert found == {worker}
        await embedded.hypervisor.detach("vm")
        assert (await hammer.quit()).wrong == 0


@pytest.mark.parametrize(("text", "hint"), [("0-", "0-3,8"), ("8191", ALL), ("", "'clients'")])
def test_a_list_that_cannot_be_used_is_refused_before_a_worker_is_started(
    text: str, hint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["hypervisor", "run", "one", "--dir", str(tmp_path / "d"), "--vios", "v=unix:/v"]
    assert main([*line, "--worker-cpus", text]) == ExitStatus.USAGE
    told = capsys.readouterr().err
    assert ("--worker-cpus" in told, hint in told) == (True, True), told
    assert not (tmp_path / "d" / "run").exists()
