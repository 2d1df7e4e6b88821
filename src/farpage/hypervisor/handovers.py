"""The page tables of released clients, kept at the VIOS and fetched; `tables.py` makes and lays them out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from farpage import handover
from farpage.definition.model import ClientRecord, Release, ReplicaState
from farpage.errors import ExitStatus, FarpageError
from farpage.handover import Handover
from farpage.hypervisor.definitions import DefinitionKeeper, NoVios
from farpage.hypervisor.vioses import Vios
from farpage.log import get_logger
from farpage.pager.attachmentrecord import AdoptedRelease

log = get_logger()


@dataclass(eq=False)
class HandoverUnreachable(FarpageError):
    """Nobody who answers has the client's page table."""

    code = "handover_unreachable"
    template = "the page table of released client {client!r} cannot be fetched: {problems}"
    remedy = "start the VIOS that stored it at the release; 'farpage vios list' shows which answer"
    exit_status = ExitStatus.UNREACHABLE
    client: str
    problems: str


@dataclass(eq=False)
class HandoverMismatch(FarpageError):
    """The memory is not as large as the one that was released."""

    code = "handover_mismatch"
    template = "client {client!r} was released with {released_bytes} bytes of memory, this has {found_bytes}"
    remedy = "attach memory of the same size"
    exit_status = ExitStatus.CONFLICT
    client: str
    released_bytes: int
    found_bytes: int


def kept(released: Release) -> AdoptedRelease:
    """Return a release as the run folder has it."""
    return AdoptedRelease(**released.model_dump())


def release_of(adopted: AdoptedRelease) -> Release:
    """Return a release that the run folder has."""
    return Release(
        hypervisor=adopted.hypervisor, epoch=adopted.epoch, digest=adopted.digest, adopter=adopted.adopter
    )


class Handovers:
    """Those of this hypervisor's clients, at every VIOS that reaches one of their devices."""

    def __init__(self, keeper: DefinitionKeeper, vioses: Mapping[str, Vios]) -> None:
        self.counts: Counter[str] = Counter()
        """How often a client was `released`, `adopted`, and `started` from what another one released."""
        self._keeper = keeper
        self._vioses = vioses

    async def store(self, volume: str, record: ClientRecord, epoch: int, encoded: bytes) -> None:
        """Keep a page table at every VIOS that answers, and surely at one for each replica that is in sync.

        :raise FarpageError: some replica would be without.
        """
        for device in _devices(record, in_sync=True):
            stored = 0
            problems: list[str] = []
            for vios in self._reaching(device):
                try:
                    await vios.put_handover(volume, device, epoch, record.owner, encoded)
                    stored += 1
                except FarpageError as error:
                    problems.append(f"{vios.name}: {error.cause}")
            if not stored:
                raise NoVios("; ".join(problems) or "none reaches the device")
            if problems:
                log.warning("handover_stored_at_fewer", volume=volume, problem="; ".join(problems))

    async def fetch(self, client: str, record: ClientRecord, released: Release) -> Handover:
        """Find the page table that a release is about.

        :raise HandoverUnreachable: nobody who answers has it.
        """
        volume = record.volumes[0].name
        problems: list[str] = []
        for device in _devices(record):
            for vios in self._reaching(device):
                try:
                    encoded = await vios.handover(volume, device)
                    found = handover.decode(encoded, whose=f"client {client!r}")
                except FarpageError as error:
                    problems.append(f"{vios.name}: {error.cause}")
                    continue
                if handover.check(encoded, whose=client).digest == released.digest:
                    return found
                problems.append(f"{vios.name} has one of another release")
        raise HandoverUnreachable(client, "; ".join(problems) or "no VIOS reaches its devices")

    async def forget(self, record: ClientRecord) -> None:
        """Delete what is stored, where a VIOS answers: the client is attached, or is about to be deleted."""
        volume = record.volumes[0].name
        for device in _devices(record):
            for vios in self._reaching(device):
                try:
                    await vios.delete_handover(volume, device, record.epoch, record.owner)
                except FarpageError as error:
                    # It is overwritten by the next one, or goes with the volume; its digest is not believed.
                    log.info("handover_not_deleted", volume=volume, vios=vios.name, problem=error.cause)

    def _reaching(self, device: str) -> list[Vios]:
        known = self._keeper.current.devices.get(device)
        reached_by = known.reached_by if known else ()
        return [self._vioses[reach.vios] for reach in reached_by if reach.vios in self._vioses]


def _devices(record: ClientRecord, *, in_sync: bool = False) -> list[str]:
    wanted = (ReplicaState.IN_SYNC,) if in_sync else tuple(set(ReplicaState) - {ReplicaState.RETIRED})
    return [replica.device for replica in record.volumes[0].replicas if replica.state in wanted]
