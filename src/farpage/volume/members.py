"""Replicas that come to a mirror and go from it, and what the definition says of them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from farpage.definition.states import ReplicaState
from farpage.volume.connector import Connector, Endpoint
from farpage.volume.errors import SeveralReplicas
from farpage.volume.events import MirrorEvents, ReplicaEvents
from farpage.volume.failover import FailoverLog
from farpage.volume.lease import Leases
from farpage.volume.losing import Losing
from farpage.volume.multipath import MultipathVolume
from farpage.volume.ownership import Ownership
from farpage.volume.pace import Pace
from farpage.volume.reading import Reads
from farpage.volume.recorder import ReplicaRecorder, States
from farpage.volume.replica import Mode, Replica, ReplicaPlace
from farpage.volume.replicas import Replicas
from farpage.volume.returning import Returning
from farpage.volume.writing import Writes


@dataclass(frozen=True)
class Wiring:
    """What all replicas of one mirror are made with."""

    volume: str
    size_bytes: int
    ownership: Ownership
    connector: Connector
    events: MirrorEvents
    leases: Leases | None
    had_owner: bool
    path_timeout_seconds: float
    probe_interval_seconds: float
    resync_bytes_per_second: float


class Members:
    """Takes replicas in and out."""

    def __init__(
        self,
        replicas: Replicas,
        wiring: Wiring,
        *,
        recorder: ReplicaRecorder,
        losing: Losing,
        writes: Writes,
        returning: Returning,
    ) -> None:
        self._replicas = replicas
        self._wiring = wiring
        self._recorder = recorder
        self._losing = losing
        self._writes = writes
        self._returning = returning
        self._loop = asyncio.get_running_loop()
        self._retired: set[asyncio.Task[None]] = set()

    # In

    def enter(self, place: ReplicaPlace, state: ReplicaState, failovers: FailoverLog) -> None:
        """Take in a replica that was there before; what it has missed is in its dirty map."""
        self._enter(self._connected(place), state, failovers)

    def adopt(self, volume: MultipathVolume, reads: Reads) -> None:
        """Go on with an open volume as the first replica, in sync: its commands become the mirror's."""
        replica = self._replica(volume, Mode.COUNTS)
        replica.well = volume.answers
        self._losing.adopt(replica, full=volume.full)
        volume.report_to(ReplicaEvents(self._wiring.events, partial(self._replicas.is_last, replica)))
        self._enter(replica, ReplicaState.IN_SYNC, volume.failovers)
        self._recorder.enter(volume.device, ReplicaState.IN_SYNC)
        for command in volume.outstanding():
            if command.mutates:
                self._writes.adopt(replica, command)
        volume.redirect_reads(partial(reads.adopt, replica))

    def add(self, place: ReplicaPlace, failovers: FailoverLog) -> None:
        """Take in a replica that is recorded stale, with everything missed, on a device that has none yet."""
        replica = self._connected(place)
        self._replicas.forget_missed(place.device)
        self._recorder.enter(place.device, ReplicaState.STALE)
        self._enter(replica, ReplicaState.STALE, failovers)
        replica.reason = "new: everything is copied to it"
        self._writes.begun_without(replica)
        replica.volume.start()

    def _connected(self, place: ReplicaPlace) -> Replica:
        wiring = self._wiring
        volume = MultipathVolume(
            wiring.volume,
            wiring.size_bytes,
            wiring.ownership,
            list(place.endpoints),
            connector=wiring.connector,
            events=ReplicaEvents(wiring.events, lambda: self._replicas.is_last(replica)),
            device=place.device,
            device_name=place.name,
            leases=wiring.leases,
            had_owner=wiring.had_owner,
            path_timeout_seconds=wiring.path_timeout_seconds,
            probe_interval_seconds=wiring.probe_interval_seconds,
        )
        replica = self._replica(volume, Mode.AWAY)
        return replica

    def _replica(self, volume: MultipathVolume, mode: Mode) -> Replica:
        pace = Pace(self._wiring.resync_bytes_per_second)
        return Replica(volume.device, volume.device_name, volume, pace, mode, self._loop.time())

    def _enter(self, replica: Replica, state: ReplicaState, failovers: FailoverLog) -> None:
        """Take a replica in, with what it has missed."""
        volume = replica.volume
        volume.failovers = failovers
        volume.on_active = partial(self._returning.answers, replica)
        volume.on_no_path = partial(self._no_path, replica)
        volume.on_full = partial(self._losing.told_full, replica)
        volume.on_fenced_server = partial(self._returning.consider, replica)
        volume.gives_up = partial(self._losing.gives_up, replica)
        self._replicas.all.append(replica)
        if state is ReplicaState.IN_SYNC:
            replica.mode = Mode.COUNTS
            self._replicas.forget_missed(replica.device)
            return
        replica.reason = "not in sync before"
        replica.was_lost = True
        # A map that is not there is made with everything missed, at once: the process may end at any moment.
        self._replicas.dirty(replica, missed=True)

    def _no_path(self, replica: Replica, none: bool) -> None:
        if none:
            self._losing.no_path(replica)
        else:
            self._returning.answers(replica)

    # Out

    async def retire(self, device: str) -> None:
        """Take a replica out; returns when it is recorded retired and nothing is sent to it any more."""
        replica = self._replicas.find(device)
        if replica is None:
            return
        replica.retiring = True
        self._recorder.wake()
        while replica in self._replicas.all and not self._replicas.closing:
            self._replicas.changed.clear()
            await self._replicas.changed.wait()

    # To another device

    async def go_over(
        self, endpoints: Sequence[Endpoint], device: str, device_name: str, fences: str
    ) -> None:
        """Use the one replica at other endpoints, on a device where its content is just the same.

        :raise NoPath: none of the endpoints can be opened; it is used as before.
        :raise SeveralReplicas: there is more than one.
        """
        if len(self._replicas.all) != 1:
            raise SeveralReplicas(self._wiring.volume)
        (replica,) = self._replicas.all
        await replica.volume.go_over(endpoints, device, device_name, fences)
        if device != replica.device:
            self._recorder.leave(replica.device)
            self._recorder.enter(device, ReplicaState.IN_SYNC)
            replica.device, replica.name = device, device_name

    def _remove(self, replica: Replica) -> None:
        """Forget a replica that is recorded retired: what was on its way to it counts without it."""
        reason = "it was replaced"
        self._replicas.all.remove(replica)
        self._recorder.leave(replica.device)
        replica.gone = True
        replica.become(Mode.AWAY, self._loop.time(), reason)
        self._returning.forget(replica)
        resync, replica.resync = replica.resync, None
        if resync:
            resync.stop()
        replica.volume.drop(reason, for_good=True)
        self._writes.release(replica)
        self._replicas.release(replica)
        self._replicas.forget_missed(replica.device)
        task = self._loop.create_task(replica.volume.abandon())
        self._retired.add(task)
        task.add_done_callback(self._retired.discard)
        self._replicas.have_changed()
        self._replicas.push()

    async def abandon(self) -> None:
        """Let go of the paths of all, and of those that were taken out."""
        for replica in self._replicas:
            await replica.volume.abandon()
            self._replicas.release(replica)
        await asyncio.gather(*self._retired)

    # What the definition says

    def recorded(self) -> None:
        """Act on the replicas' states being stored."""
        for replica in list(self._replicas):
            retired = self._recorder.of(replica.device) is ReplicaState.RETIRED
            if retired and replica.retiring and self._replicas.survives_without(replica):
                self._remove(replica)
                continue
            if self._recorder.is_stale(replica.device):
                self._writes.release(replica)
            self.announce(replica)

    def announce(self, replica: Replica) -> None:
        """Let go of the dirty map of a replica that is recorded in sync, and tell of its return."""
        if (
            replica.mode is Mode.COUNTS
            and replica.was_lost
            and self._recorder.of(replica.device) is ReplicaState.IN_SYNC
        ):
            replica.was_lost = False
            self._replicas.forget_missed(replica.device)
            self._wiring.events.alarm(
                "replica_resynced",
                f"volume {self._wiring.volume}: the replica on device {replica.name} has everything again",
            )


def wanted_states(replicas: Iterable[Replica], recorded: Callable[[str], ReplicaState | None]) -> States:
    """Say what the definition should say of the replicas; `recorded(device)` is what is known to be stored.

    Of a replica that is away it goes on to say "in sync" while nobody could acknowledge a write without
    it: it may yet come back with everything, as the only one.
    """
    states: States = {}
    replicas = list(replicas)
    survivor = any(replica.readable for replica in replicas)
    for replica in replicas:
        state = recorded(replica.device)
        if _can_retire(replica, replicas, recorded):
            states[replica.device] = ReplicaState.RETIRED
            continue
        stale = replica.mode is not Mode.COUNTS and (survivor or state is ReplicaState.STALE)
        states[replica.device] = ReplicaState.STALE if stale else ReplicaState.IN_SYNC
        if replica.mode is not Mode.COUNTS and state is None and not survivor:
            return {}
    return states


def _can_retire(
    replica: Replica, replicas: Iterable[Replica], recorded: Callable[[str], ReplicaState | None]
) -> bool:
    return replica.retiring and any(
        other is not replica
        and not other.retiring
        and other.readable
        and recorded(other.device) is ReplicaState.IN_SYNC
        for other in replicas
    )
