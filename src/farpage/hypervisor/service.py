"""One hypervisor: its VIOS, its definition, its workers and its clients, without the API around them."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Coroutine, Iterable
from contextlib import suppress
from functools import partial
from typing import Any

from farpage import __version__
from farpage.definition import rules
from farpage.definition.copy import DefinitionCopy
from farpage.definition.model import Definition, ViosRecord
from farpage.definition.verification import FoundVolume
from farpage.errors import FarpageError
from farpage.hypervisor.affinity import WorkerAffinity
from farpage.hypervisor.alarms import AlarmLog
from farpage.hypervisor.attaching import Attaching
from farpage.hypervisor.clients import Clients
from farpage.hypervisor.definitions import DefinitionKeeper
from farpage.hypervisor.detaching import Detaching
from farpage.hypervisor.evacuating import Evacuations
from farpage.hypervisor.fullness import FullDevices
from farpage.hypervisor.guestpause import GuestPauses
from farpage.hypervisor.handovers import Handovers
from farpage.hypervisor.intermediaries import Intermediaries
from farpage.hypervisor.limits import ClientLimits
from farpage.hypervisor.model import DefinitionPromotion, HypervisorInfo, WorkerInfo
from farpage.hypervisor.moverecords import MoveRecords
from farpage.hypervisor.moves import Moves
from farpage.hypervisor.pool import MemoryPool
from farpage.hypervisor.records import ClientRecords
from farpage.hypervisor.recovery import Recovery
from farpage.hypervisor.releasing import Releases
from farpage.hypervisor.replacing import DeviceReplacements
from farpage.hypervisor.replicas import ClientReplicas
from farpage.hypervisor.runfolder import RunFolder
from farpage.hypervisor.scrubs import Scrubs
from farpage.hypervisor.settings import HypervisorSettings
from farpage.hypervisor.stopping import ViosStops
from farpage.hypervisor.unstarted import UnstartedReleases
from farpage.hypervisor.vioses import Vios
from farpage.hypervisor.workers import WorkerPool
from farpage.kernel.affinity import cpus_of, format_cpus
from farpage.log import get_logger
from farpage.message import Message
from farpage.pager.launch import LaunchedWorker
from farpage.pager.messages import (
    AlarmRaised,
    ClientLost,
    EpochRaised,
    Nothing,
    OutageChanged,
    RecordReplicas,
    ScrubEnded,
    ViosDoubted,
)

log = get_logger()

HEALTH_INTERVAL_SECONDS = 1.0
DEFINITION_NAME = "definition.json"
ATTEMPTED_NAME = "definition.attempted.json"

RESUME_SECONDS = 5.0
"""So long recovered clients have the machine to themselves, before the rest of the daemon starts."""


class Hypervisor:
    """One hypervisor: its VIOS, definition, workers, clients and pool."""

    def __init__(self, settings: HypervisorSettings, launched: Iterable[LaunchedWorker] = ()) -> None:
        self.settings = settings
        self.alarms = AlarmLog()
        self.vioses = {name: Vios(name, control, settings.tls) for name, control in settings.vioses.items()}
        own = DefinitionCopy(settings.state_dir / DEFINITION_NAME)
        attempted = DefinitionCopy(settings.state_dir / ATTEMPTED_NAME)
        self.keeper = DefinitionKeeper(
            self.vioses,
            own,
            attempted,
            partial(self.alarms.raise_alarm, ""),
            hypervisor=settings.name,
            tls=settings.tls,
        )
        self.workers = WorkerPool(
            self._worker_event,
            on_request=self._worker_request,
            timeout_seconds=settings.worker_timeout_seconds,
            launched=launched,
        )
        self.pool = MemoryPool(
            settings.pool_size_bytes or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"),
            settings.default_limit_bytes,
        )
        records = ClientRecords(settings.name, self.keeper, self.vioses)
        handovers = self.handovers = Handovers(self.keeper, self.vioses)
        self.clients = Clients(records, self.pool)
        affinity = WorkerAffinity(settings.placement, self.workers.all, self.clients.pid_of)
        self.workers.on_tick = affinity.look
        self.replicas = ClientReplicas(self.clients)
        self.limits = ClientLimits(self.clients, self.pool)
        self.detaching = Detaching(self.clients)
        self.scrubs = Scrubs(self.clients)
        self.unstarted = UnstartedReleases(self.clients)
        self.recovery = Recovery(
            self.clients,
            self.workers,
            self.replicas,
            self.detaching,
            self.unstarted,
            alarm=self.alarms.raise_alarm,
            recovered=self.scrubs.begin_anew,
        )
        self.replacements = DeviceReplacements(
            self.clients, self.replicas, self.keeper, self.alarms.raise_alarm
        )
        self.moves = Moves(
            self.clients,
            self.replicas,
            self.keeper,
            MoveRecords(records, self.keeper, self.vioses),
            intermediaries=Intermediaries(settings.state_dir, settings.vioses, settings.tls),
            replacements=self.replacements,
            alarm=self.alarms.raise_alarm,
        )
        self.attaching = Attaching(
            settings,
            self.clients,
            self.workers,
            self.pool,
            handovers=handovers,
            unstarted=self.unstarted,
            recover=self.recovery.recover,
            make_reachable=self.moves.make_reachable,
        )
        self.releases = Releases(
            self.clients,
            self.detaching,
            self.keeper,
            handovers,
            make_reachable=self.moves.make_reachable,
        )
        self._run: RunFolder | None = None
        self._full_devices = FullDevices(self.clients, self.pool)
        self._guest_pauses = GuestPauses(self.clients, self._guest_alarm)
        self.evacuations = Evacuations(
            self.moves, records, lambda: self.keeper.current, self.alarms.raise_alarm
        )
        self.stops = ViosStops(self.vioses, self.keeper, self.clients)
        self._not_recorded = ""
        """Why the devices could not be recorded when that was tried last, which is tried again and again."""
        self._started_seconds = time.monotonic()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Start the workers and agree with the VIOS on the definition; those away join later.

        Clients of an earlier control process come first, since their accesses may wait.

        :raise RunFolderInUse: when another control process has the run folder.
        :raise OSError: when a process cannot be started.
        """
        self._run = self.clients.run = RunFolder(self.settings.run_folder)
        owners = await self.workers.adopt(self._run.workers)
        self.workers.start(self.settings.worker_count)
        await self.keeper.read_own()
        await self.recovery.resume(owners)
        await self.recovery.settled(RESUME_SECONDS)
        self.workers.start_spare()
        await self._ask_all()
        await self.keeper.start()
        await self._record_all()
        await self.recovery.reconcile()
        self._start(self.releases.settle_all())
        self._guest_pauses.resume()
        self._full_devices.resume()
        self.moves.drive()
        self._start(self._watch_vioses())

    async def stop(self) -> None:
        """Give every client its memory back, then end the workers."""
        self._full_devices.stop()
        for task in list(self._tasks):
            task.cancel()
        await self.evacuations.stop()
        await self.moves.stop()
        await self.replacements.stop()
        await self.recovery.stop()
        if self._run is not None:
            await self.detaching.all()
            await self._guest_pauses.stop()
            await self.workers.stop()
            self._run.close()
        for vios in self.vioses.values():
            await vios.client.close()

    def info(self) -> HypervisorInfo:
        """Return the daemon's own state."""
        return HypervisorInfo(
            hypervisor=self.settings.name,
            version=__version__,
            pid=os.getpid(),
            uptime_seconds=time.monotonic() - self._started_seconds,
            definition_revision=self.keeper.current.revision,
            definition_problem=unproven.cause if (unproven := self.keeper.unproven) else "",
            workers=tuple(
                WorkerInfo(
                    index=worker.index,
                    pid=worker.pid,
                    clients=len(worker.clients),
                    cpus=format_cpus(cpus_of(worker.pid) or ()),
                    compiled=worker.compiled,
                )
                for worker in self.workers.workers
            ),
            clients=len(self.keeper.current.clients),
        )

    # The VIOS

    async def _ask_all(self) -> list[Vios]:
        """Ask every VIOS how it is; returns those that have come back."""
        vioses = list(self.vioses.values())
        came_back = await asyncio.gather(*(vios.ask() for vios in vioses))
        return [vios for vios, back in zip(vioses, came_back, strict=True) if back]

    async def _watch_vioses(self) -> None:
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(HEALTH_INTERVAL_SECONDS):
                    await self.keeper.missed.wait()
            self.keeper.missed.clear()
            await self._look_at_vioses()
            await self.clients.clear_leftovers()
            self.moves.drive()
            await self.releases.take_back_unfinished()
            await self.unstarted.put_back_all()

    async def _look_at_vioses(self) -> None:
        """Ask every VIOS how it is, and give those the definition that have missed some of it."""
        came_back = await self._ask_all()
        for vios in came_back:
            log.info("vios_back", vios=vios.name)
        was_unproven = self.keeper.unproven
        if was_unproven:
            await self.keeper.load()
        for vios in self.vioses.values():
            if vios in came_back or self._differs(vios):
                await self.keeper.repair(vios)
        proven = was_unproven and not self.keeper.unproven
        if came_back or proven or any(map(self._lists_others, self.vioses.values())):
            await self._record_all()

    def _differs(self, vios: Vios) -> bool:
        """Tell whether a VIOS that answers has missed a change, or has one that somebody else made."""
        stored = vios.health.definition_revision if vios.reachable and vios.health else None
        return stored is not None and stored != self.keeper.current.revision

    def _lists_others(self, vios: Vios) -> bool:
        """Tell whether a VIOS that answers lists other devices than the definition says that it reaches."""
        reached = {
            identifier
            for identifier, device in self.keeper.current.devices.items()
            if vios.name in {reach.vios for reach in device.reached_by}
        }
        return vios.reachable and vios.listed and {device.id for device in vios.devices} != reached

    async def promote(self, vios: str, *, force: bool) -> DefinitionPromotion:
        """Make the copy of the definition at a VIOS the newest; without `force` just say what that would do.

        :raise FarpageError: it cannot be done; nothing has changed then.
        """
        volumes: list[FoundVolume] = []
        for asked in self.vioses.values():
            with suppress(FarpageError):
                volumes += [
                    FoundVolume(v.name, v.device, v.size_bytes, v.epoch, v.owner)
                    for v in await asked.volumes()
                ]
        attached = [name for name in self.clients.attached if name in self.keeper.current.clients]
        promotion = await self.keeper.promote(vios, volumes, attached, force=force)
        if force:
            await self._record_all()
        return promotion

    async def refresh_devices(self) -> Definition:
        """Ask the VIOS for their devices and record them in the definition, which those that are back get.

        :raise FarpageError: when no VIOS can store it, or two describe a device differently.
        """
        await self._look_at_vioses()
        return await self._record()

    async def _record_all(self) -> None:
        if self.keeper.unproven:
            return  # told already
        try:
            await self._record()
            self._not_recorded = ""
        except FarpageError as error:
            if str(error) != self._not_recorded:
                log.warning("devices_not_recorded", problem=str(error))
                self.alarms.raise_alarm("", "devices_not_recorded", str(error))
            self._not_recorded = str(error)

    async def _record(self) -> Definition:
        def edit(definition: Definition) -> Definition:
            for vios in self.vioses.values():
                if vios.reachable and vios.health and vios.listed:
                    record = ViosRecord(
                        control=vios.control,
                        data=vios.health.data,
                        lease_seconds=vios.health.lease_seconds,
                    )
                    found = [
                        rules.FoundDevice(
                            id=device.id,
                            name=device.name,
                            kind=device.kind,
                            spec=device.spec,
                            size_bytes=device.size_bytes,
                            commands=device.commands,
                        )
                        for device in vios.devices
                    ]
                    definition = rules.register_vios(definition, vios.name, record, found)
            return definition

        return await self.keeper.change(edit)

    # The workers

    def _worker_event(self, event: str, parameters: Any) -> None:
        match event:
            case "alarm":
                alarm = AlarmRaised.model_validate(parameters)
                self.alarms.raise_alarm(alarm.client, alarm.kind, alarm.message)
            case "epoch_raised":
                raised = EpochRaised.model_validate(parameters)
                self._start(self.clients.records.epoch_raised(raised))
            case "vios_doubted":
                failed = ViosDoubted.model_validate(parameters)
                if vios := self.vioses.get(failed.vios):
                    self._start(vios.doubt())
            case "outage":
                outage = OutageChanged.model_validate(parameters)
                self._full_devices.check()
                self._guest_pauses.outage(outage.client, outage.without_path)
            case "scrub_ended":
                self.scrubs.ended(ScrubEnded.model_validate(parameters).client)
            case "client_gone":
                lost = ClientLost.model_validate(parameters)
                if lost.lives:
                    self._guest_alarm(
                        lost.client, "memory_gone",
                        "its process runs on without the memory that was paged (execve(2), munmap(2)): what "
                        "was out of memory is lost to it, and reads zeros where it maps that again",
                    )  # fmt: skip
                self._start(self.detaching.process_gone(lost.client, lives=lost.lives))

    def _guest_alarm(self, client: str, kind: str, message: str) -> None:
        log.warning("alarm", client=client, kind=kind, message=message)
        self.alarms.raise_alarm(client, kind, message)

    async def _worker_request(self, method: str, parameters: Any, descriptors: list[int]) -> Message:
        """Answer a worker's question."""
        del descriptors
        if method == "record_replicas":
            await self.replicas.record(RecordReplicas.model_validate(parameters))
            return Nothing()
        raise AssertionError(f"unknown request {method!r}")

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
