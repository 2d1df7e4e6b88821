"""What a recovery takes a client's replicas for when the definition cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from farpage.attach.memory import ClientKind
from farpage.definition.errors import ClientMissing
from farpage.definition.model import ReplicaState
from farpage.hypervisor.clients import Clients
from farpage.hypervisor.pool import MemoryPool
from farpage.hypervisor.records import ClientRecords
from farpage.hypervisor.replicas import ClientReplicas
from farpage.hypervisor.runfolder import RunFolder
from farpage.kernel.process import ProcessIdentity
from farpage.pager.attachmentrecord import AttachmentRecord
from farpage.pager.messages import Attach, EndpointSpec, RecordReplicas, ReplicaSpec

IN_SYNC, STALE = ReplicaState.IN_SYNC, ReplicaState.STALE


class Records:
    """A definition that every change is stored in, and that nobody can read."""

    def __init__(self) -> None:
        self.stored: list[RecordReplicas] = []

    async def record_replicas(self, wanted: RecordReplicas) -> None:
        self.stored.append(wanted)

    def replicas(self, client: str, turn: int) -> tuple[ReplicaSpec, ...]:
        raise ClientMissing(client)

    def replica_states(self, client: str) -> dict[str, ReplicaState]:
        return {}


def order() -> Attach:
    return Attach(
        client="vm",
        volume="vm",
        epoch=1,
        owner="aa",
        kind=ClientKind.PROCESS,
        pid=7,
        pages=16,
        start_address=0,
        memfd_offset_bytes=0,
        limit_pages=16,
        replicas=tuple(
            ReplicaSpec(
                device=device,
                name=device,
                state=IN_SYNC,
                endpoints=(EndpointSpec(vios="vios1", address="unix:/tmp/data.sock"),),
            )
            for device in ("one", "two")
        ),
        state_path="/run/vm.state",
        path_timeout_seconds=1,
        open_timeout_seconds=1,
    )


def clients_with(folder: RunFolder) -> Clients:
    clients = Clients(cast(ClientRecords, Records()), cast(MemoryPool, None))
    clients.run = folder
    folder.save(
        AttachmentRecord(
            client="vm",
            kind=ClientKind.PROCESS,
            process=ProcessIdentity(pid=7, started_ticks=123, boot="b"),
            order=order(),
        )
    )
    return clients


async def wanted_by(clients: Clients, owner: str) -> list[ReplicaState]:
    """Have a worker record one replica as stale, and return what the next control process finds."""
    states = {"one": IN_SYNC, "two": STALE}
    replicas = ClientReplicas(clients)
    await replicas.record(RecordReplicas(client="vm", owner=owner, epoch=2, states=states))
    (record,) = clients.run.records()
    assert record.order is not None
    return [replica.state for replica in replicas.current("vm", record.order)]


async def test_a_replica_recorded_as_stale_is_not_taken_for_in_sync(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert await wanted_by(clients_with(folder), "aa") == [IN_SYNC, STALE]
    folder.close()


@pytest.mark.parametrize("owner", ["bb", ""])
async def test_what_another_owner_records_is_not_this_client_s(tmp_path: Path, owner: str) -> None:
    folder = RunFolder(tmp_path)
    assert await wanted_by(clients_with(folder), owner) == [IN_SYNC, IN_SYNC]
    folder.close()
