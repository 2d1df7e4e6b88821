"""The clients as the definition has them: entered with their volumes, claimed, and deleted again.

Whatever fails half-way is undone: at once where a VIOS answers, else when one is back.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from contextlib import suppress
from functools import partial

from farpage.definition import releasing, replacing, rules
from farpage.definition.errors import ClientExists, NoDeviceFits
from farpage.definition.model import (
    ClientRecord,
    Definition,
    Move,
    MoveState,
    Redundancy,
    Release,
    ReplicaState,
)
from farpage.definition.rules import VolumePath
from farpage.device.claim import new_owner
from farpage.errors import FarpageError
from farpage.hypervisor.definitions import DefinitionKeeper, NoVios
from farpage.hypervisor.errors import ClientElsewhere, NoDirectAccess
from farpage.hypervisor.model import ClientCreate
from farpage.hypervisor.vioses import Vios
from farpage.log import get_logger
from farpage.pager.messages import EndpointSpec, EpochRaised, RecordReplicas, ReplicaSpec
from farpage.vios.model import VolumeCreate
from farpage.volume.resolve import Direct, Indirect, Unreachable, Viewpoint, resolve

log = get_logger()


class ClientRecords:
    """The records of this hypervisor's clients. One change of a client at a time is its user's business."""

    def __init__(self, hypervisor: str, keeper: DefinitionKeeper, vioses: Mapping[str, Vios]) -> None:
        self.hypervisor = hypervisor
        self._keeper = keeper
        self._vioses = vioses
        self._leftovers: dict[str, int] = {}
        """Clients that nobody wants and that a VIOS may still know or learn of, with the revision before."""
        self._claimed: dict[str, tuple[int, str]] = {}
        """Epoch and token of this hypervisor's latest claim of each client."""

    def of(self, client: str) -> ClientRecord:
        """Look a client up.

        :raise ClientMissing: there is none.
        """
        return rules.client_of(self._keeper.current, client)

    def __contains__(self, client: str) -> bool:
        """Tell whether there is a client, and not just what is left of one."""
        return client in self._keeper.current.clients and client not in self._leftovers

    async def set_limit(self, client: str, limit_bytes: int) -> None:
        """Record a client's limit."""
        await self._keeper.change(lambda now: rules.set_limit(now, client, limit_bytes))

    # Made and deleted

    async def create(self, wanted: ClientCreate) -> None:
        """Enter a client and make its volume on the device that fits best.

        :raise FarpageError: when no device fits, or none of its VIOS answers; nothing is left then.
        """

        def edit(definition: Definition) -> Definition:
            return rules.add_client(
                definition,
                wanted.name,
                memory_bytes=wanted.memory_bytes,
                hypervisor=self.hypervisor,
                entitlement_bytes=wanted.entitlement_bytes,
                weight=wanted.weight,
                limit_bytes=wanted.limit_bytes,
                redundancy=wanted.redundancy,
                vios_redundancy=wanted.vios_redundancy,
                provisioned_bytes=self._provisioned(),
            )

        try:
            definition = await self._enter(edit)
        except ClientExists:
            if wanted.name not in self._leftovers:
                raise
            await self.delete(wanted.name)
            definition = await self._enter(edit)
        except NoVios:
            # One that hangs may still store it.
            self._leftovers[wanted.name] = self._keeper.current.revision
            raise
        try:
            for device, paths in _by_device(rules.paths(definition, wanted.name)).items():
                volume = VolumeCreate(name=paths[0].volume, device=device, size_bytes=paths[0].size_bytes)
                await self.on_any_vios(
                    [path.vios for path in paths], partial(Vios.create_volume, wanted=volume)
                )
        except FarpageError:
            await self.discard(wanted.name)
            raise
        self._leftovers.pop(wanted.name, None)

    async def _enter(self, edit: Callable[[Definition], Definition]) -> Definition:
        try:
            return await self._keeper.change(edit)
        except NoDeviceFits:
            # What is known of their room is some seconds old.
            await asyncio.gather(*(vios.ask_devices() for vios in self._vioses.values() if vios.reachable))
            return await self._keeper.change(edit)

    def _provisioned(self) -> dict[str, int]:
        return {
            device.id: device.provisioned_bytes
            for vios in self._vioses.values()
            for device in vios.devices
            if device.provisioned_bytes is not None
        }

    async def on_any_vios(self, names: list[str], request: Callable[[Vios], Awaitable[None]]) -> None:
        """Send a request to the first VIOS, of those named, that answers it.

        :raise FarpageError: the refusal of the first that answers; NoVios when none does.
        """
        problems: list[str] = []
        for name in names:
            if name not in self._vioses:
                problems.append(f"VIOS {name!r} is none of this hypervisor's")
                continue
            try:
                await request(self._vioses[name])
            except FarpageError as error:
                if error.code != "unreachable":
                    raise
                problems.append(error.cause)
            else:
                return
        raise NoVios("; ".join(problems) or "the device is reached by none")

    async def delete(self, client: str) -> None:
        """Delete a client's volume, from every device that has it, and remove the client.

        :raise ClientMissing: there is none.
        :raise ClientElsewhere: another hypervisor has claimed it.
        :raise ClientReleased: it waits for somebody to adopt it.
        :raise NoVios: none answers that reaches one of these devices.
        """
        released = self.of(client).released
        if released and released.adopter != self.hypervisor:
            raise releasing.refusal(client, released, self.hypervisor)
        by_device = _by_device(rules.paths(self._keeper.current, client))
        # Under an epoch of its own, so that nobody who had the volume open still writes.
        claimed = await self.claim(client, take_over=False)
        # First what a move or a replacement has left: where it stays for now, so does what the client uses.
        for replica in claimed.volumes[0].replicas:
            if replica.state is ReplicaState.RETIRED:
                await self.delete_retired(client, replica.device)
        for paths in by_device.values():
            if released:
                await self._delete_handovers(paths, claimed)
            vioses = [path.vios for path in paths]
            await self.delete_volume(paths[0].volume, paths[0].device, vioses, claimed.epoch)
        await self._keeper.change(lambda now: rules.remove_client(now, client))
        # A record that comes up again, from a VIOS that hung meanwhile, is older than that claim.
        self._claimed.pop(client, None)

    async def _delete_handovers(self, paths: Iterable[VolumePath], claimed: ClientRecord) -> None:
        """Delete what every VIOS keeps of a released client: the volume is deleted by one of them alone."""
        for path in paths:
            if path.vios in self._vioses:
                with suppress(FarpageError):
                    await self._vioses[path.vios].delete_handover(
                        path.volume, path.device, claimed.epoch, claimed.owner
                    )

    async def delete_volume(self, name: str, device: str, vioses: list[str], epoch: int) -> None:
        """Delete the volume on a device, if it is there.

        :raise FarpageError: no VIOS deletes it.
        """
        request = partial(Vios.delete_volume, name=name, device=device, epoch=epoch)
        try:
            await self.on_any_vios(vioses, request)
        except FarpageError as error:
            if error.code != "volume_not_found":
                raise

    async def discard(self, client: str) -> None:
        """Delete a client that was made for a request which failed or has ended, now or later."""
        try:
            await self.delete(client)
        except (ClientElsewhere, releasing.ClientReleased) as error:
            log.info("client_left", client=client, reason=error.cause)
        except FarpageError as error:
            log.warning("client_not_deleted", client=client, problem=error.cause)
            self._leftovers[client] = self._keeper.current.revision

    @property
    def leftovers(self) -> frozenset[str]:
        """Clients that `clear` may have something to do for."""
        return frozenset(self._leftovers)

    async def clear(self, client: str) -> None:
        """Delete what is left of a client, or has come up again, when VIOS were away."""
        if client in self._keeper.current.clients:
            self._leftovers.pop(client, None)
            await self.discard(client)
        elif self._all_beyond(self._leftovers.get(client, 0)):
            self._leftovers.pop(client, None)

    def _all_beyond(self, revision: int) -> bool:
        """Tell whether every VIOS stores a later revision, so that none can take a change of that one."""
        stored = [vios.health.definition_revision for vios in self._vioses.values() if vios.health]
        return len(stored) == len(self._vioses) and min(stored) > revision

    # Claimed

    async def claim(
        self, client: str, *, take_over: bool = True, released: Release | None = None
    ) -> ClientRecord:
        """Take ownership: a new token, and an epoch above every one that a VIOS knows of.

        Whoever had the client before is fenced by it. Without `take_over` that can only be this hypervisor.
        `released` is the release that the claim makes use of, and so ends.

        :raise ClientMissing: there is none.
        :raise ClientElsewhere: without `take_over`, when another hypervisor has claimed it.
        :raise ClientReleased: when it is released, otherwise than `released` says.
        :raise FarpageError: the definition could not be changed.
        """

        def edit(definition: Definition, owner: str, epoch: int) -> Definition:
            record = rules.client_of(definition, client)
            if not take_over:
                self.must_be_ours(client, record)
            elif record.released != released:
                if record.released is None:
                    raise ClientElsewhere(client, record.hypervisor, record.epoch)
                raise releasing.refusal(client, record.released, self.hypervisor)
            return rules.claim(definition, client, owner, self.hypervisor, epoch)

        return await self._claim(client, edit)

    async def _claim(self, client: str, edit: Callable[[Definition, str, int], Definition]) -> ClientRecord:
        """Change the definition with a new token and an epoch above every one that a VIOS knows of."""
        record = self.of(client)
        known, salt = record.epoch, secrets.token_hex(4)
        for vios in self._vioses.values():
            try:
                volumes = await vios.volumes()
            except FarpageError:
                continue  # its volumes are fenced when it is reached again
            known = max([known, *(v.epoch for v in volumes if v.name == record.volumes[0].name)])

        def claim(now: Definition) -> Definition:
            epoch = max(rules.client_of(now, client).epoch, known) + 1
            return edit(now, new_owner(epoch, salt), epoch)

        definition = await self._keeper.change(claim)
        claimed = definition.clients[client]
        self._claimed[client] = (claimed.epoch, claimed.owner)
        return claimed

    def claimed_before(self, client: str, epoch: int, owner: str) -> None:
        """Take note of a claim that an earlier control process of this hypervisor has made."""
        self._claimed[client] = (epoch, owner)

    def must_be_ours(self, client: str, record: ClientRecord) -> None:
        """Refuse what only a client's hypervisor may do.

        :raise ClientElsewhere: another one has claimed it.
        """
        # Also of two hypervisors with one name only the one whose claim stands may delete the client.
        epoch, owner = self._claimed.get(client, (record.epoch, record.owner))
        claimed_since = record.owner not in ("", owner) and record.epoch >= epoch
        if record.hypervisor != self.hypervisor or claimed_since:
            raise ClientElsewhere(client, record.hypervisor, record.epoch)

    # Released and adopted

    async def release(self, client: str, owner: str, epoch: int, released: Release) -> None:
        """Record that a client is all on its devices and nobody's.

        :raise NotTheOwner: somebody else has claimed it.
        :raise FarpageError: no VIOS has surely stored it.
        """
        await self._keeper.change(lambda now: releasing.release(now, client, owner, epoch, released))

    def is_released_by(self, client: str, owner: str) -> bool:
        """Tell whether the client of an owner is released, or has even gone to somebody else since."""
        record = self._keeper.current.clients.get(client)
        return record is None or record.released is not None or record.owner != owner

    async def take_back(self, client: str, owner: str) -> None:
        """Undo a release that was recorded after its maker had given it up, if it can still be undone."""
        await self._keeper.change(lambda now: releasing.take_back(now, client, owner))

    async def adopt(self, client: str, *, force: bool) -> ClientRecord:
        """Claim a released client; whoever else does is refused from then on.

        :raise ClientMissing: there is none.
        :raise ClientNotReleased: somebody has it.
        :raise ClientReleased: without `force`, when another hypervisor has adopted it.
        """
        return await self._claim(
            client,
            lambda now, owner, epoch: releasing.adopt(
                now, client, owner, self.hypervisor, epoch, force=force
            ),
        )

    async def restore(self, client: str, released: Release) -> None:
        """Put a release in force again: an attachment that was to begin with it has not come to be.

        :raise FarpageError: the definition cannot be changed.
        """

        def edit(definition: Definition) -> Definition:
            record = definition.clients.get(client)
            if record is None or record.released is not None or record.hypervisor != self.hypervisor:
                return definition
            return releasing.restore(definition, client, record.owner, released)

        await self._keeper.change(edit)

    async def epoch_raised(self, raised: EpochRaised) -> None:
        """Record in the definition that a client's volume was opened under a newer epoch of its owner."""

        def edit(definition: Definition) -> Definition:
            record = definition.clients.get(raised.client)
            if record is None or record.owner != raised.owner or record.epoch >= raised.epoch:
                return definition
            return rules.raise_epoch(definition, raised.client, raised.epoch)

        try:
            await self._keeper.change(edit)
        except FarpageError as error:
            # The VIOS that opened the volume has the epoch stored; the definition follows later.
            log.warning("epoch_not_recorded", client=raised.client, epoch=raised.epoch, problem=error.cause)

    async def record_replicas(self, wanted: RecordReplicas, begins: Callable[[], None]) -> None:
        """Store what a client's replicas are worth; `begins` is called right before the first VIOS can.

        :raise NotTheOwner: somebody else has claimed the client.
        :raise FarpageError: no VIOS has surely stored it; or what `begins` raises, when none will.
        """

        def edit(now: Definition) -> Definition:
            changed = rules.set_replica_states(now, wanted.client, wanted.owner, wanted.epoch, wanted.states)
            begins()
            return changed

        await self._keeper.change(edit)

    # Moved to another device

    def plan_replacement(
        self, old: str, new: str, only: str | None = None
    ) -> tuple[str, str, tuple[str, ...]]:
        """Return the identifiers of two devices and the clients, or the only one, that are to go over.

        :raise FarpageError: that cannot be; nothing is changed.
        """
        if unproven := self._keeper.unproven:
            raise unproven
        now = self._keeper.current
        asking = replacing.Replacing(self.hypervisor, self._vioses.keys(), self._provisioned())
        clients = replacing.plan(now, old, new, asking, only)
        return replacing.device_named(now, old), replacing.device_named(now, new), clients

    async def begin_replacing(self, client: str, new: str) -> None:
        """Enter a stale replica on another device and make its volume; nothing of it is left when that fails.

        :raise ClientElsewhere: another hypervisor has claimed the client.
        :raise FarpageError: no VIOS makes the volume.
        """

        def edit(definition: Definition) -> Definition:
            record = rules.client_of(definition, client)
            if record.hypervisor != self.hypervisor:
                raise ClientElsewhere(client, record.hypervisor, record.epoch)
            return replacing.begin(definition, client, new)

        had_it = new in self.replica_states(client)
        definition = await self._keeper.change(edit)
        paths = _by_device(rules.paths(definition, client))[new]
        wanted = VolumeCreate(name=paths[0].volume, device=new, size_bytes=paths[0].size_bytes)
        try:
            await self.on_any_vios([path.vios for path in paths], partial(Vios.create_volume, wanted=wanted))
        except FarpageError as error:
            if error.code == "volume_exists":
                return  # made before; what it holds counts for nothing while it is stale
            if not had_it:
                await self._keeper.change(lambda now: replacing.forget(now, client, new, ReplicaState.STALE))
            raise

    async def finish_replacing(self, client: str, old: str, new: str) -> None:
        """Retire the old replica of a client that has nothing paged out."""
        await self._keeper.change(lambda now: replacing.finish(now, client, old, new))

    async def remove_retired(self, client: str, device: str) -> None:
        """Delete the volume of a retired replica and take the replica out of the definition.

        :raise FarpageError: no VIOS deletes it; it stays in the definition as retired.
        """
        await self.delete_retired(client, device)
        await self._keeper.change(lambda now: replacing.forget(now, client, device, ReplicaState.RETIRED))

    async def delete_retired(self, client: str, device: str) -> None:
        """Delete the volume of a retired replica, if it is there.

        :raise FarpageError: no VIOS deletes it.
        """
        now = self._keeper.current
        record = rules.client_of(now, client)
        name, epoch = record.volumes[0].name, record.epoch
        reaching = [reach.vios for reach in now.devices[device].reached_by]
        for vios in reaching:
            if vios in self._vioses:
                with suppress(FarpageError):
                    volumes = await self._vioses[vios].volumes()
                    epoch = max([epoch, *(v.epoch for v in volumes if v.name == name)])
        await self.delete_volume(name, device, reaching, epoch)

    def view(self) -> Viewpoint:
        """Return what this hypervisor reaches."""
        return Viewpoint(self._vioses.keys(), self._provisioned())

    def replica_states(self, client: str) -> dict[str, ReplicaState]:
        """Return what the replicas of a client are worth, by device; nothing when that is not sure."""
        record = None if self._keeper.unproven else self._keeper.current.clients.get(client)
        return {replica.device: replica.state for replica in record.volumes[0].replicas} if record else {}

    def replicas(self, client: str, turn: int, *, over: str = "") -> tuple[ReplicaSpec, ...]:
        """List the replicas of the volume with the ways to each, beginning with another VIOS at each turn.

        So clients share the VIOS. With `over` that VIOS is the first way. A client that is being moved has
        one way alone, over the target's VIOS.

        :raise NoDirectAccess: no VIOS that the hypervisor reaches serves the device, or `over` does not.
        """
        record = self.of(client)
        if (move := self._keeper.current.moves.get(client)) and move.state is not MoveState.RETIRING:
            return (self._moving_replica(client, move),)
        specs: list[ReplicaSpec] = []
        for replica in record.volumes[0].replicas:
            device = replica.device
            if replica.state is ReplicaState.RETIRED:
                continue
            access = resolve(self._keeper.current, client, device, Viewpoint(self._vioses.keys()))
            if not isinstance(access, Direct):
                raise NoDirectAccess(client, self._device_name(device), self._why(access))
            vioses = [path.vios for path in access.paths]
            if over and over not in vioses:
                raise NoDirectAccess(client, self._device_name(device), f"VIOS {over} is out of reach")
            first = vioses.index(over) if over else turn % len(access.paths)
            ordered = [*access.paths[first:], *access.paths[:first]]
            if record.redundancy is Redundancy.NONE:
                ordered = ordered[:1]
            known = self._keeper.current.vioses
            endpoints = tuple(
                EndpointSpec(
                    vios=path.vios,
                    address=path.data[0],
                    lease_seconds=known[path.vios].lease_seconds,
                )
                for path in ordered
            )
            specs.append(
                ReplicaSpec(
                    device=device,
                    name=self._device_name(device),
                    state=replica.state,
                    endpoints=endpoints,
                    others=self._leases_of(device, {path.vios for path in ordered}),
                )
            )
        return tuple(specs)

    def _moving_replica(self, client: str, move: Move) -> ReplicaSpec:
        name = self._device_name(move.target)
        if move.target_vios not in self._vioses:
            raise NoDirectAccess(client, name, f"it is being moved over VIOS {move.target_vios}")
        data = self._keeper.current.vioses[move.target_vios].data
        return ReplicaSpec(
            device=move.target,
            name=name,
            state=ReplicaState.COPYING,
            endpoints=(EndpointSpec(vios=move.target_vios, address=data[0]),),
            source=move.source,
            source_vios=move.source_vios,
            others=self._leases_of(move.source, {move.source_vios}),
        )

    def _leases_of(self, device: str, without: Collection[str]) -> tuple[tuple[str, float], ...]:
        """Return how long the leases last, where that is known, of the other VIOSes that reach a device."""
        now = self._keeper.current
        others = (reach.vios for reach in now.devices[device].reached_by if reach.vios not in without)
        return tuple((vios, lease) for vios in others if (lease := now.vioses[vios].lease_seconds))

    def _why(self, decision: Indirect | Unreachable) -> str:
        if isinstance(decision, Unreachable):
            return "; ".join(decision.reasons)
        first = self._device_name(decision.first_device)
        return f"it can be moved to device {first} over VIOS {decision.first_vios} and {decision.second_vios}"

    def _device_name(self, identifier: str) -> str:
        return self._keeper.current.devices[identifier].name


def _by_device(paths: Iterable[VolumePath]) -> dict[str, list[VolumePath]]:
    """Take the paths of each device together."""
    found: dict[str, list[VolumePath]] = {}
    for path in paths:
        found.setdefault(path.device, []).append(path)
    return found
