"""What goes wrong when: drawn from the seed, carried out by the world."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from tests.simulation.disk import Disk
from tests.simulation.guest import Guest
from tests.simulation.network import Network
from tests.simulation.vios import SimulatedVios
from tests.simulation.world import World

READ_AGAIN_SECONDS = 20.0
"""A wrong read is repeated within this time."""

Action = Callable[[], None]


@dataclass(frozen=True)
class Fault:
    """One fault: what begins it and what ends it."""

    name: str
    begin: Action
    end: Action


@dataclass(frozen=True)
class Parts:
    """What can fail; `hosts` are those of the clients, as their connections name them."""

    network: Network
    vioses: Sequence[SimulatedVios]
    disks: Sequence[Disk]
    hosts: Sequence[str]
    guest: Callable[[], Guest | None]
    """Whose pages a flipped bit may cost."""
    crash_worker: Action


def nothing() -> None:
    """End a fault that ends by itself."""


# Kinds of faults, each drawn with its weight


def stop_vios(parts: Parts, chance: random.Random) -> Fault:
    """SIGSTOP, and SIGCONT."""
    vios = chance.choice(parts.vioses)
    return Fault(f"stop {vios.name}", vios.process.stop, vios.process.cont)


def kill_vios(parts: Parts, chance: random.Random) -> Fault:
    """SIGKILL, and a new start."""
    vios = chance.choice(parts.vioses)
    return Fault(f"kill {vios.name}", vios.process.kill, vios.start_again)


def cut(parts: Parts, chance: random.Random) -> Fault:
    """Break the connections of a VIOS; one side or the other may not hear of it."""
    vios = chance.choice(parts.vioses)
    sides = chance.choice(((True, True), (True, False), (False, True)))
    return Fault(f"cut {vios.name}", lambda: _cut(parts.network, vios, *sides), nothing)


def _cut(network: Network, vios: SimulatedVios, clients: bool, server: bool) -> None:
    for pipe in list(network.pipes):
        if pipe.server is vios.process:
            if clients:
                pipe.reset(pipe.client)
            if server:
                pipe.reset(pipe.server)


def block(parts: Parts, chance: random.Random) -> Fault:
    """Let nothing through, one way or both."""
    vios, host = chance.choice(parts.vioses), chance.choice(parts.hosts)
    there, back = (host, vios.name), (vios.name, host)
    ways = chance.choice(((there,), (back,), (there, back)))
    names = ",".join(f"{source}>{target}" for source, target in ways)

    def begin() -> None:
        parts.network.blocked.update(ways)

    return Fault(f"block {names}", begin, partial(parts.network.heal, ways))


def hang_disk(parts: Parts, chance: random.Random) -> Fault:
    """Carry no command out for a while."""
    disk = chance.choice(parts.disks)
    return Fault(f"hang {disk.name}", partial(setattr, disk, "hung", True), disk.resume)


def fill_disk(parts: Parts, chance: random.Random) -> Fault:
    """Have no room for new pages."""
    disk = chance.choice(parts.disks)
    return Fault(
        f"fill {disk.name}", partial(setattr, disk, "full", True), partial(setattr, disk, "full", False)
    )


def fail_disk(parts: Parts, chance: random.Random) -> Fault:
    """Answer with I/O errors."""
    disk = chance.choice(parts.disks)
    return Fault(
        f"fail {disk.name}", partial(setattr, disk, "failing", True), partial(setattr, disk, "failing", False)
    )


def kill_worker(parts: Parts, _chance: random.Random) -> Fault:
    """SIGKILL of the client's worker; another one takes its place by itself."""
    return Fault("kill the worker", parts.crash_worker, nothing)


def flip_stored(parts: Parts, chance: random.Random) -> Fault:
    """Change bits of a few stored pages."""
    disk = chance.choice(parts.disks)

    def begin() -> None:
        for page in chance.sample(disk.stored_pages(), min(3, len(disk.stored_pages()))):
            disk.flip(page)
            if guest := parts.guest():
                guest.may_be_lost.add(page)

    return Fault(f"flip {disk.name}", begin, nothing)


def flip_read(parts: Parts, chance: random.Random) -> Fault:
    """Change a bit of what one read returns, and not of what is stored; not of the next reads, too."""
    disk = chance.choice(parts.disks)

    def begin() -> None:
        now = disk.world.now_seconds
        if not disk.flips and now > disk.flipped_seconds + READ_AGAIN_SECONDS:
            disk.flips = 1

    return Fault(f"flip a read of {disk.name}", begin, nothing)


Kind = Callable[[Parts, random.Random], Fault]

PATH_KINDS: dict[Kind, int] = {
    stop_vios: 6,
    kill_vios: 5,
    cut: 3,
    block: 4,
    hang_disk: 2,
    fill_disk: 1,
    fail_disk: 1,
}

WORKER_KINDS: dict[Kind, int] = {kill_worker: 3}
FLIP_KINDS: dict[Kind, int] = {flip_stored: 2}
FLIP_READ_KINDS: dict[Kind, int] = {flip_read: 3}


class FaultSchedule:
    """The faults of one run."""

    def __init__(self, world: World, parts: Parts, kinds: dict[Kind, int]) -> None:
        self.done: list[str] = []
        self._world = world
        self._parts = parts
        self._kinds = kinds
        self._chance = world.random("faults")
        self.healed = False

    def start(self, seconds: float) -> None:
        """Let them happen within the next `seconds`."""
        chance = self._chance
        for _ in range(chance.choice((0, 2, 4, 8, 14))):
            self._world.after(chance.random() * seconds, self._begin)

    def _begin(self) -> None:
        if self.healed:
            return
        chance = self._chance
        (kind,) = chance.choices(list(self._kinds), list(self._kinds.values()))
        seconds = chance.choice((0.01, 0.3, 0.8, 1.2, 2.5, 7.0)) * (0.5 + chance.random())
        fault = kind(self._parts, chance)
        self.done.append(fault.name)
        self._world.note(f"fault: {fault.name} for {seconds:.3f} s")
        fault.begin()
        self._world.after(seconds, fault.end)

    def heal(self) -> None:
        """End every fault."""
        self.healed = True
        self._world.note("healed")
        self._parts.network.heal()
        for disk in self._parts.disks:
            disk.full = disk.failing = False
            disk.resume()
        for vios in self._parts.vioses:
            vios.process.cont()
            vios.start_again()
