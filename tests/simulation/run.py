"""One run, drawn from its seed: which scenario it is, and what it came to."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Protocol
from unittest import mock

from farpage.log import diverted
from farpage.vios.model import HandoverInfo
from tests.simulation.checker import History, wrong_reads
from tests.simulation.connection import SimulatedServerProcess
from tests.simulation.dataworker import simulated_heirs
from tests.simulation.handing_over import HandingOver
from tests.simulation.keeping import Keeping
from tests.simulation.moving import Moving
from tests.simulation.mutations import mutated
from tests.simulation.replacing import Replacing
from tests.simulation.scenario import Scenario
from tests.simulation.two_owners import TwoOwners
from tests.simulation.world import Process, World


class Runnable(Protocol):
    """What every scenario offers."""

    def __init__(self, world: World) -> None: ...

    @property
    def fault_names(self) -> Sequence[str]:
        """What went wrong."""

    def run(self) -> None:
        """Run it to its end; what does not hold is told to the world."""

    def histories(self) -> Iterable[History]:
        """Return what is to be held against the registers of pages."""

    def close(self) -> None:
        """Give back what outlives the world."""


SCENARIOS: dict[type[Runnable], int] = {
    Keeping: 10,
    Replacing: 15,
    Scenario: 45,
    TwoOwners: 10,
    Moving: 15,
    HandingOver: 5,
}
"""The scenarios, each drawn with its weight."""


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    seed: int
    scenario: str
    violations: tuple[str, ...]
    digest: str
    events: int
    reads: int
    writes: int
    faults: tuple[str, ...]
    error: BaseException | None = None


@contextmanager
def quiet() -> Iterator[None]:
    """Drop the logs of the code under test, which cost more than the code."""
    with diverted(lambda _line: None):
        yield


def scenario_of(world: World) -> Callable[[World], Runnable]:
    """Draw the scenario of a world."""
    (kind,) = world.random("kind of scenario").choices(list(SCENARIOS), list(SCENARIOS.values()))
    return kind


def run_seed(
    seed: int,
    *,
    mutation: str | None = None,
    kind: Callable[[World], Runnable] | None = None,
    trace: Callable[[str], None] | None = None,
) -> Outcome:
    """Run one seed, with a mutation if one is named; `kind` asks for a scenario instead of drawing it."""
    world = World(seed, trace=trace)
    kind = kind or scenario_of(world)
    with ExitStack() as stack:
        stack.enter_context(quiet())
        stack.enter_context(simulated_heirs())
        stack.enter_context(mutated(mutation))
        stack.enter_context(mock.patch("farpage.volume.link.ServerProcess", SimulatedServerProcess))
        # Devices have short identifiers here.
        stack.enter_context(mock.patch("farpage.vios.service.HandoverInfo", HandoverInfo.model_construct))
        SimulatedServerProcess.find = partial(_process_of, world)
        scenario = kind(world)
        scenario.run()
        histories = list(scenario.histories())
        if not world.violations:
            for history in histories:
                for problem in wrong_reads(history):
                    world.violated(problem)
        world.end()
    scenario.close()
    return Outcome(
        seed=seed,
        scenario=kind.__name__,
        violations=tuple(world.violations),
        digest=world.digest,
        events=world.events,
        reads=sum(len(history.reads) for history in histories),
        writes=sum(len(writes) for history in histories for writes in history.writes.values()),
        faults=tuple(scenario.fault_names),
        error=world.error,
    )


def _process_of(world: World, pid: int) -> Process:
    return world.processes[pid - 1000]
