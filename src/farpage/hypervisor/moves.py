"""Clients that move to another device while they run: begun, brought to the end, cancelled.

How far a client is stands in the definition alone (see `farpage.definition.moving`), so a control process
that takes the place of one that was killed goes on with every move of its clients.

    preparing   make the volume on the target, see to an intermediate client, have the pager go over to the
                target's VIOS; a pager that is started anew goes there in any case
    copying     wait until the target has everything
    retiring    use every VIOS of the target, see to it that the volume on the source is deleted

A move that is cancelled leaves a retired replica on the target: the pager goes back, then it is deleted.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from farpage.definition import moving
from farpage.definition.errors import MoveMissing, NotMovable
from farpage.definition.model import Move, MoveState
from farpage.definition.replacing import device_named
from farpage.errors import FarpageError, InvalidInput
from farpage.hypervisor.attached import Attached
from farpage.hypervisor.clients import Clients
from farpage.hypervisor.definitions import DefinitionKeeper
from farpage.hypervisor.errors import NotCancellable
from farpage.hypervisor.intermediaries import Intermediaries
from farpage.hypervisor.moveinfo import is_seen, move_info
from farpage.hypervisor.movement import ClientMove, MoveAdjust, MoveInfo, MoveStage
from farpage.hypervisor.moverecords import MoveRecords
from farpage.hypervisor.replacing import DeviceReplacements
from farpage.hypervisor.replicas import ClientReplicas
from farpage.log import get_logger
from farpage.pager.messages import ReplicaSpec
from farpage.vios.model import CopyStatus
from farpage.volume.resolve import Direct, Indirect, Unreachable, resolve

log = get_logger()

POLL_SECONDS: Final = 0.1
WANTED_SECONDS: Final = 3.0
"""After so long without an intermediate client an operator is asked to start one."""
WHAT: Final = "move"


@dataclass
class _Driven:
    """What is known of one move beside the definition."""

    move: Move | None = None
    """As it was last; also when it has been cancelled since. None for one of an earlier control process."""
    task: asyncio.Task[None] | None = None
    problem: str = ""
    status: CopyStatus | None = None
    made: bool = False
    """The volume on the target is there."""
    missed_since_seconds: float | None = None
    """Since when no intermediate client was seen."""
    asked_for: bool = False
    """The operator was told that one is wanted."""

    @property
    def over(self) -> bool:
        return self.task is None or self.task.done()


class Moves:
    """The moves of this hypervisor."""

    def __init__(
        self,
        clients: Clients,
        replicas: ClientReplicas,
        keeper: DefinitionKeeper,
        records: MoveRecords,
        *,
        intermediaries: Intermediaries,
        replacements: DeviceReplacements,
        alarm: Callable[[str, str, str], None],
    ) -> None:
        self.counts: Counter[str] = Counter()
        """Indirect moves `begun`, `finished` and `cancelled` since the start."""
        self._clients = clients
        self._replicas = replicas
        self._keeper = keeper
        self._records = records
        self._intermediaries = intermediaries
        self._replacements = replacements
        self._alarm = alarm
        self._driven: dict[str, _Driven] = {}
        self._ended: dict[str, MoveInfo] = {}
        """The outcome of each client's latest move."""
        self._stopping = False

    # Requests

    async def start(self, client: str, wanted: ClientMove) -> MoveInfo:
        """Begin to move a client, or go on with that.

        :raise ClientMissing: there is none.
        :raise DeviceMissing: there is no such device.
        :raise NotMovable: saying everything that is in the way; nothing is changed.
        :raise FarpageError: it cannot begin; nothing is left of it.
        """
        now = self._keeper.current
        device = device_named(now, wanted.to)
        view = self._clients.records.view()
        decision = resolve(now, client, device, view, indirect=wanted.indirect)
        if isinstance(decision, Unreachable):
            raise NotMovable(client, now.devices[device].name, "; ".join(decision.reasons))
        if isinstance(decision, Direct):
            if not decision.source:
                raise NotMovable(client, now.devices[device].name, "it is there already")
            if wanted.bandwidth_bytes is not None:
                raise InvalidInput(
                    "bandwidth_bytes",
                    "the hypervisor copies this client itself, within its own --resync-bandwidth",
                    "leave it out, or move the client by an intermediate client with --indirect",
                )
            self._ended.pop(client, None)
            await self._replacements.start_one(client, decision.source, device)
        elif not decision.under_way:
            await self._begin(client, decision, wanted.bandwidth_bytes)
        return await self.progress(client)

    async def _begin(self, client: str, way: Indirect, bandwidth_bytes: int | None) -> None:
        clients = self._clients
        async with clients.only(client, WHAT):
            running = client in clients.attached or client in clients.unrecovered
            await self._records.begin(client, way.route, running=running, bandwidth_bytes=bandwidth_bytes)
        self._begun(client)

    def _begun(self, client: str) -> None:
        self.counts["begun"] += 1
        self._ended.pop(client, None)
        log.info("move_begun", client=client)
        self.drive()

    async def make_reachable(self, client: str) -> None:
        """Begin to move a client that is about to be attached, if nothing else gets at its volume.

        :raise NoDirectAccess: there is no way.
        """
        now, records = self._keeper.current, self._clients.records
        decision = resolve(now, client, "", records.view())
        if isinstance(decision, Indirect) and not decision.under_way:
            # Whoever wrote to the source before is fenced by the claim that was made for this attachment.
            await self._records.begin(client, decision.route, running=False)
            self._begun(client)
            first = now.devices[decision.first_device].name
            self._alarm(
                client, "indirect_access",
                f"its volume is out of this hypervisor's reach and is moved to device {first} "
                f"over VIOS {decision.first_vios} and {decision.second_vios}",
            )  # fmt: skip

    async def adjust(self, client: str, wanted: MoveAdjust) -> MoveInfo:
        """Pause a move, let it go on, or change its bandwidth.

        :raise MoveMissing: the client is not being moved by an intermediate client.
        :raise MoveOver: everything is copied.
        """

        def edit(move: Move) -> tuple[bool, int | None]:
            bandwidth = wanted.bandwidth_bytes or (None if wanted.unlimited else move.bandwidth_bytes)
            return (move.paused if wanted.paused is None else wanted.paused, bandwidth)

        self._clients.records.of(client)
        await self._records.adjust(client, edit)
        return await self.progress(client)

    async def cancel(self, client: str) -> MoveInfo:
        """End a move where it began; the client goes back to the source, which is whole.

        :raise MoveMissing: the client is not being moved by an intermediate client.
        :raise MoveOver: everything is on the target.
        :raise NotCancellable: the client runs and reaches the source no other way.
        """
        clients, now = self._clients, self._keeper.current
        move = moving.move_of(now, client)
        runs = client in clients.attached or client in clients.unrecovered
        if runs and not self._records.reaches(move.source_vios):
            raise NotCancellable(client, now.devices[move.source].name, move.source_vios)
        async with clients.only(client, "cancel its move"):
            self._ended[client] = _at_end(
                self._info(client, move, self._driven.get(client)), MoveStage.CANCELLED
            )
            await self._records.cancel(client)
        self.counts["cancelled"] += 1
        source, target = now.devices[move.source].name, now.devices[move.target].name
        log.info("move_cancelled", client=client, source=source, target=target)
        self._alarm(client, "move_cancelled", f"it stays on device {source} instead of moving to {target}")
        self.drive()
        return self._ended[client]

    async def progress(self, client: str) -> MoveInfo:
        """Tell how far a client's latest move is.

        :raise ClientMissing: there is no such client.
        :raise MoveMissing: there was none since the hypervisor was started.
        """
        move = self._records.of(client)
        if move is not None:
            driven = self._driven.get(client)
            if driven is not None and move.target_vios:
                await self._ask(driven, move)
            return self._info(client, move, driven)
        if client in self._ended:
            return self._ended[client]
        if direct := await self._replacements.progress_of(client):
            return direct
        moving.move_of(self._keeper.current, client)
        raise MoveMissing(client)

    def figures(self) -> Mapping[str, CopyStatus | None]:
        """Return how far each move is, as far as that is known."""
        return {
            client: driven.status if (driven := self._driven.get(client)) else None
            for client in self._records.ours()
        }

    # Life

    def drive(self) -> None:
        """Go on with every move of this hypervisor's clients; returns at once."""
        if self._stopping or self._keeper.unproven:
            return
        for client, move in self._records.ours().items():
            self._drive_one(client, move)
        for client in self._keeper.current.clients:
            if self._was_given_up(client):
                self._run(client, self._driven.setdefault(client, _Driven()))

    def _drive_one(self, client: str, move: Move) -> None:
        driven = self._driven.get(client)
        if driven is None or (driven.move and driven.move.principal != move.principal):
            driven = self._driven[client] = _Driven(move)
        self._run(client, driven)

    def _run(self, client: str, driven: _Driven) -> None:
        if driven.over:
            driven.task = asyncio.get_running_loop().create_task(self._drive(client, driven))

    def _was_given_up(self, client: str) -> bool:
        """Tell whether a volume of a client that is not being moved is to be deleted, and nobody does that.

        It is what a cancelled move has left, or a replaced device.
        """
        device = self._records.left_on(client)
        if device is None or not self._records.is_ours(client) or self._replacements.is_busy_with(client):
            return False
        # A worker that was told of it otherwise is still to be told that it has gone.
        attached = self._clients.attached.get(client)
        return client not in self._clients.unrecovered and not (
            attached and _served(attached, device, source=False)
        )

    async def stop(self) -> None:
        """Begin nothing more; what has begun is gone on with by the next control process."""
        self._stopping = True
        tasks = [driven.task for driven in self._driven.values() if driven.task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._intermediaries.close()

    # One client

    async def _drive(self, client: str, driven: _Driven) -> None:
        """Bring a client's move from where the definition has it to the end."""
        while self._records.is_ours(client):
            move = self._records.of(client)
            if move and driven.move and move.principal != driven.move.principal:
                return  # another one has begun, with a driver of its own
            driven.move = move or driven.move
            try:
                if move is None:
                    await self._clear(client)
                    break
                await self._step(client, driven, move)
                driven.problem = ""
            except FarpageError as error:
                if error.cause != driven.problem:
                    log.warning("move_waits", client=client, problem=error.cause)
                driven.problem = error.cause
            await asyncio.sleep(POLL_SECONDS)
        await self._intermediaries.stop(client)

    async def _step(self, client: str, driven: _Driven, move: Move) -> None:
        if not self._records.reaches(move.target_vios):
            raise NotMovable(client, move.target, f"VIOS {move.target_vios} is none of this hypervisor's")
        answered = await self._ask(driven, move)
        if move.state is MoveState.RETIRING:
            await self._retire(client, driven, move)
            return
        if not driven.made:
            await self._records.make_volume(client, move)
            driven.made = True
        self._want_intermediary(client, driven, move)
        if move.state is MoveState.PREPARING:
            await self._prepare(client, driven, move)
        elif answered and (status := driven.status) and status.present_pages == status.total_pages > 0:
            async with self._clients.only(client, WHAT):
                await self._records.must_have_table(client, move)
                await self._records.finish(client)
            log.info("move_finished", client=client)

    async def _prepare(self, client: str, driven: _Driven, move: Move) -> None:
        """Have the pager go over, as soon as there is an intermediate client to relay what it needs."""
        clients = self._clients
        if client in clients.unrecovered:
            return
        if client in clients.attached:
            if not is_seen(driven.status, move):
                return
            async with clients.only(client, WHAT):
                attached = clients.attached.get(client)
                if attached is not None:
                    await self._replicas.go_over(client, attached, fences=move.source_vios)
                await self._records.start(client)
            return
        async with clients.only(client, WHAT):
            if client not in clients.attached and client not in clients.unrecovered:
                await self._records.start(client)

    async def _retire(self, client: str, driven: _Driven, move: Move) -> None:
        """Use the target over all of its VIOS, have the source deleted, and forget the move."""
        clients, attached = self._clients, self._clients.attached.get(client)
        async with clients.only(client, WHAT):
            if attached is not None and _served(attached, move.target, source=True):
                await self._replicas.go_over(client, attached)
            freed = driven.status and driven.status.intermediary and driven.status.intermediary.freed
            reaching = {reach.vios for reach in self._keeper.current.devices[move.source].reached_by}
            if not freed and any(map(self._records.reaches, reaching)):
                await self._records.free(client, move)
                freed = True
            if not freed:
                self._want_intermediary(client, driven, move)
                return
            info = self._info(client, move, driven)
            # Before the definition has none any more, so that whoever asks then is told how it ended.
            self._ended[client] = _at_end(info, MoveStage.DONE)
            await self._records.forget(client)
        self.counts["finished"] += 1
        log.info("client_moved", client=client, source=info.source, target=info.target)
        self._alarm(
            client, "client_moved", f"it is on device {info.target}, and not on {info.source} any more"
        )

    async def _clear(self, client: str) -> None:
        """Have the pager go back after a cancelled move, and delete what is on the target."""
        async with self._clients.only(client, "cancel its move"):
            if not self._was_given_up(client):
                return
            device = self._records.left_on(client)
            assert device is not None
            attached = self._clients.attached.get(client)
            if attached is not None and (served := _served(attached, device, source=True)):
                # What the target's VIOS may still do to the source goes over the source's VIOS of the move.
                await self._replicas.go_over(
                    client, attached, over=served.source_vios, fences=served.endpoints[0].vios
                )
            await self._records.clear(client, device)
        log.info("volume_cleared", client=client, device=self._name(device))

    # The intermediate client

    def _want_intermediary(self, client: str, driven: _Driven, move: Move) -> None:
        """See to it that one is at work, or that an operator knows that one is wanted."""
        if self._intermediaries.can_run(move):
            self._intermediaries.keep(client, move, self._keeper.current)
            return
        now = asyncio.get_running_loop().time()
        if is_seen(driven.status, move):
            driven.missed_since_seconds, driven.asked_for = None, False
            return
        if driven.missed_since_seconds is None:
            driven.missed_since_seconds = now
        if not driven.asked_for and now - driven.missed_since_seconds >= WANTED_SECONDS:
            driven.asked_for = True
            command = self._intermediaries.command(client, move, self._keeper.current)
            self._alarm(
                client, "intermediary_wanted",
                f"its move from device {self._name(move.source)} to {self._name(move.target)} waits for an "
                f"intermediate client; start one on a host that reaches VIOS {move.target_vios} and "
                f"{move.source_vios}: {command}",
            )  # fmt: skip

    async def _ask(self, driven: _Driven, move: Move) -> bool:
        """Ask the target's VIOS how far it is; False when it is away, and what it has said before is kept."""
        try:
            driven.status = await self._records.copy_status(move)
        except FarpageError as error:
            if error.code != "unreachable":
                driven.status = None
            driven.problem = error.cause
            return False
        return True

    # What users see

    def _name(self, device: str) -> str:
        record = self._keeper.current.devices.get(device)
        return record.name if record else device

    def _info(self, client: str, move: Move, driven: _Driven | None) -> MoveInfo:
        status, intermediaries = driven.status if driven else None, self._intermediaries
        here = intermediaries.can_run(move)
        info = move_info(client, move, status, problem=driven.problem if driven else "")
        assert info.intermediary is not None
        intermediary = {
            "running_here": intermediaries.runs(client),
            "problem": intermediaries.problem(client) or info.intermediary.problem,
            "command": "" if here else intermediaries.command(client, move, self._keeper.current),
        }
        return info.model_copy(
            update={
                "source": self._name(move.source),
                "target": self._name(move.target),
                "intermediary": info.intermediary.model_copy(update=intermediary),
            }
        )


def _at_end(info: MoveInfo, stage: MoveStage) -> MoveInfo:
    return info.model_copy(update={"stage": stage, "problem": "", "rate_bytes": 0.0, "eta_seconds": None})


def _served(attached: Attached, device: str, *, source: bool) -> ReplicaSpec | None:
    """Return the replica on a device that a client's worker uses: one that is moved there, or another."""
    found = (spec for spec in attached.served if spec.device == device and bool(spec.source) is source)
    return next(found, None)
