"""What a recovery takes a client's replicas for when the definition cannot be read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from farpage.attach.memory import ClientKind
from farpage.definition.errors import ClientMissing
from farpage.definition.model import ReplicaState
from farpage.hypervisor.attached import Attached
from farpage.hypervisor.clients import Clients
from farpage.hypervisor.definitions import NoVios
from farpage.hypervisor.errors import WorkerReplaced
from farpage.hypervisor.pool import MemoryPool
from farpage.hypervisor.records import ClientRecords
from farpage.hypervisor.replicas import ClientReplicas
from farpage.hypervisor.runfolder import RunFolder
from farpage.kernel.process import ProcessIdentity
from farpage.pager.attachmentrecord import AttachmentRecord
from farpage.pager.messages import Attach, EndpointSpec, RecordReplicas, ReplicaSpec

IN_SYNC, STALE = ReplicaState.IN_SYNC, ReplicaState.STALE


class Records:
    """A definition that every change is stored in, and that nobody can read but for the replicas `known`."""

    def __init__(self) -> None:
        self.stored: list[RecordReplicas] = []
        self.known: tuple[ReplicaSpec, ...] = ()
        self.fails = False

    async def record_replicas(self, wanted: RecordReplicas, begins: Callable[[], None]) -> None:
        begins()
        if self.fails:
            raise NoVios("none answers")
        self.stored.append(wanted)

    def replicas(self, client: str, turn: int) -> tuple[ReplicaSpec, ...]:
        if not self.known:
            raise ClientMissing(client)
        return self.known

    def replica_states(self, client: str) -> dict[str, ReplicaState]:
        return {replica.device: replica.state for replica in self.known}


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


def attached_with(clients: Clients) -> Attached:
    """Enter the client, whose worker has come to epoch 2."""
    (record,) = clients.run.records()
    state, worker = SimpleNamespace(epoch=2), SimpleNamespace(clients=set[str]())
    attached = Attached(record, cast(Any, None), cast(Any, state), cast(Any, worker), 16 * 4096)
    clients.attached["vm"] = attached
    return attached


def for_next_worker(clients: Clients) -> list[tuple[ReplicaState, bool]]:
    """Return the states that the next worker is told, and which of them it cannot be sure of."""
    attached = clients.attached["vm"]
    assert attached.record.order is not None
    specs = ClientReplicas(clients).for_next_worker("vm", attached, attached.record.order)
    return [(spec.state, spec.unsure) for spec in specs]


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


async def test_what_may_be_stored_is_unsure_until_it_is_known(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    clients = clients_with(folder)
    attached_with(clients)
    replicas, records = ClientReplicas(clients), cast(Records, clients.records)
    wanted = RecordReplicas(client="vm", owner="aa", epoch=2, states={"one": IN_SYNC, "two": STALE})
    records.fails = True
    with pytest.raises(NoVios):
        await replicas.record(wanted)
    assert for_next_worker(clients) == [(IN_SYNC, False), (IN_SYNC, True)]
    records.fails = False
    await replicas.record(wanted.model_copy(update={"epoch": 3}))
    assert for_next_worker(clients) == [(IN_SYNC, False), (STALE, False)]
    folder.close()


async def test_nothing_is_recorded_for_a_worker_that_was_replaced(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    clients = clients_with(folder)
    attached_with(clients)
    assert for_next_worker(clients) == [(IN_SYNC, False), (IN_SYNC, False)]
    late = RecordReplicas(client="vm", owner="aa", epoch=2, states={"one": IN_SYNC, "two": STALE})
    with pytest.raises(WorkerReplaced):
        await ClientReplicas(clients).record(late)
    assert cast(Records, clients.records).stored == []
    assert for_next_worker(clients) == [(IN_SYNC, False), (IN_SYNC, False)]
    folder.close()


async def test_a_retired_replica_is_nothing_to_the_next_worker_unless_it_may_be_coming_back(
    tmp_path: Path,
) -> None:
    folder = RunFolder(tmp_path)
    clients = clients_with(folder)
    attached = attached_with(clients)
    states = {"one": ReplicaState.RETIRED, "two": IN_SYNC}
    await ClientReplicas(clients).record(RecordReplicas(client="vm", owner="aa", epoch=2, states=states))
    assert for_next_worker(clients) == [(IN_SYNC, False)]
    attached.replaced_epoch = 0
    back = RecordReplicas(client="vm", owner="aa", epoch=2, states={"one": IN_SYNC, "two": STALE})
    cast(Records, clients.records).fails = True
    with pytest.raises(NoVios):
        await ClientReplicas(clients).record(back)
    assert sorted(for_next_worker(clients)) == [(IN_SYNC, True), (STALE, True)]
    folder.close()


async def test_the_next_worker_is_told_of_no_stale_replica_that_none_was_told_of(
    tmp_path: Path,
) -> None:
    """Until its volume is made, it may be undone."""
    folder = RunFolder(tmp_path)
    clients = clients_with(folder)
    attached_with(clients)
    one, two = order().replicas
    new = two.model_copy(update={"device": "new", "name": "new", "state": STALE})
    cast(Records, clients.records).known = (one, two.model_copy(update={"state": STALE}), new)
    assert for_next_worker(clients) == [(IN_SYNC, False), (STALE, False)]
    folder.close()
