"""How each fault is done to a set, and mended."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from contextlib import suppress

from farpage.hypervisor.model import ScrubInfo, ScrubStart
from farpage.pager.progress import ScrubState
from tests.faults.campaign.damage import flip_bits
from tests.faults.campaign.place import FILLED_BY, TOKEN_VARIABLE, Place, is_of_campaign
from tests.faults.campaign.schedule import Fault, Kind

FAR_VIOS = "vios3"
DAMAGED_PAGES = 32
SCRUB_BYTES = 256 << 20
SCRUB_LOOK_SECONDS = 0.1


class Injection:
    """A fault whose target is known."""

    occupies: tuple[str, ...]
    """What it takes away from the set."""
    starts_again = ""
    """The daemon that clients wait for, which `mend` starts again."""

    def __init__(self, place: Place, fault: Fault) -> None:
        self.place = place
        self.fault = fault

    @property
    def target(self) -> str:
        """What is hit, in words."""
        return ", ".join(self.occupies)

    async def prepare(self) -> None:
        """Do what belongs before a fault that comes alone, without being one."""

    def inject(self) -> None:
        """Do it; returns at once."""
        raise NotImplementedError

    async def mend(self) -> None:
        """Undo it; on return whoever was ended runs again and answers."""


class _OneVios(Injection):
    def __init__(self, place: Place, fault: Fault) -> None:
        super().__init__(place, fault)
        # Where the clients' commands go is hit more often.
        likely = place.active_vioses() * 4 + list(place.embedded.vioses)
        self.name = likely[fault.choice % len(likely)]
        self.occupies = (self.name,)

    def _end(self, number: signal.Signals) -> None:
        self.place.embedded.supervise_vios(self.name, supervised=False)
        self.place.embedded.kill_vios(self.name, number)

    async def _start(self) -> None:
        await self.place.embedded.vios_exited(self.name)
        await self.place.embedded.start_vios(self.name)


class ViosKilled(_OneVios):
    def inject(self) -> None:
        self._end(signal.SIGKILL)

    async def mend(self) -> None:
        await self._start()


class ViosRestarted(_OneVios):
    def inject(self) -> None:
        self._end(signal.SIGTERM)

    async def mend(self) -> None:
        await self._start()


class ViosStopped(_OneVios):
    def inject(self) -> None:
        self.place.embedded.kill_vios(self.name, signal.SIGSTOP)

    async def mend(self) -> None:
        self.place.embedded.kill_vios(self.name, signal.SIGCONT)


class AllViosKilled(Injection):
    def __init__(self, place: Place, fault: Fault) -> None:
        super().__init__(place, fault)
        self.occupies = tuple(place.embedded.vioses)

    def inject(self) -> None:
        for name in self.occupies:
            self.place.embedded.supervise_vios(name, supervised=False)
            self.place.embedded.kill_vios(name, signal.SIGKILL)

    async def mend(self) -> None:
        await asyncio.gather(*map(self._start, self.occupies))

    async def _start(self, name: str) -> None:
        await self.place.embedded.vios_exited(name)
        await self.place.embedded.start_vios(name)


class _OneWorker(Injection):
    occupies = ("workers",)

    def __init__(self, place: Place, fault: Fault) -> None:
        super().__init__(place, fault)
        likely = [worker for worker in place.workers if worker.clients] or place.workers
        self.pid = likely[fault.choice % len(likely)].pid

    @property
    def target(self) -> str:
        return f"worker {self.pid}"


class WorkerKilled(_OneWorker):
    def inject(self) -> None:
        _send(self.pid, signal.SIGKILL)


class WorkerStopped(_OneWorker):
    def inject(self) -> None:
        _send(self.pid, signal.SIGSTOP)

    async def mend(self) -> None:
        _send(self.pid, signal.SIGCONT)


class HypervisorKilled(Injection):
    occupies: tuple[str, ...] = ("hypervisor",)
    starts_again = "hypervisor"

    def inject(self) -> None:
        self.place.embedded.supervise_hypervisor(supervised=False)
        self.place.embedded.kill_hypervisor(signal.SIGKILL)

    async def mend(self) -> None:
        await self.place.embedded.hypervisor_exited()
        await self.place.embedded.start_hypervisor()


class HypervisorStopped(Injection):
    occupies = ("hypervisor",)

    def inject(self) -> None:
        self.place.embedded.kill_hypervisor(signal.SIGSTOP)

    async def mend(self) -> None:
        self.place.embedded.kill_hypervisor(signal.SIGCONT)


class HostKilled(HypervisorKilled):
    occupies = ("hypervisor", "workers")

    def inject(self) -> None:
        super().inject()
        for worker in self.place.workers:
            _send(worker.pid, signal.SIGKILL)


class LinkCut(Injection):
    occupies = (FAR_VIOS,)

    def inject(self) -> None:
        assert self.place.link
        self.place.link.cut()

    async def mend(self) -> None:
        assert self.place.link
        self.place.link.mend()


class DeviceFull(Injection):
    def __init__(self, place: Place, fault: Fault) -> None:
        super().__init__(place, fault)
        self.client, where = list(FILLED_BY.items())[fault.choice % len(FILLED_BY)]
        self.device = place.small[where]
        self.occupies = (f"small device of {self.client}",)
        self._new_client = False

    async def prepare(self) -> None:
        # A client whose pages are all on the device needs no more room there; a new one does.
        await self.place.finish_client(self.client)
        await self.place.start_client(self.client)
        self._new_client = True

    def inject(self) -> None:
        self.device.fill()
        if self._new_client:
            self.place.clients[self.client].go()

    async def mend(self) -> None:
        self.device.empty()


class BitFlip(Injection):
    """Bits in one replica's file, while the others are in sync; then a scrub, and one that finds nothing."""

    def __init__(self, place: Place, fault: Fault) -> None:
        super().__init__(place, fault)
        mirrored = place.mirrored()
        client = mirrored[fault.choice % len(mirrored)]
        replica = client.replicas[fault.choice // len(mirrored) % len(client.replicas)]
        self.client = client.name
        self.volume = place.folder_of(replica.device) / "volumes" / client.name
        self.occupies = tuple(path.vios for path in client.paths)
        self._where = f"replica of {client.name} on {replica.device}"

    @property
    def target(self) -> str:
        return self._where

    def inject(self) -> None:
        self.place.damaged_pages += flip_bits(self.volume, DAMAGED_PAGES, self.fault.number)

    async def mend(self) -> None:
        self.place.repaired_pages += (await self._scrub()).repaired_pages
        again = await self._scrub()
        assert not again.wrong_pages, f"{self.target}: wrong after a scrub: {again}"

    async def _scrub(self) -> ScrubInfo:
        hypervisor = self.place.embedded.hypervisor
        await hypervisor.start_scrub(self.client, ScrubStart(rate_bytes=SCRUB_BYTES))
        while True:
            scrub = (await hypervisor.client(self.client)).scrub
            assert scrub is not None
            if scrub.state is not ScrubState.RUNNING:
                return scrub
            await asyncio.sleep(SCRUB_LOOK_SECONDS)


INJECTIONS: dict[Kind, Callable[[Place, Fault], Injection]] = {
    Kind.VIOS_KILL: ViosKilled,
    Kind.VIOS_STOP: ViosStopped,
    Kind.VIOS_RESTART: ViosRestarted,
    Kind.ALL_VIOS_KILL: AllViosKilled,
    Kind.WORKER_KILL: WorkerKilled,
    Kind.WORKER_STOP: WorkerStopped,
    Kind.HYPERVISOR_KILL: HypervisorKilled,
    Kind.HYPERVISOR_STOP: HypervisorStopped,
    Kind.HOST_KILL: HostKilled,
    Kind.LINK_CUT: LinkCut,
    Kind.DEVICE_FULL: DeviceFull,
    Kind.BIT_FLIP: BitFlip,
}


def possible_kinds(place: Place) -> set[Kind]:
    """Return the kinds that a place allows."""
    impossible = {
        kind for kind, means in ((Kind.LINK_CUT, place.link), (Kind.DEVICE_FULL, place.small)) if not means
    }
    return set(Kind) - impossible


def _send(pid: int, number: signal.Signals) -> None:
    # A worker may have ended since the hypervisor named it, and its number may be somebody else's by now.
    if is_of_campaign(pid, os.environ[TOKEN_VARIABLE]):
        with suppress(ProcessLookupError):
            os.kill(pid, number)
