"""Moves as the definition has them, and the volumes that they make and leave behind."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from functools import partial

from farpage import handover
from farpage.definition import moving, replacing, rules
from farpage.definition.model import Definition, Move, ReplicaState
from farpage.errors import FarpageError
from farpage.hypervisor.definitions import DefinitionKeeper
from farpage.hypervisor.handovers import HandoverUnreachable
from farpage.hypervisor.records import ClientRecords
from farpage.hypervisor.vioses import Vios
from farpage.vios.model import CopyStatus, VolumeCreate


class MoveRecords:
    """The moves of this hypervisor's clients; each change is one revision."""

    def __init__(self, records: ClientRecords, keeper: DefinitionKeeper, vioses: Mapping[str, Vios]) -> None:
        self._records = records
        self._keeper = keeper
        self._vioses = vioses

    def of(self, client: str) -> Move | None:
        """Return a client's move; None when it is not being moved."""
        return self._keeper.current.moves.get(client)

    def ours(self) -> dict[str, Move]:
        """Return the moves of the clients that this hypervisor has."""
        now = self._keeper.current
        return {name: move for name, move in now.moves.items() if self.is_ours(name)}

    def is_ours(self, client: str) -> bool:
        """Tell whether this hypervisor has the client."""
        record = self._keeper.current.clients.get(client)
        return record is not None and record.hypervisor == self._records.hypervisor

    def reaches(self, vios: str) -> bool:
        """Tell whether a VIOS is one of this hypervisor's."""
        return vios in self._vioses

    def left_on(self, client: str) -> str | None:
        """Return the device where a client that is not being moved has a volume that was given up."""
        if client in self._keeper.current.moves:
            return None
        states = self._records.replica_states(client)
        return next((device for device, state in states.items() if state is ReplicaState.RETIRED), None)

    # Steps

    async def begin(
        self, client: str, route: moving.Route, *, running: bool, bandwidth_bytes: int | None = None
    ) -> Move:
        """Begin a move and make the volume on the target; nothing of it is left when that fails.

        Where the target's VIOS is away its volume, which it may have made, is cleared when it is back.

        :raise ClientElsewhere: another hypervisor has claimed the client.
        :raise NotMovable: it cannot be.
        :raise FarpageError: the volume cannot be made.
        """
        principal = secrets.token_hex(8)
        provisioned_bytes = self._records.view().provisioned_bytes.get(route.target, 0)
        step = partial(
            moving.begin,
            route=route,
            principal=principal,
            bandwidth_bytes=bandwidth_bytes,
            running=running,
            provisioned_bytes=provisioned_bytes,
        )
        move = (await self._change(client, step)).moves[client]
        try:
            await self.make_volume(client, move)
        except FarpageError as error:
            await self.cancel(client)
            if error.code not in ("no_vios", "unreachable"):
                await self.clear(client, move.target)
            raise
        return move

    async def make_volume(self, client: str, move: Move) -> None:
        """Make the volume on the target, if it is not there yet.

        :raise FarpageError: the target's VIOS does not make it.
        """
        size_bytes = self._records.of(client).volumes[0].size_bytes
        wanted = VolumeCreate(name=move.volume, device=move.target, size_bytes=size_bytes)
        try:
            await self._records.on_any_vios([move.target_vios], partial(Vios.create_volume, wanted=wanted))
        except FarpageError as error:
            if error.code != "volume_exists":
                raise

    async def start(self, client: str) -> None:
        """Let pages be copied: no pager writes to the source but over the target's VIOS."""
        await self._change(client, moving.start)

    async def adjust(self, client: str, edit: Callable[[Move], tuple[bool, int | None]]) -> Move:
        """Change whether a move is paused and how much it may copy in a second, as `edit` says.

        :raise MoveMissing: the client is not being moved.
        :raise MoveOver: everything is copied.
        """

        def adjusted(now: Definition) -> Definition:
            paused, bandwidth_bytes = edit(moving.move_of(now, client))
            return moving.adjust(now, client, paused=paused, bandwidth_bytes=bandwidth_bytes)

        return (await self._keeper.change(adjusted)).moves[client]

    async def must_have_table(self, client: str, move: Move) -> None:
        """See that what a released client is adopted with is beside the target: it goes with the source.

        :raise FarpageError: it is not there yet, or cannot be.
        """
        record = self._records.of(client)
        if record.released is None:
            return
        encoded = await self._vioses[move.target_vios].handover(move.volume, move.target)
        if handover.check(encoded, whose=client).digest != record.released.digest:
            raise HandoverUnreachable(client, f"VIOS {move.target_vios} has one of another release")

    async def finish(self, client: str) -> None:
        """Make the target the volume's place."""
        await self._change(client, moving.finish)

    async def cancel(self, client: str) -> None:
        """End a move where it began; `clear` deletes what is on the target then."""
        await self._change(client, moving.cancel)

    async def free(self, client: str, move: Move) -> None:
        """Delete the volume on the source; only where this hypervisor reaches one of its VIOS.

        :raise FarpageError: none of them deletes it.
        """
        await self._records.delete_retired(client, move.source)

    async def forget(self, client: str) -> None:
        """End a finished move: the volume on the source is gone."""
        await self._keeper.change(lambda now: moving.forget(now, client))

    async def clear(self, client: str, device: str) -> None:
        """Delete a volume that was given up, and forget its replica."""
        await self._records.delete_retired(client, device)
        await self._keeper.change(lambda now: replacing.forget(now, client, device, ReplicaState.RETIRED))

    async def copy_status(self, move: Move) -> CopyStatus | None:
        """Ask the target's VIOS how far the copy is; None when it knows of another move, or of none.

        One whose definition is old may have had the volume before, and still say that all of it is there.

        :raise FarpageError: it does not answer, or nothing was copied there.
        """
        status = await self._vioses[move.target_vios].copy_status(move.volume, move.target)
        return status if status.principal == move.principal else None

    async def _change(
        self, client: str, step: Callable[[Definition, str, moving.Claim], Definition]
    ) -> Definition:
        """Take a step for the owner of a client, which must be this hypervisor's."""

        def edit(now: Definition) -> Definition:
            record = rules.client_of(now, client)
            self._records.must_be_ours(client, record)
            return step(now, client, moving.Claim(record.owner, record.epoch))

        return await self._keeper.change(edit)
