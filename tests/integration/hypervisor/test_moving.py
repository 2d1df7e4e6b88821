"""A client is moved to another device by an intermediate client, while it verifies its memory."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest
import pytest_asyncio

from farpage.api.remote import RemoteError
from farpage.hypervisor.model import ClientAdopt, ClientCreate, ClientInfo, ClientRelease, ReadWay
from farpage.hypervisor.movement import ClientMove, EvacuationStart, MoveAdjust, MoveKind, MoveStage
from tests.support.moving_client import MovingClient, moving_client
from tests.support.paged_set import DEADLINE_SECONDS, RegionProcess, once_free, running_set

pytestmark = pytest.mark.asyncio(loop_scope="module")

PAGES = 2048
LIMIT = 512 * 4096
SLOW = 256 << 10


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def client() -> AsyncIterator[MovingClient]:
    async with moving_client(PAGES, LIMIT) as moving:
        await moving.paged.write_all()
        yield moving


async def test_it_is_moved_while_it_works_and_nothing_is_left_where_it_was(client: MovingClient) -> None:
    source, target = client.places
    begun = await client.move()
    assert (begun.kind, begun.source, begun.target) == (MoveKind.INDIRECT, source, target)
    while (await client.progress()).stage is not MoveStage.DONE:
        await client.paged.write_all()
        await client.paged.verify_all()
    await client.whole_on(target)
    await client.paged.until_alarm("client_moved")
    assert not (await client.alarms()) & {"path_failed", "no_path", "fenced", "checksum_error"}


def is_read_directly(info: ClientInfo) -> bool:
    return {path.reads for path in info.paths} == {ReadWay.DIRECT}


async def test_it_reads_directly_where_it_was_moved_to(client: MovingClient) -> None:
    await client.paged.until(is_read_directly, "read directly before")
    _, target = client.places
    await client.move()
    assert (await client.ended()).stage is MoveStage.DONE
    await client.paged.until(is_read_directly, "read directly again")
    await client.whole_on(target)
    (path,) = (await client.paged.info()).paths
    assert (path.direct_reads > 0, path.direct_failures) == (True, 0)


async def test_paused_it_copies_nothing_and_the_client_goes_on(client: MovingClient) -> None:
    await client.paged.write_all()
    _, target = client.places
    await client.move(bandwidth_bytes=SLOW)
    await client.until(lambda info: info.filled_pages > 0, "copying")
    paused = await client.adjust(MoveAdjust(paused=True))
    assert paused.stage is MoveStage.PAUSED
    before = await client.still()
    await client.half("verify")
    after = await client.progress()
    assert (after.stage, after.filled_pages) == (MoveStage.PAUSED, before.filled_pages)
    assert after.kept_pages > before.kept_pages, "pages that the client reads come over"
    assert after.intermediary is not None
    assert after.intermediary.running_here
    await client.adjust(MoveAdjust(paused=False, unlimited=True))
    assert (await client.ended()).stage is MoveStage.DONE
    await client.whole_on(target)


async def test_cancelled_it_stays_where_it_was(client: MovingClient) -> None:
    source, target = client.places
    with pytest.raises(RemoteError, match="not being moved"):
        await client.paged.embedded.hypervisor.cancel_move("client")
    await client.move(bandwidth_bytes=SLOW)
    await client.until(lambda info: info.filled_pages > 0, "copying")
    writing = asyncio.create_task(client.half("write"))
    await client.paged.embedded.hypervisor.cancel_move("client")
    await writing
    assert (await client.progress()).stage is MoveStage.CANCELLED
    await client.until_left(target)
    await client.whole_on(source)
    await client.paged.until_alarm("move_cancelled")


async def test_a_move_that_cannot_be_changes_nothing(client: MovingClient) -> None:
    source, target = client.places
    before = await client.definition()
    for to, match in ((source, "on it already"), ("nowhere", "nowhere")):
        with pytest.raises(RemoteError, match=match):
            await client.move(to)
    with pytest.raises(RemoteError, match="resync-bandwidth"):
        await client.paged.embedded.hypervisor.move("client", ClientMove(to=target, bandwidth_bytes=SLOW))
    assert await client.definition() == before


async def test_an_intermediate_client_that_is_killed_is_started_again(client: MovingClient) -> None:
    _, target = client.places
    await client.paged.write_all()
    await client.move(bandwidth_bytes=SLOW)
    await client.until(lambda info: info.filled_pages > 0, "copying")
    killed = client.intermediary_pid()
    assert killed is not None
    os.kill(killed, signal.SIGKILL)
    await client.half("write")
    await client.half("verify")
    assert client.intermediary_pid() not in (None, killed)
    await client.adjust(MoveAdjust(unlimited=True))
    assert (await client.ended()).stage is MoveStage.DONE
    await client.whole_on(target)


async def test_while_the_intermediate_client_is_away_the_client_goes_on_above_its_limit(
    client: MovingClient,
) -> None:
    _, target = client.places
    await client.paged.write_all()
    await client.move(bandwidth_bytes=SLOW)
    await client.until(lambda info: info.filled_pages > 0, "copying")
    await client.half("write")  # more than the limit; all of it is present now
    away = client.intermediary_pid()
    assert away is not None
    os.kill(away, signal.SIGSTOP)
    try:
        await client.half("write")
        await client.half("verify")
        info = await client.paged.until(lambda info: info.resident_bytes > LIMIT, "above its limit")
        assert (info.limit_bytes, info.guest_paused) == (LIMIT, False)
    finally:
        os.kill(away, signal.SIGCONT)
    await client.paged.until(lambda info: info.resident_bytes <= LIMIT, "within its limit")
    await client.adjust(MoveAdjust(unlimited=True))
    assert (await client.ended()).stage is MoveStage.DONE
    await client.whole_on(target)


async def test_another_control_process_goes_on_with_it(client: MovingClient) -> None:
    _, target = client.places
    await client.paged.write_all()
    await client.move(bandwidth_bytes=SLOW)
    await client.until(lambda info: info.filled_pages > 0, "copying")
    killed = client.intermediary_pid()
    await client.restart_hypervisor()
    await client.adjust(MoveAdjust(unlimited=True))
    await client.half("write")
    assert (await client.ended()).stage is MoveStage.DONE
    assert killed is not None
    assert not client.runs(killed), "it ends with the control process that has started it"
    await client.whole_on(target)


async def test_a_device_is_evacuated_by_whoever_reaches_it(client: MovingClient) -> None:
    source, target = client.places
    hypervisor = client.paged.embedded.hypervisor
    begun = await hypervisor.evacuate("devices", source, EvacuationStart())
    assert [(info.client, info.kind) for info in begun.clients] == [("client", MoveKind.DIRECT)]
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not (evacuation := await hypervisor.evacuation("devices", source)).done:
            await client.paged.write_all()
    assert [info.stage for info in evacuation.clients] == [MoveStage.DONE]
    await client.whole_on(target)


async def test_a_vios_is_evacuated_by_intermediate_clients_when_that_is_asked_for(
    client: MovingClient,
) -> None:
    source, target = client.places
    hypervisor, vios = client.paged.embedded.hypervisor, client.vios_of(source)
    with pytest.raises(RemoteError, match="has not been evacuated"):
        await hypervisor.evacuation("vioses", vios)
    await hypervisor.evacuate("vioses", vios, EvacuationStart(at_a_time=2, indirect=True))
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not (evacuation := await hypervisor.evacuation("vioses", vios)).done:
            await client.paged.write_all()
    (info,) = evacuation.clients
    assert (info.kind, info.stage, evacuation.staying) == (MoveKind.INDIRECT, MoveStage.DONE, ())
    await client.whole_on(target)
    again = await hypervisor.evacuate("vioses", vios, EvacuationStart())
    assert again.clients == ()


async def test_a_vios_that_had_the_volume_before_does_not_end_a_move_to_it(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / name).mkdir()
    devices = (f"dir:{tmp_path / 'a'}", f"vios2=dir:{tmp_path / 'b'}")
    async with running_set(workers=1, devices=devices) as embedded:
        hypervisor, root = embedded.hypervisor, embedded.layout.root

        async def is_on_b_alone() -> bool:
            definition = await hypervisor.definition()
            replicas = definition.clients["vm"].volumes[0].replicas
            return not definition.moves and [definition.devices[r.device].name for r in replicas] == ["b"]

        first = await RegionProcess.start(root, PAGES, LIMIT, "vm")
        await first.do(f"write 0 {PAGES}")
        embedded.supervise_vios("vios1", supervised=False)
        embedded.kill_vios("vios1", signal.SIGKILL)
        await embedded.vios_exited("vios1")
        await hypervisor.move("vm", ClientMove(to="b"))
        await until(is_on_b_alone)
        await hypervisor.release("vm", ClientRelease(force=True))
        await first.stop()
        with pytest.raises(RemoteError):
            await hypervisor.move("vm", ClientMove(to="a", indirect=True))
        await embedded.start_vios("vios1")  # whose definition says that all of vm is on a
        await until(is_on_b_alone)
        await hypervisor.adopt("vm", ClientAdopt())
        second = await RegionProcess.start(root, PAGES, LIMIT, "vm", version=1)
        try:
            assert await second.do(f"verify 0 {PAGES}") == "wrong 0"
        finally:
            await second.stop()


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not await condition():
            await asyncio.sleep(0.05)


async def test_a_client_is_not_deleted_before_what_a_cancelled_move_has_left_can_be(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    devices = (f"vios1=dir:{tmp_path / 'a'}?size=64M", f"vios2=dir:{tmp_path / 'b'}?size=128M")
    async with running_set(workers=1, devices=devices) as embedded:
        hypervisor, (source, target) = embedded.hypervisor, embedded.vioses.values()
        await hypervisor.create_client(ClientCreate(name="vm", memory_bytes=PAGES * 4096, limit_bytes=LIMIT))
        await hypervisor.move("vm", ClientMove(to="b", indirect=True, bandwidth_bytes=4096))
        embedded.supervise_vios("vios2", supervised=False)
        embedded.kill_vios("vios2", signal.SIGKILL)
        await embedded.vios_exited("vios2")
        await hypervisor.cancel_move("vm")
        with pytest.raises(RemoteError) as caught:
            await once_free(lambda: hypervisor.delete_client("vm"))
        assert caught.value.code == "no_vios"
        assert [volume.name for volume in await source.volumes()] == ["vm"]
        await embedded.start_vios("vios2")
        async with asyncio.timeout(DEADLINE_SECONDS):
            while len((await hypervisor.definition()).clients["vm"].volumes[0].replicas) > 1:
                await asyncio.sleep(0.05)
        await once_free(lambda: hypervisor.delete_client("vm"))
        assert [*await source.volumes(), *await target.volumes()] == []
