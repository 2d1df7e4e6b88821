"""A worker without clients looks after those of dead workers only while nobody else may."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import pytest

from farpage.attach.memory import ClientKind, ClientMemory
from farpage.attach.retake import MemoryRecord
from farpage.definition.states import ReplicaState
from farpage.hypervisor.runfolder import RunFolder
from farpage.kernel.process import ProcessIdentity, identify
from farpage.pager.attachmentrecord import AttachmentRecord
from farpage.pager.heir import Heir
from farpage.pager.messages import Attach, ReplicaSpec
from farpage.pager.statefile import StateFile

ENOUGH_SECONDS = 30.0


async def never(_order: Attach, _memory: ClientMemory, _state: StateFile) -> None:
    raise AssertionError("there is no client to go on with")


@pytest.fixture
def ended() -> ProcessIdentity:
    """A process that has ended."""
    with subprocess.Popen(["sleep", "60"]) as process:
        identity = identify(process.pid)
        process.kill()
    return identity


def record(client: str, worker: ProcessIdentity, process: ProcessIdentity) -> AttachmentRecord:
    order = Attach(
        client=client,
        volume=client,
        epoch=1,
        owner="o",
        kind=ClientKind.REGION,
        pid=process.pid,
        pages=16,
        start_address=1 << 30,
        memfd_offset_bytes=0,
        limit_pages=8,
        replicas=(ReplicaSpec(device="d", name="d", state=ReplicaState.IN_SYNC, endpoints=()),),
        state_path="/nowhere",
        path_timeout_seconds=1,
        open_timeout_seconds=1,
    )
    memory = MemoryRecord(
        kind=ClientKind.REGION,
        pid=process.pid,
        started_ticks=process.started_ticks,
        boot=process.boot,
        start_address=1 << 30,
        length_bytes=16 << 12,
        memfd_offset_bytes=0,
        memfd_inode=1,
        remote_uffd=None,
    )
    return AttachmentRecord(
        client=client, kind=ClientKind.REGION, process=process, memory=memory, order=order, worker=worker
    )


async def test_without_clients_of_other_workers_there_is_nothing_to_wait_for(
    tmp_path: Path, ended: ProcessIdentity
) -> None:
    run = RunFolder(tmp_path)
    run.save(record("releasing", ended, ended).model_copy(update={"releasing": True}))
    run.save(record("untold", ended, ended).model_copy(update={"worker": None}))
    run.close()
    async with asyncio.timeout(ENOUGH_SECONDS):
        await Heir(tmp_path, never).wait(lambda: True)


async def test_a_client_is_left_alone_while_a_control_process_has_the_run_folder(
    tmp_path: Path, ended: ProcessIdentity
) -> None:
    run = RunFolder(tmp_path)
    run.save(record("vm", ended, ended))
    waiting = asyncio.get_running_loop().create_task(Heir(tmp_path, never).wait(lambda: True))
    await asyncio.sleep(0.1)
    assert not waiting.done()
    run.close()
    async with asyncio.timeout(ENOUGH_SECONDS):
        await waiting  # its process has ended, which the next control process makes up for
    assert RunFolder(tmp_path).record("vm") == record("vm", ended, ended)


async def test_it_ends_when_a_control_process_comes(tmp_path: Path, ended: ProcessIdentity) -> None:
    run = RunFolder(tmp_path)
    run.save(record("vm", identify(1), ended))
    run.close()
    looks = iter([True, True, True])
    async with asyncio.timeout(ENOUGH_SECONDS):
        await Heir(tmp_path, never).wait(lambda: next(looks, False))
