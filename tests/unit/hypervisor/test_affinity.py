"""When workers are moved, and what of it that cannot be done costs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from farpage.hypervisor import affinity
from farpage.hypervisor.affinity import LOOK_TICKS, WorkerAffinity
from farpage.hypervisor.workercpus import parse_worker_cpus

ALLOWED = frozenset(range(4))
WORKER = 100


class Machine:
    """Processes and where they may run, in place of the kernel's; a client's number is its process."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cpus = {WORKER: ALLOWED}
        self.moves: list[frozenset[int]] = []
        self.warnings: list[str] = []
        self.error: OSError | None = None
        self.worker: Any = SimpleNamespace(pid=WORKER, clients=set(), lost=False)
        self.attached: dict[str, int] = {}
        monkeypatch.setattr(affinity, "cpus_of", self.cpus.get)
        monkeypatch.setattr(affinity, "cpus_by_thread", lambda pid: {pid: self.cpus[pid]})
        monkeypatch.setattr(affinity, "confine", self.confine)
        monkeypatch.setattr(affinity.log, "warning", lambda event, **_: self.warnings.append(event))

    def confine(self, pid: int, cpus: frozenset[int]) -> None:
        self.moves.append(cpus)
        if self.error:
            raise self.error
        self.cpus[pid] = cpus

    def attach(self, pid: int, *cpus: int) -> None:
        self.cpus[pid] = frozenset(cpus)
        self.attached[f"c{pid}"] = pid
        self.worker.clients.add(f"c{pid}")

    def follow(self, setting: str) -> WorkerAffinity:
        return WorkerAffinity(parse_worker_cpus(setting, ALLOWED), lambda: [self.worker], self.attached.get)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


def look(followed: WorkerAffinity, times: int = LOOK_TICKS) -> None:
    for _ in range(times):
        followed.look()


def test_a_worker_follows_its_clients_as_they_come_and_go_at_once(machine: Machine) -> None:
    followed = machine.follow("clients")
    look(followed, 1)
    machine.attach(1, 2)
    look(followed, 1)
    machine.attach(2, 3)
    look(followed, 1)
    machine.worker.clients.clear()
    look(followed, 1)
    assert machine.moves == [{2}, {2, 3}, ALLOWED]


def test_pinning_that_changes_is_followed_at_the_next_look(machine: Machine) -> None:
    followed = machine.follow("clients")
    machine.attach(1, 2)
    look(followed)
    machine.cpus[1] = frozenset([0])
    look(followed)
    look(followed, 5 * LOOK_TICKS)
    assert machine.moves == [{2}, {0}]


@pytest.mark.parametrize(("setting", "cpus"), [("any", ALLOWED), ("1-2", {1, 2})])
def test_a_worker_of_an_earlier_hypervisor_goes_by_the_setting_of_this_one(
    machine: Machine, setting: str, cpus: set[int]
) -> None:
    machine.attach(1, 3)
    machine.cpus[WORKER] = frozenset([3])
    look(machine.follow(setting), 3 * LOOK_TICKS)
    assert machine.moves == [cpus]


def test_an_adopted_worker_stays_where_it_is_until_its_clients_are_known(machine: Machine) -> None:
    machine.cpus[WORKER] = frozenset([3])
    machine.worker.clients.add("c1")
    followed = machine.follow("clients")
    look(followed)
    machine.attach(1, 3)
    look(followed)
    assert machine.moves == []


def test_a_failure_is_told_once_and_tried_again(machine: Machine) -> None:
    followed = machine.follow("clients")
    machine.error = PermissionError(1, "Operation not permitted")
    machine.attach(1, 2)
    look(followed, 3 * LOOK_TICKS)
    assert machine.warnings == ["worker_not_moved"]
    assert len(machine.moves) >= 3
    machine.error = None
    look(followed)
    assert machine.cpus[WORKER] == {2}


def test_a_lost_worker_is_left_alone(machine: Machine) -> None:
    machine.worker.lost = True
    machine.attach(1, 2)
    look(machine.follow("clients"))
    assert machine.moves == []
