"""Two hypervisors on the same VIOSes that both believe they own a client."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from farpage.api.client import ControlClient
from farpage.api.remote import RemoteError
from farpage.embedded.set import EmbeddedSet
from farpage.hypervisor.model import ClientAttach, ClientRelease
from farpage.vios.model import VolumeInfo, VolumeOpen
from tests.support.hammer import hammering
from tests.support.paged_set import RegionProcess, running_set, until_client
from tests.support.scrape import Scrape
from tests.support.second_hypervisor import second_hypervisor

pytestmark = pytest.mark.asyncio(loop_scope="module")

PAGES = 1024
LIMIT_BYTES = 1 << 20


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def embedded() -> AsyncIterator[EmbeddedSet]:
    async with running_set(workers=1) as running:
        yield running


async def test_of_two_hypervisors_that_own_a_client_exactly_one_writes(embedded: EmbeddedSet) -> None:
    old = embedded.hypervisor
    first = await RegionProcess.start(embedded.layout.root, PAGES, LIMIT_BYTES)
    try:
        assert await first.do(f"write 0 {PAGES}") == "done"
        async with second_hypervisor(embedded) as other:
            second = await RegionProcess.start(other.state, PAGES, LIMIT_BYTES)
            try:
                first.send(f"verify 0 {PAGES}")  # and waits for good
                fenced = await until_client(old, "client", lambda info: bool(info.fenced), "fenced")
                assert "another owner has the volume at epoch" in fenced.fenced
                assert {path.state for path in fenced.paths} == {"failed"}
                assert {path.reason for path in fenced.paths} == {fenced.fenced}
                await until_client(old, "client", lambda info: info.stalled_faults > 0, "waiting")
                assert [alarm.kind for alarm in await old.alarms()].count("fenced") == 1
                scrape = await Scrape.of(embedded.document.hypervisor.control)
                assert scrape.value("farpage_client_fenced", client="client") == 1
                assert f"fenced: {fenced.fenced}" in await farpage(embedded, "client", "list")
                assert fenced.fenced in await farpage(embedded, "client", "show", "client")

                for _ in range(3):
                    assert await second.do(f"write 0 {PAGES}") == "done"
                    assert await second.do(f"verify 0 {PAGES}") == "wrong 0"
                info = await other.control.client("client")
                assert (info.fenced, info.failovers) == ("", ())
                record = (await other.control.definition()).clients["client"]
                assert (record.hypervisor, record.epoch) == ("other", info.epoch)
                with pytest.raises(RemoteError) as caught:
                    await old.delete_client("client")
                assert caught.value.code == "detach_by_owner"
                with pytest.raises(RemoteError) as caught:
                    await old.release("client", ClientRelease(force=True))
                assert caught.value.code == "client_elsewhere"

                # The one that is fenced made the client for its region, and deletes nothing of the other's.
                await first.stop()
                await until_client(old, "client", lambda info: info.attachment == "none", "let go")
                with pytest.raises(RemoteError) as caught:
                    await old.delete_client("client")
                assert caught.value.code == "client_elsewhere"
                assert await second.do(f"verify 0 {PAGES}") == "wrong 0"
            finally:
                await second.stop()
            await until_client(other.control, "client", lambda info: info.attachment == "none", "let go")
    finally:
        await first.stop()


async def test_a_process_that_is_paged_already_takes_no_client_from_anybody(
    embedded: EmbeddedSet, hammer_program: Path
) -> None:
    async with second_hypervisor(embedded) as other, hammering(hammer_program, PAGES) as process:
        first = embedded.hypervisor
        info = await first.attach("kept", ClientAttach(pid=process.pid, limit_bytes=LIMIT_BYTES))
        await other.control.refresh_devices()
        with pytest.raises(RemoteError) as caught:
            await other.control.attach("kept", ClientAttach(pid=process.pid, limit_bytes=LIMIT_BYTES))
        assert caught.value.code == "already_attached"
        record = (await first.definition()).clients["kept"]
        assert (record.hypervisor, record.epoch) == ("hypervisor", info.epoch)
        await first.detach("kept")
        await first.delete_client("kept")


async def farpage(embedded: EmbeddedSet, *arguments: str) -> str:
    """Run a command and return what it prints, without the breaks of its lines."""
    command = [sys.executable, "-m", "farpage", *arguments, "--state", str(embedded.layout.root)]
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, env=os.environ | {"COLUMNS": "400"}
    )
    output, _ = await process.communicate()
    assert process.returncode == 0
    return output.decode()


async def test_a_process_whose_client_is_fenced_is_not_let_go(
    embedded: EmbeddedSet, hammer_program: Path
) -> None:
    """Its memory cannot be brought back: it goes on waiting, rather than reading something else."""
    hypervisor = embedded.hypervisor
    async with hammering(hammer_program, PAGES) as process:
        info = await hypervisor.attach("taken", ClientAttach(pid=process.pid, limit_bytes=LIMIT_BYTES))
        wanted = VolumeOpen(epoch=info.epoch + 1, owner="00000000000000bb")
        async with ControlClient(embedded.document.vioses["vios1"].control) as vios1:
            assert (await vios1.post("/v1/volumes/taken/open", wanted, VolumeInfo)).owner == wanted.owner
        await until_client(hypervisor, "taken", lambda info: bool(info.fenced), "fenced")
        with pytest.raises(RemoteError, match="client 'taken' is fenced: another owner has") as caught:
            await hypervisor.detach("taken")
        assert (caught.value.http_status, caught.value.code) == (409, "fenced")
        assert (await hypervisor.client("taken")).attachment == "process"
