"""What the replicas of attached clients are worth, and replicas that come and go while a client is paged."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from farpage.definition.model import ReplicaState
from farpage.errors import FarpageError
from farpage.hypervisor.attached import Attached
from farpage.hypervisor.clients import Clients
from farpage.hypervisor.errors import WorkerReplaced
from farpage.pager.messages import AddReplica, Attach, GoOver, RecordReplicas, ReplicaSpec, RetireReplica


class ClientReplicas:
    """The replicas of the clients of one hypervisor."""

    def __init__(self, clients: Clients) -> None:
        self._clients = clients

    async def record(self, wanted: RecordReplicas) -> None:
        """Store what a client's replicas are worth: in the definition, and for a recovery without that.

        A recovery that comes before it is known to be stored, or not, knows that it may be.

        :raise WorkerReplaced: the worker that asks for it has ended; nothing was changed.
        :raise FarpageError: it may not be stored.
        """

        def begins() -> None:
            if self._is_replaced(wanted):
                raise WorkerReplaced(wanted.client, wanted.epoch)
            self._keep(wanted, _with_doubts)

        await self._clients.records.record_replicas(wanted, begins)
        if not self._is_replaced(wanted):
            self._keep(wanted, _with_states)

    def _is_replaced(self, wanted: RecordReplicas) -> bool:
        attached = self._clients.attached.get(wanted.client)
        return attached is not None and wanted.epoch <= attached.replaced_epoch

    def _keep(
        self, wanted: RecordReplicas, edit: Callable[[Attach, Mapping[str, ReplicaState]], Attach]
    ) -> None:
        """Change what a worker that takes over goes by."""
        attached = self._clients.attached.get(wanted.client)
        # One that is being adopted is in the run folder alone.
        record = attached.record if attached else self._clients.run.record(wanted.client)
        if record is None or record.order is None or record.order.owner != wanted.owner:
            return
        record = record.model_copy(update={"order": edit(record.order, wanted.states)})
        if attached:
            self._clients.keep(attached, record)
        else:
            self._clients.run.save(record)

    def for_next_worker(self, client: str, attached: Attached, order: Attach) -> tuple[ReplicaSpec, ...]:
        """Return the replicas as the definition has them now, for a worker in the place of a dead one.

        What the dead one has asked for is not begun any more. What was, may be stored or not: such replicas
        are `unsure`, and the next worker has them recorded anew before it goes by what is recorded.
        """
        attached.replaced_epoch = max(attached.replaced_epoch, attached.state.epoch)
        return self.current(client, order)

    def current(self, client: str, order: Attach) -> tuple[ReplicaSpec, ...]:
        """Return the replicas as the definition has them now.

        While that is not known their states are those of `order`, which `record` keeps up to date. A stale
        one that no worker was told of is left to `add`: it is undone if no VIOS makes its volume.
        """
        try:
            current = self._clients.records.replicas(client, turn=0)
        except FarpageError:
            current = order.replicas
        states = {replica.device: replica.state for replica in order.replicas}
        states |= self._clients.records.replica_states(client)
        # In the order of preference that the client had.
        before = {replica.device: replica.endpoints for replica in order.replicas}
        unsure = {replica.device: replica for replica in order.replicas if replica.unsure}
        # One that may be about to come back from being retired has to be recorded one way or the other.
        returning = tuple(
            replica.model_copy(update={"state": ReplicaState.STALE})
            for device, replica in unsure.items()
            if states.get(device) is ReplicaState.RETIRED
        )
        return returning + tuple(
            replica.model_copy(
                update={
                    "state": states.get(replica.device, replica.state),
                    "unsure": replica.device in unsure,
                    "endpoints": before[replica.device]
                    if set(before.get(replica.device, ())) == set(replica.endpoints)
                    else replica.endpoints,
                }
            )
            for replica in current
            if states.get(replica.device) is not ReplicaState.RETIRED
            and (replica.device in before or states.get(replica.device) is not ReplicaState.STALE)
        )

    async def add(self, client: str, attached: Attached, device: str) -> None:
        """Have a client's worker copy everything to a replica that the definition has as stale.

        :raise FarpageError: the client has ended, or there is no way to the replica.
        """
        replica = next(
            spec for spec in self._clients.records.replicas(client, turn=0) if spec.device == device
        )
        self._store(attached, device, replica)
        attached.served = (*_without(attached.served, device), replica)
        await self._clients.command(
            client, attached, "add_replica", AddReplica(client=client, replica=replica)
        )

    async def retire(self, client: str, attached: Attached, device: str) -> None:
        """Have a client's worker use a replica no more; returns when it does not, or the client has ended."""
        await self._clients.command(
            client, attached, "retire_replica", RetireReplica(client=client, device=device)
        )
        attached.served = _without(attached.served, device)
        if self._clients.records.replica_states(client).get(device) is ReplicaState.RETIRED:
            self._store(attached, device)

    async def go_over(self, client: str, attached: Attached, over: str = "", fences: str = "") -> None:
        """Have a client's worker use its one replica where the definition has it now; see `GoOver`.

        Whoever takes the worker's place opens it there too, from when this begins.

        :raise NoDirectAccess: VIOS `over` is out of reach.
        :raise FarpageError: it cannot be opened there, or the client has ended.
        """
        (replica,) = self._clients.records.replicas(client, turn=0, over=over)
        self._store(attached, None, replica)
        order = GoOver(client=client, replica=replica, over=over, fences=fences)
        await self._clients.command(client, attached, "go_over", order)
        attached.served = (replica,)

    def _store(self, attached: Attached, without: str | None, *more: ReplicaSpec) -> None:
        """Keep what a worker that takes over has to know, should no VIOS tell it then; None: without any."""
        order = attached.record.order
        if order is not None and attached.record.client in self._clients.attached:
            left = () if without is None else _without(order.replicas, without)
            order = order.model_copy(update={"replicas": (*left, *more)})
            self._clients.keep(attached, attached.record.model_copy(update={"order": order}))


def _without(replicas: tuple[ReplicaSpec, ...], device: str) -> tuple[ReplicaSpec, ...]:
    return tuple(spec for spec in replicas if spec.device != device)


def _with_doubts(order: Attach, states: Mapping[str, ReplicaState]) -> Attach:
    """Say of which replicas it is not sure any more what is recorded: they may come to have `states`."""
    replicas = tuple(
        replica.model_copy(
            update={"unsure": replica.unsure or states.get(replica.device, replica.state) != replica.state}
        )
        for replica in order.replicas
    )
    return order.model_copy(update={"replicas": replicas})


def _with_states(order: Attach, states: Mapping[str, ReplicaState]) -> Attach:
    """Say what is recorded of the replicas."""
    replicas = tuple(
        replica.model_copy(update={"state": states[replica.device], "unsure": False})
        if replica.device in states
        else replica
        for replica in order.replicas
    )
    return order.model_copy(update={"replicas": replicas})
