"""Whether data workers page with the compiled loops, as an operator is told it."""

from __future__ import annotations

import asyncio

import pytest

from farpage.cli.main import main
from farpage.pager.compiled import COMPILED, WITHOUT_VARIABLE
from tests.support.paged_set import running_set
from tests.support.scrape import Scrape

SECONDS = 30.0


@pytest.mark.parametrize(
    "wanted",
    [
        pytest.param(True, marks=pytest.mark.skipif(COMPILED is None, reason="they were not built")),
        False,
    ],
    ids=["compiled", "in Python"],
)
async def test_it_is_told_whether_workers_have_the_compiled_loops(
    wanted: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not wanted:
        monkeypatch.setenv(WITHOUT_VARIABLE, "1")
    async with running_set(workers=2) as embedded:
        async with asyncio.timeout(SECONDS):
            while None in {worker.compiled for worker in (await embedded.hypervisor.info()).workers}:
                await asyncio.sleep(0.05)
        info = await embedded.hypervisor.info()
        assert [worker.compiled for worker in info.workers] == [wanted, wanted]
        scrape = await Scrape.of(embedded.document.hypervisor.control)
        assert [scrape.value("farpage_worker_compiled", worker=number) for number in "01"] == [wanted, wanted]
        assert (
            await asyncio.to_thread(main, ["hypervisor", "show", "--state", str(embedded.settings.state_dir)])
            == 0
        )
        assert capsys.readouterr().out.count("compiled" if wanted else "in Python") == 2
