"""One device takes the place of another while the clients run: a replica more, a copy, and the old one goes.

How far a client is stands in the definition alone (see `farpage.definition.replacing`), so a replacement that
was cut short is gone on with by asking for it again: what a worker copies goes on in any case.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Final

from farpage.definition import replacing
from farpage.definition.model import ReplicaState
from farpage.errors import FarpageError
from farpage.hypervisor.attached import Attached
from farpage.hypervisor.clients import Clients
from farpage.hypervisor.definitions import DefinitionKeeper
from farpage.hypervisor.errors import ClientElsewhere, NotBeingReplaced, ReplacementUnderWay
from farpage.hypervisor.model import DeviceReplacement, ReplacedClient, ReplaceStage
from farpage.hypervisor.movement import MoveInfo, MoveKind, MoveStage
from farpage.hypervisor.replicas import ClientReplicas
from farpage.log import get_logger
from farpage.volume.state import ReplicaHealth

log = get_logger()

POLL_SECONDS: Final = 0.1
AT_ONCE: Final = 4
"""So many clients of a device are moved at the same time: one whose copy waits does not hold up the rest."""
WHAT: Final = "move it to another device"


@dataclass
class _Moved:
    """One client and how far it is."""

    stage: ReplaceStage = ReplaceStage.WAITING
    problem: str = ""


@dataclass
class _Replacement:
    """Two devices by identifier and name, and the clients."""

    old: str
    new: str
    old_name: str
    new_name: str
    clients: dict[str, _Moved] = field(default_factory=dict)
    task: asyncio.Task[None] | None = None

    @property
    def done(self) -> bool:
        return self.task is None or self.task.done()


@dataclass(frozen=True)
class ReplacementLeft:
    """What a replacement has yet to move: devices by name, the new one's identifier, and the clients."""

    old: str
    new: str
    new_device: str
    clients: tuple[str, ...]


class DeviceReplacements:
    """The replacements of this hypervisor, the latest one for each device."""

    def __init__(
        self,
        clients: Clients,
        replicas: ClientReplicas,
        keeper: DefinitionKeeper,
        alarm: Callable[[str, str, str], None],
    ) -> None:
        self._clients = clients
        self._replicas = replicas
        self._records = clients.records
        self._keeper = keeper
        self._alarm = alarm
        self._replacements: dict[str, _Replacement] = {}
        self._singles: dict[str, _Replacement] = {}
        """Of one client each, by its name."""

    async def start(self, old: str, new: str) -> DeviceReplacement:
        """Begin to move every client from one device to another, some at a time, or go on with that.

        :raise ReplacementUnderWay: the device is being replaced just now.
        :raise NotReplaceable: it cannot be; nothing is changed.
        """
        old_id, new_id, clients = self._records.plan_replacement(old, new)
        running = self._replacements.get(old_id)
        if running and not running.done:
            raise ReplacementUnderWay(running.old_name, running.new_name)
        replacement = self._replacement(old_id, new_id, clients)
        self._replacements[old_id] = replacement
        log.info("device_replacing", old=replacement.old_name, new=replacement.new_name, clients=clients)
        replacement.task = asyncio.get_running_loop().create_task(self._run(replacement))
        return await self._described(replacement)

    def _replacement(self, old: str, new: str, clients: Iterable[str]) -> _Replacement:
        devices = self._keeper.current.devices
        return _Replacement(
            old, new, devices[old].name, devices[new].name, {client: _Moved() for client in clients}
        )

    async def start_one(self, client: str, old: str, new: str) -> None:
        """Begin to move one client from one device to another, by identifiers, or go on with that.

        :raise ReplacementUnderWay: it is on its way to another device just now.
        :raise NotReplaceable: it cannot be; nothing is changed.
        """
        old_id, new_id, _ = self._records.plan_replacement(old, new, only=client)
        for running in (self._replacements.get(old_id), self._singles.get(client)):
            if running and not running.done and client in running.clients:
                if running.new == new_id:
                    return
                raise ReplacementUnderWay(running.old_name, running.new_name)
        single = self._singles[client] = self._replacement(old_id, new_id, [client])
        log.info("client_moving", client=client, old=single.old_name, new=single.new_name)
        single.task = asyncio.get_running_loop().create_task(self._run_one(client, single))

    async def _run_one(self, client: str, single: _Replacement) -> None:
        await self._run_client(client, single.clients[client], single)
        if single.clients[client].stage is ReplaceStage.DONE:
            self._alarm(
                client,
                "client_moved",
                f"it is on device {single.new_name}, and not on {single.old_name} any more",
            )

    async def progress_of(self, client: str) -> MoveInfo | None:
        """Tell how far the latest move of one client by its data worker is; None if there was none."""
        single = self._singles.get(client)
        if single is None:
            return None
        shown = await self._client(client, single.clients[client], single.new)
        return MoveInfo(
            client=client,
            kind=MoveKind.DIRECT,
            source=single.old_name,
            target=single.new_name,
            stage=MoveStage(shown.stage.value),
            problem=shown.problem,
            total_pages=shown.copied_pages + shown.missing_pages,
            present_pages=shown.copied_pages,
            rate_bytes=shown.rate_bytes,
            eta_seconds=shown.eta_seconds,
        )

    def is_busy_with(self, client: str) -> bool:
        """Tell whether a client is being moved just now."""
        running = (*self._replacements.values(), *self._singles.values())
        return any(client in one.clients and not one.done for one in running)

    async def progress(self, old: str) -> DeviceReplacement:
        """Tell how far the latest replacement of a device is.

        :raise NotBeingReplaced: there was none since the hypervisor was started.
        """
        found = self._replacements.get(replacing.device_named(self._keeper.current, old))
        if found is None:
            raise NotBeingReplaced(old)
        return await self._described(found)

    async def _described(self, replacement: _Replacement) -> DeviceReplacement:
        return DeviceReplacement(
            old=replacement.old_name,
            new=replacement.new_name,
            done=replacement.done,
            clients=tuple(
                [
                    await self._client(client, moved, replacement.new)
                    for client, moved in replacement.clients.items()
                ]
            ),
        )

    async def _client(self, client: str, moved: _Moved, new: str) -> ReplacedClient:
        shown = ReplacedClient(client=client, stage=moved.stage, problem=moved.problem)
        if moved.stage is not ReplaceStage.COPYING:
            return shown
        report = await self._clients.report(client)
        replica = next((r for r in report.replicas if r.device == new), None) if report else None
        if replica is None:
            return shown
        waits = replica.health is ReplicaHealth.STALE
        return shown.model_copy(
            update={
                "problem": replica.reason if waits else moved.problem,
                "missing_pages": replica.dirty_pages,
                "copied_pages": replica.resynced_pages,
                "rate_bytes": replica.rate_bytes,
                "eta_seconds": replica.eta_seconds,
            }
        )

    def left(self) -> list[ReplacementLeft]:
        """Return what the latest replacement of each device has yet to move."""
        return [
            ReplacementLeft(
                replacement.old_name,
                replacement.new_name,
                replacement.new,
                tuple(c for c, moved in replacement.clients.items() if moved.stage is not ReplaceStage.DONE),
            )
            for replacement in self._replacements.values()
        ]

    async def stop(self) -> None:
        """Begin nothing more; what has begun is gone on with by another request."""
        running = (*self._replacements.values(), *self._singles.values())
        tasks = [replacement.task for replacement in running if replacement.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    # Some clients at a time

    async def _run(self, replacement: _Replacement) -> None:
        turns = asyncio.Semaphore(AT_ONCE)

        async def in_turn(client: str, moved: _Moved) -> None:
            async with turns:
                await self._run_client(client, moved, replacement)

        async with asyncio.TaskGroup() as moving:
            for client, moved in replacement.clients.items():
                moving.create_task(in_turn(client, moved))
        old, new = replacement.old_name, replacement.new_name
        if all(moved.stage is ReplaceStage.DONE for moved in replacement.clients.values()):
            count = len(replacement.clients)
            log.info("device_replaced", old=old, new=new, clients=count)
            self._alarm(
                "", "device_replaced", f"device {new} has taken the place of {old} for {count} clients"
            )

    async def _run_client(self, client: str, moved: _Moved, replacement: _Replacement) -> None:
        old, new = replacement.old_name, replacement.new_name
        try:
            await self._move(client, moved, replacement)
        except FarpageError as error:
            moved.stage, moved.problem = ReplaceStage.FAILED, error.cause
            log.error("client_not_moved", client=client, old=old, new=new, problem=str(error))
            self._alarm(
                client, "device_not_replaced", f"it is not off device {old} yet: {error.cause}; "
                f"'farpage device replace {old} {new}' goes on with it",
            )  # fmt: skip
        else:
            moved.stage, moved.problem = ReplaceStage.DONE, ""
            log.info("client_moved", client=client, old=old, new=new)

    async def _move(self, client: str, moved: _Moved, replacement: _Replacement) -> None:
        """Bring a client from where the definition has it to the end, whatever happens to it meanwhile."""
        old, new = replacement.old, replacement.new
        let_go: Attached | None = None
        while client in self._keeper.current.clients:
            if unproven := self._keeper.unproven:
                raise unproven
            if old not in self._records.replica_states(client):
                return
            try:
                async with self._clients.only(client, WHAT):
                    copying = await self._step(client, old, new, let_go)
                if copying:
                    moved.stage, moved.problem = ReplaceStage.COPYING, ""
                    let_go = await self._copied(client, old, new)
            except FarpageError as error:
                if error.code not in ("client_busy", "worker_gone", "not_attached", "no_worker"):
                    raise
                moved.problem = error.cause
                await asyncio.sleep(POLL_SECONDS)

    async def _step(self, client: str, old: str, new: str, let_go: Attached | None) -> bool:
        """Take the next step of a client that nothing else is done with; True when its worker has to copy.

        A retired replica is removed when the client is not attached, or has `let_go` of it: a worker may have
        been told of the replica when it was not recorded as retired yet.
        """
        records = self._records
        states = records.replica_states(client)
        attached = self._clients.attached.get(client)
        if states.get(old) is ReplicaState.RETIRED and attached in (None, let_go):
            await records.remove_retired(client, old)
            return False
        if attached is None and self._clients.run.record(client) is not None:
            # It is to be recovered, or its release is to be put in force again: its pages are out.
            await asyncio.sleep(POLL_SECONDS)
            return False
        if records.of(client).hypervisor != records.hypervisor:
            record = records.of(client)
            raise ClientElsewhere(client, record.hypervisor, record.epoch)
        if states.get(new) is not ReplicaState.IN_SYNC:
            # It may have been begun, and then cut short before there was a volume.
            await records.begin_replacing(client, new)
            states = records.replica_states(client)
        if attached is None:
            await records.finish_replacing(client, old, new)
            return False
        if states[new] is not ReplicaState.IN_SYNC:
            await self._replicas.add(client, attached, new)
        return True

    async def _copied(self, client: str, old: str, new: str) -> Attached | None:
        """Wait until the new replica has everything, then have the old one retired.

        Returns the client if it uses the old one no more.
        """
        attached = self._clients.attached.get(client)
        while attached and self._clients.attached.get(client) is attached:
            if self._records.replica_states(client).get(new) is ReplicaState.IN_SYNC:
                # A release under way keeps the page table beside the replicas that it has found.
                async with self._clients.only(client, WHAT):
                    await self._replicas.retire(client, attached, old)
                return attached
            await asyncio.sleep(POLL_SECONDS)
        return None
