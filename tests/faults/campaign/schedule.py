"""What a campaign does to a set, in which order: a sequence that one seed decides. Pure.

Steps come in turns of two sorts. *Alone*: the set is whole before the fault and whole again before the next,
so that what the clients feel is that fault's doing. *Together*: faults follow one another every few hundred
milliseconds, each on something that is whole.
"""

from __future__ import annotations

import enum
import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Final


class Kind(enum.StrEnum):
    """What can be done to a set."""

    VIOS_KILL = "vios_kill"
    """SIGKILL; started again after the hold."""
    VIOS_STOP = "vios_stop"
    """SIGSTOP; SIGCONT after the hold."""
    VIOS_RESTART = "vios_restart"
    """SIGTERM; started again at once."""
    ALL_VIOS_KILL = "all_vios_kill"
    """SIGKILL of every VIOS; started again after the hold."""
    WORKER_KILL = "worker_kill"
    WORKER_STOP = "worker_stop"
    HYPERVISOR_KILL = "hypervisor_kill"
    """SIGKILL of the control process alone."""
    HYPERVISOR_STOP = "hypervisor_stop"
    HOST_KILL = "host_kill"
    """SIGKILL of the control process and of every worker, in one go."""
    LINK_CUT = "link_cut"
    """The link to the VIOS behind a network carries nothing until the hold ends."""
    DEVICE_FULL = "device_full"
    """No room on a device while a client writes its pages for the first time."""
    BIT_FLIP = "bit_flip"
    """Changed bytes in one replica of a mirrored volume."""


HOLDS: Final[dict[Kind, tuple[float, float]]] = {
    Kind.VIOS_KILL: (0.0, 1.0),
    Kind.VIOS_STOP: (0.2, 2.0),
    Kind.VIOS_RESTART: (0.0, 0.0),
    Kind.ALL_VIOS_KILL: (0.0, 1.0),
    Kind.WORKER_KILL: (0.0, 0.0),
    Kind.WORKER_STOP: (0.1, 1.0),
    Kind.HYPERVISOR_KILL: (0.0, 0.0),
    Kind.HYPERVISOR_STOP: (0.1, 1.0),
    Kind.HOST_KILL: (0.0, 0.0),
    Kind.LINK_CUT: (0.3, 2.5),
    Kind.DEVICE_FULL: (0.5, 2.0),
    Kind.BIT_FLIP: (0.0, 0.0),
}
"""Shortest and longest time in seconds for which a fault lasts before it is mended."""

WEIGHTS: Final[dict[Kind, int]] = {
    Kind.VIOS_KILL: 3,
    Kind.VIOS_STOP: 2,
    Kind.WORKER_KILL: 2,
    Kind.HOST_KILL: 2,
}
"""How often a kind is in the bag that faults are drawn from; once unless it is named."""

EXCLUSIVE: Final = frozenset({Kind.BIT_FLIP})
"""Comes alone always: while bytes of one replica are wrong, the other must not be lost."""

MOST_TOGETHER: Final = 3
STEPS_OF_A_TURN: Final = (4, 8)
GAP_SECONDS: Final = (0.1, 0.5)


@dataclass(frozen=True)
class Fault:
    """One fault to come; `choice` says which of the possible targets, when it is known what these are."""

    number: int
    kind: Kind
    choice: int
    hold_seconds: float


@dataclass(frozen=True)
class Step:
    """A fault, and how long after the last one, or after the set was whole, it comes."""

    fault: Fault
    alone: bool
    gap_seconds: float


def steps(seed: int, kinds: Collection[Kind]) -> Iterator[Step]:
    """Yield the endless sequence of a seed over the kinds that a set allows.

    Kinds are drawn from a bag that is filled again when it is empty, so that none is left out for long.
    """
    dice = random.Random(f"farpage campaign {seed}")
    bag: list[Kind] = []
    number = 0
    alone = False
    while True:
        alone = not alone
        for _ in range(dice.randint(*STEPS_OF_A_TURN)):
            if not bag:
                bag = [kind for kind in Kind if kind in kinds for _ in range(WEIGHTS.get(kind, 1))]
                dice.shuffle(bag)
            kind = bag.pop()
            fault = Fault(number, kind, dice.randrange(1 << 30), dice.uniform(*HOLDS[kind]))
            yield Step(fault, alone or kind in EXCLUSIVE, dice.uniform(*GAP_SECONDS))
            number += 1


def may_join(occupies: Collection[str], in_force: Collection[Collection[str]]) -> bool:
    """Tell whether a fault may come while others last, by what each of them takes away from the set."""
    return len(in_force) < MOST_TOGETHER and not any(set(occupies) & set(other) for other in in_force)
