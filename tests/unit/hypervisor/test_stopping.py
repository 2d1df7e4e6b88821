"""Which clients cannot do without a VIOS."""

from __future__ import annotations

import asyncio
import uuid
from dataclasses import asdict
from types import SimpleNamespace
from typing import cast

from farpage.address import UnixAddress
from farpage.definition import rules
from farpage.definition.model import Definition, PagingCommand, Redundancy, ViosRecord
from farpage.hypervisor.clients import Clients
from farpage.hypervisor.definitions import DefinitionKeeper
from farpage.hypervisor.stopping import ViosStops, needing
from farpage.hypervisor.vioses import Vios
from farpage.pager.counters import Counters
from farpage.pager.messages import ClientReport, CounterReport, PathReport
from farpage.volume.state import PathState


def definition() -> Definition:
    device = rules.FoundDevice(str(uuid.UUID(int=1)), "disk", "dir", "dir:/d", 1 << 20, tuple(PagingCommand))
    made = Definition()
    for vios in ("vios1", "vios2"):
        made = rules.register_vios(made, vios, ViosRecord(control="unix:/c", data=("unix:/d",)), [device])
    return rules.add_client(made, "vm1", memory_bytes=4096, hypervisor="host", redundancy=Redundancy.PATH)


def report(**states: PathState) -> ClientReport:
    paths = [
        PathReport(
            vios=vios, device="disk", state=state, reason="", epoch=1, in_flight=0, held=0, losses=0,
            since_seconds=0.0,
        )
        for vios, state in states.items()
    ]  # fmt: skip
    return ClientReport(
        client="vm1", replicas=(), hedged_reads=0, hedges_won=0, pages_by_state={}, limit_pages=1, epoch=1,
        fenced="", stalled_faults=0, without_path_seconds=None, device_full=False, page_outs_wait=False,
        scrub=None,
        counters=CounterReport(**asdict(Counters())), paths=tuple(paths), failovers=(),
    )  # fmt: skip


def test_a_client_with_another_working_path_can_do_without() -> None:
    for other in (PathState.ACTIVE, PathState.STANDBY):
        assert needing("vios1", definition(), {"vm1": report(vios1=PathState.ACTIVE, vios2=other)}) == ()


def test_a_client_whose_other_path_does_not_work_needs_the_vios() -> None:
    for other in (PathState.FAILED, PathState.SUSPECT):
        assert needing("vios1", definition(), {"vm1": report(vios1=PathState.ACTIVE, vios2=other)}) == (
            "vm1",
        )


def test_a_client_with_one_path_needs_its_vios_and_no_other() -> None:
    reports = {"vm1": report(vios1=PathState.ACTIVE)}
    assert needing("vios1", definition(), reports) == ("vm1",)
    assert needing("vios2", definition(), reports) == ()


def test_a_replica_that_is_not_in_sync_is_no_help() -> None:
    before = definition()
    client = before.clients["vm1"]
    volume = client.volumes[0]
    stale = volume.replicas[0].model_copy(update={"state": "stale"})
    client = client.model_copy(update={"volumes": (volume.model_copy(update={"replicas": (stale,)}),)})
    after = before.model_copy(update={"clients": {"vm1": client}})
    reports = {"vm1": report(vios1=PathState.ACTIVE, vios2=PathState.STANDBY)}
    assert needing("vios1", after, reports) == ("vm1",)


class TwoClients:
    """Clients that a worker pages each; the first one's is lost while the second one leaves."""

    def __init__(self) -> None:
        self.attached = {name: SimpleNamespace(worker=object()) for name in ("vm1", "vm2")}
        self.left: list[str] = []
        self.rejoined: list[str] = []

    async def report(self, client: str) -> ClientReport:
        return report(vios1=PathState.ACTIVE, vios2=PathState.STANDBY)

    async def leave(self, client: str, vios: str) -> None:
        self.left.append(client)
        if self.left == ["vm1", "vm2"]:
            self.attached["vm1"].worker = object()

    async def rejoin(self, client: str, vios: str, reason: str) -> None:
        self.rejoined.append(client)


async def test_a_client_whose_worker_is_lost_after_it_left_leaves_again_before_the_vios_stops() -> None:
    clients = TwoClients()
    process = await asyncio.create_subprocess_exec("sleep", "60")

    class Stoppable:
        name = "vios1"
        reachable = True
        problem = ""
        health = SimpleNamespace(pid=process.pid)
        client = SimpleNamespace(address=UnixAddress("/control"))

        async def ask(self) -> None:
            pass

        async def stop(self) -> None:
            assert clients.left == ["vm1", "vm2", "vm1"]
            process.kill()

    both = rules.add_client(
        definition(), "vm2", memory_bytes=4096, hypervisor="host", redundancy=Redundancy.PATH
    )
    keeper = SimpleNamespace(current=both)
    stops = ViosStops(
        {"vios1": cast(Vios, Stoppable())}, cast(DefinitionKeeper, keeper), cast(Clients, clients)
    )
    stopped = await stops.stop("vios1", force=False)
    await process.wait()
    assert stopped.moved == ("vm1", "vm2")
    assert clients.rejoined == ["vm1", "vm2"]
