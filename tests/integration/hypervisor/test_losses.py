"""Losses while requests are under way: no half-made client stays, and who is not concerned goes on."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import pytest_asyncio

from farpage.api.client import ControlClient
from farpage.api.remote import RemoteError
from farpage.definition import rules
from farpage.definition.model import Definition
from farpage.embedded.set import EmbeddedSet
from farpage.hypervisor.model import ClientAttach, ClientCreate
from farpage.vios.model import Health
from tests.support.hammer import hammering
from tests.support.paged_set import RegionProcess, running_set, until_client
from tests.support.scrape import Scrape

pytestmark = pytest.mark.asyncio(loop_scope="module")

MIB = 1 << 20
PAGES = 1024
WANTED = ClientCreate(name="wanted", memory_bytes=4 * MIB)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def embedded() -> AsyncIterator[EmbeddedSet]:
    async with running_set(workers=2) as running:
        yield running


async def signal_all(embedded: EmbeddedSet, number: signal.Signals) -> None:
    for vios in embedded.vioses:
        embedded.supervise_vios(vios, supervised=number is not signal.SIGKILL)
        embedded.kill_vios(vios, number)
    if number is signal.SIGKILL:
        for vios in embedded.vioses:
            await embedded.vios_exited(vios)


async def until_reachable(embedded: EmbeddedSet, reachable: bool = True) -> None:
    """Wait until the hypervisor has noticed that all VIOS answer, or that none does."""
    async with asyncio.timeout(60):
        while {vios.reachable for vios in await embedded.hypervisor.vioses()} != {reachable}:
            await asyncio.sleep(0.05)


async def until_forgotten(embedded: EmbeddedSet, name: str) -> None:
    """Wait until every definition is the same, and neither it nor a VIOS knows the client."""
    async with asyncio.timeout(60):
        while True:
            definition = await embedded.hypervisor.definition()
            stored = [await vios.definition() for vios in embedded.vioses.values()]
            volumes = {volume.name for vios in embedded.vioses.values() for volume in await vios.volumes()}
            if stored == [definition] * len(stored) and name not in {*definition.clients, *volumes}:
                return
            await asyncio.sleep(0.05)


async def test_with_every_vios_dead_nothing_is_made(embedded: EmbeddedSet) -> None:
    before = await embedded.hypervisor.definition()
    await signal_all(embedded, signal.SIGKILL)
    try:
        for _ in range(2):  # before it is noticed, and after
            with pytest.raises(RemoteError) as caught:
                await embedded.hypervisor.create_client(WANTED)
            assert (caught.value.http_status, caught.value.code) == (503, "no_vios")
            await until_reachable(embedded, reachable=False)
        assert (await embedded.hypervisor.definition()).clients == before.clients
        scrape = await Scrape.of(embedded.document.hypervisor.control)
        assert [scrape.value("farpage_vios_up", vios=vios) for vios in embedded.vioses] == [0, 0]
    finally:
        for vios in embedded.vioses:
            await embedded.start_vios(vios)
    await until_reachable(embedded)
    await until_forgotten(embedded, "wanted")
    await embedded.hypervisor.create_client(WANTED)
    await embedded.hypervisor.delete_client("wanted")


async def test_what_hanging_vios_store_after_the_request_has_failed_is_undone(embedded: EmbeddedSet) -> None:
    await signal_all(embedded, signal.SIGSTOP)
    try:
        with pytest.raises(RemoteError) as caught:
            await embedded.hypervisor.create_client(WANTED)
        assert caught.value.code == "no_vios"
    finally:
        await signal_all(embedded, signal.SIGCONT)
    await until_reachable(embedded)
    await until_forgotten(embedded, "wanted")
    await embedded.hypervisor.create_client(WANTED)
    await embedded.hypervisor.delete_client("wanted")


async def test_a_region_that_ends_without_any_vios_is_forgotten_when_one_is_back(
    embedded: EmbeddedSet,
) -> None:
    region = await RegionProcess.start(embedded.layout.root, PAGES, MIB, "ended")
    try:
        assert await region.do(f"write 0 {PAGES}") == "done"
        await signal_all(embedded, signal.SIGKILL)
    finally:
        await region.stop()
    await until_client(embedded.hypervisor, "ended", lambda info: info.attachment == "none", "let go")
    for vios in embedded.vioses:
        await embedded.start_vios(vios)
    await until_reachable(embedded)
    await until_forgotten(embedded, "ended")


async def test_a_definition_that_somebody_else_has_stored_is_taken_over(embedded: EmbeddedSet) -> None:
    definition = await embedded.hypervisor.definition()
    (identifier,) = definition.devices
    renamed = definition.devices[identifier].model_copy(update={"name": "renamed"})
    changed = rules.next_revision(definition, devices={identifier: renamed})
    async with ControlClient(embedded.document.vioses["vios2"].control) as vios2:
        params = {"expected_revision": definition.revision}
        await vios2.put("/v1/definition", changed, Definition, params=params)
    async with asyncio.timeout(60):
        while (await embedded.hypervisor.definition()) != changed:
            await asyncio.sleep(0.05)
        while (await embedded.vioses["vios1"].definition()) != changed:
            await asyncio.sleep(0.05)


async def test_a_killed_worker_is_told_and_the_clients_of_the_other_go_on(
    embedded: EmbeddedSet, hammer_program: Path
) -> None:
    hypervisor = embedded.hypervisor
    async with hammering(hammer_program, PAGES) as unlucky, hammering(hammer_program, PAGES) as lucky:
        lost = await hypervisor.attach("unlucky", ClientAttach(pid=unlucky.pid, limit_bytes=MIB))
        kept = await hypervisor.attach("lucky", ClientAttach(pid=lucky.pid, limit_bytes=MIB))
        assert lost.worker != kept.worker
        pids = {worker.index: worker.pid for worker in (await hypervisor.info()).workers}
        assert lost.worker is not None
        os.kill(pids[lost.worker], signal.SIGKILL)
        async with asyncio.timeout(60):
            while "worker_lost" not in [alarm.kind for alarm in await hypervisor.alarms()]:
                await asyncio.sleep(0.05)
        (alarm,) = [alarm for alarm in await hypervisor.alarms() if alarm.kind == "worker_lost"]
        assert alarm.client == "unlucky"
        assert str(lost.worker) in alarm.message
        assert (await Scrape.of(embedded.document.hypervisor.control)).value(
            "farpage_alarms_total", kind="worker_lost"
        ) == 1

        assert (await lucky.check()).wrong == 0
        assert (await unlucky.check()).wrong == 0
        info = await until_client(hypervisor, "unlucky", lambda info: bool(info.paths), "paged again")
        assert info.pid == unlucky.pid
        assert {worker.index: worker.pid for worker in (await hypervisor.info()).workers}[
            lost.worker
        ] != pids[lost.worker]
        async with hammering(hammer_program, PAGES) as later:
            info = await hypervisor.attach("later", ClientAttach(pid=later.pid, limit_bytes=MIB))
            assert (await later.check()).wrong == 0
            await hypervisor.detach("later")
            await hypervisor.delete_client("later")
            assert (await later.quit()).wrong == 0

        unlucky.process.kill()
        await until_client(hypervisor, "unlucky", lambda info: info.attachment == "none", "let go")
        await hypervisor.delete_client("unlucky")
        await hypervisor.detach("lucky")
        await hypervisor.delete_client("lucky")
        assert (await lucky.quit()).wrong == 0


async def test_a_path_that_fails_is_told_in_alarms_and_metrics(
    embedded: EmbeddedSet, hammer_program: Path
) -> None:
    hypervisor = embedded.hypervisor
    async with hammering(hammer_program, PAGES) as hammer:
        await hypervisor.attach("vm", ClientAttach(pid=hammer.pid, limit_bytes=MIB))
        info = await until_client(
            hypervisor, "vm", lambda info: {p.state for p in info.paths} == {"active", "standby"}, "two paths"
        )
        (active,) = [path.vios for path in info.paths if path.state == "active"]
        before = len(await hypervisor.alarms())
        embedded.kill_vios(active, signal.SIGKILL)
        await until_client(hypervisor, "vm", lambda info: len(info.failovers) >= 1, "failed over")
        alarms = [alarm for alarm in (await hypervisor.alarms())[before:] if alarm.kind == "path_failed"]
        assert ("vm", True) in [(alarm.client, active in alarm.message) for alarm in alarms]
        scrape = await Scrape.of(embedded.document.hypervisor.control)
        assert scrape.value("farpage_path_losses_total", client="vm", vios=active) >= 1
        assert scrape.value("farpage_alarms_total", kind="path_failed") >= 1
        # The set's supervisor starts it again.
        await until_client(
            hypervisor, "vm", lambda info: {p.state for p in info.paths} == {"active", "standby"}, "two paths"
        )
        await until_reachable(embedded)
        health: Health = await embedded.vioses[active].health()
        assert health.open_exports >= 1
        await hypervisor.detach("vm")
        await hypervisor.delete_client("vm")
        assert (await hammer.quit()).wrong == 0
