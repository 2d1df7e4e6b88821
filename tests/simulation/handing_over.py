"""A client that one hypervisor releases and another one adopts, which reaches its volume or has it moved.

The guest stands meanwhile, or runs on and waits. Its pages stay on the device; what goes over is the page
table. The second hypervisor attaches it over the same VIOS and has it moved thereafter, or reaches only that
of the target: then the volume begins to move when the client is adopted; the intermediate client brings
the table first. Or it was moved before. Control processes, workers, VIOSes and the intermediate client are
killed at any moment; the operator tries again until it is done. At the end the guest reads what it wrote.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any, TypeVar, cast

from farpage import handover
from farpage.api.remote import RemoteError
from farpage.definition import releasing, rules
from farpage.definition.model import (
    ClientRecord,
    Definition,
    DeviceRecord,
    Move,
    MoveState,
    PagingCommand,
    Reach,
    Release,
    ReplicaState,
    ViosRecord,
)
from farpage.device.claim import Claim
from farpage.errors import FarpageError, Unreachable
from farpage.handover import Handover
from farpage.intermediary.handover import HandoverCarrier
from farpage.intermediary.places import Place as ViosPlace
from farpage.pager.memory import ClientGone
from farpage.pager.table import PAGE_BYTES
from tests.simulation.definition import SimulatedDefinition
from tests.simulation.faults import Fault, Kind, Parts
from tests.simulation.intermediary import HOST
from tests.simulation.moving import FIRST, SECOND, SOURCE, TARGET, Moving
from tests.simulation.owner import OPEN_SECONDS, Owner
from tests.simulation.users import HandedUser, PagerUser, User
from tests.simulation.vios import SimulatedVios
from tests.simulation.world import Process, World

ANSWER_SECONDS = 2.0
"""So long a VIOS is waited for."""
POLL_SECONDS = 0.1
TRY_SECONDS = 0.5
"""After so long the operator repeats what has failed."""
THREADS = 6
"""What waits for a hypervisor that is long in coming must not be more than a small limit has room for."""
PLACES = {TARGET: FIRST, SOURCE: SECOND}

Answer = TypeVar("Answer")


class HandingOver(Moving):
    """One client on its way from one hypervisor to another, and perhaps from disk2 to disk1."""

    hosts = ("host1", "host2")

    def __init__(self, world: World) -> None:
        super().__init__(world)
        chance = self._handing = world.random("handing over")
        self._moves_first = chance.random() < 0.3
        self._indirect = chance.random() < 0.6 and not self._moves_first
        """The second hypervisor reaches the target's VIOS alone."""
        self._stands = chance.random() < 0.6
        """The guest is stopped before it is released."""
        self._client = ClientRecord.model_construct(epoch=1, owner=self.owner.token, hypervisor="host1")
        self._claims = 1
        self._releases = 0
        """As the run folder has it."""
        self._alone = False
        self._wanted = self._released = self._attached = False
        self._next: Owner | None = None
        """The owner that the second hypervisor attaches the client as; it may come to nothing."""
        self._table: Release | None = None
        """What that attachment begins with."""
        self._carriers: dict[Process, HandoverCarrier] = {}
        self._pager.guest.most_waiting = THREADS
        self._control = self._new_control()
        self._define(None, {SOURCE: ReplicaState.IN_SYNC})

    def _user(self, is_pager: bool, client: int = 1) -> User:
        return super()._user(True, client)

    @property
    def _pager(self) -> PagerUser:
        user = self.owner.user
        assert isinstance(user, PagerUser)
        return user

    # The definition

    def _definition(self, revision: int, move: Move | None, states: dict[str, ReplicaState]) -> Definition:
        made = super()._definition(revision, move, states)
        now = self.first.defined.clients.get("vm1", self._client)
        kept = {name: getattr(now, name) for name in ("epoch", "owner", "hypervisor", "released")}
        kept["memory_bytes"] = self.owner.user.pages * PAGE_BYTES
        devices = {
            disk: DeviceRecord.model_construct(
                name=disk,
                kind="dir",
                size_bytes=1 << 40,
                reached_by=(Reach(vios=vios, spec=f"dir:/{disk}"),),
                commands=tuple(PagingCommand),
            )
            for disk, vios in PLACES.items()
        }
        return made.model_copy(
            update={
                "vioses": {name: ViosRecord(control="unix:/", data=("unix:/",)) for name in PLACES.values()},
                "devices": devices,
                "clients": {"vm1": made.clients["vm1"].model_copy(update=kept)},
            }
        )

    def _define(self, move: Move | None, states: dict[str, ReplicaState]) -> None:
        self._revision = max(self._revision, self.first.defined.revision)
        super()._define(move, states)

    async def _change(self, host: str, edit: Callable[[Definition], Definition]) -> ClientRecord:
        """Have a host change the definition.

        :raise Unreachable: there is no answer; it may be changed all the same.
        """
        first = self.first

        async def store() -> ClientRecord:
            first.define(edit(first.defined))
            self._revision = first.defined.revision
            return first.defined.clients["vm1"]

        return await self._call(host, first, store)

    async def _client_record(self, host: str) -> ClientRecord:
        """Ask what the definition says, until there is an answer."""
        while True:
            try:
                return await self._change(host, lambda now: now)
            except Unreachable:
                await asyncio.sleep(POLL_SECONDS)

    async def _call(self, host: str, vios: SimulatedVios, work: Callable[[], Awaitable[Answer]]) -> Answer:
        """Ask a VIOS over its control API.

        :raise Unreachable: there is no answer; it may be done all the same.
        :raise FarpageError: it refuses.
        """
        world, chance = self.world, self._handing
        answer: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        asking = next(p for p in world.processes if p.loop is asyncio.get_running_loop())

        def arrive() -> None:
            if self._reached(host, vios):
                vios.process.loop.create_task(carry_out())

        async def carry_out() -> None:
            result: Answer | FarpageError
            try:
                result = await work()
            except FarpageError as error:
                result = error
            if self._reached(host, vios):
                world.after(0.001 + 0.02 * chance.random() ** 3, lambda: reply(result), asking)

        def reply(result: Answer | FarpageError) -> None:
            if answer.done():
                return
            if isinstance(result, FarpageError):
                answer.set_exception(result)
            else:
                answer.set_result(result)

        world.after(0.001 + 0.02 * chance.random() ** 3, arrive)
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return await answer
        except TimeoutError:
            raise Unreachable("VIOS", vios.name, "no answer", "start it") from None

    # What befalls control processes

    def _kinds(self) -> dict[Kind, int]:
        def kill(parts: Parts, chance: random.Random) -> Fault:
            return Fault("kill the control process", self._control.kill, self._restart)

        return super()._kinds() | {kill: 12}

    def _new_control(self) -> Process:
        return self.world.process("control")

    def _restart(self) -> None:
        """Start a control process, which goes on from what is written down."""
        if not self._control.alive:
            self._control = self._new_control()
            if self._wanted:
                self._control.loop.create_task(self._go_on())

    # What happens

    def _begin(self) -> None:
        if self._moves_first:
            super()._begin()
        self.world.after(0.5 + 4 * self._handing.random(), self._want)

    def _begin_move(self) -> None:
        if self._wanted and not self._attached:
            self.world.after(TRY_SECONDS, self._begin_move)
        elif not self.faults.healed:
            super()._begin_move()

    def _cancel(self) -> None:
        if not self.faults.healed:
            super()._cancel()

    def _use_alone(self) -> None:
        def done() -> None:
            self._alone = True

        self.moving_place.moved = True
        self._go_over(TARGET, "", done, self._use_alone)

    def _want(self) -> None:
        """Have the client released, as soon as it is not being moved."""
        if self.faults.healed or self.cancelled:
            return
        moved = self.finished and self.intermediary.freed and (self._alone or not self.running)
        if (self.begun and not moved) or not self.owner.opened or not self._reached("host1", self.first):
            self.world.after(TRY_SECONDS, self._want)
            return
        if moved:
            self.moving_place.moved = True
            self._define(None, {TARGET: ReplicaState.IN_SYNC})
        self._wanted = True
        if self._control.alive:
            self._control.loop.create_task(self._go_on())

    async def _go_on(self) -> None:
        """Do what is still to be done; the operator repeats what has failed."""
        if self._pager.frozen and not self._released:
            await self._settle()
        while not self._released:
            await self._release()
            await asyncio.sleep(TRY_SECONDS)
        if self._next is not None and not self._attached:
            await self._look_after(self._next)
        while not self._attached:
            try:
                await self._adopt()
            except FarpageError as error:
                self.world.note(f"not adopted: {error.cause}")
            await asyncio.sleep(TRY_SECONDS)

    # Released

    async def _release(self) -> None:
        """Release the client, as `farpage.hypervisor.releasing` does."""
        pager = self._pager
        pager.guest.paused = self._stands
        self._releases += 1
        self.world.note("the client is to be released")
        pager.frozen = True
        try:
            await self._page_out()
            owner, epoch = self.owner.token, self.owner.volume.epoch
            encoded = pager.table(epoch, self._releases)
            await self._keep(Claim(epoch, owner), encoded)
            digest = handover.check(encoded, whose="vm1").digest
            released = Release(hypervisor="host1", epoch=epoch, digest=digest)
            await self._change("host1", lambda now: releasing.release(now, "vm1", owner, epoch, released))
        except FarpageError as error:
            self.world.note(f"not released: {error.cause}")
        await self._settle()

    async def _page_out(self) -> None:
        """Have the worker page everything out, or the one that takes its place.

        :raise FarpageError: it cannot now.
        """
        while True:
            owner, process = self.owner, self.owner.process
            if not owner.opened or not process.alive:
                await asyncio.sleep(POLL_SECONDS)
                continue
            outcome: list[FarpageError | None] = []

            async def page_out(outcome: list[FarpageError | None] = outcome) -> None:
                try:
                    await self._pager.page_out()
                except (FarpageError, ClientGone) as error:
                    outcome.append(error if isinstance(error, FarpageError) else None)
                else:
                    outcome.append(None)

            process.loop.create_task(page_out())
            while process.alive and not outcome:
                await asyncio.sleep(POLL_SECONDS / 10)
            if outcome and outcome[0]:
                raise outcome[0]
            if outcome:
                return

    async def _keep(self, claim: Claim, encoded: bytes) -> None:
        """Keep the page table beside the volume.

        :raise FarpageError: it is not stored.
        """
        device = self.owner.devices[0]
        service = self.place.vioses[PLACES[device]]
        await self._call(
            "host1", service, lambda: service.service._put_handover("vm1", device, claim, bytearray(encoded))
        )

    async def _settle(self) -> None:
        """Go by what the definition says: let go of the client, or let it go on."""
        record = await self._client_record("host1")
        owner, pager = self.owner, self._pager
        if record.released is not None or record.owner != owner.token:
            owner.ended = True
            if owner.process.alive and owner.opened:
                process, volume = owner.process, owner.volume

                async def let_go() -> None:
                    pager.let_go()
                    await volume.abandon()

                process.loop.create_task(let_go())
            self.world.note("the client is released")
            self._released = True
            return
        while not (owner.opened and owner.process.alive):
            await asyncio.sleep(POLL_SECONDS)
        pager.frozen = pager.guest.paused = False
        process = owner.process
        thawing = process.loop.create_task(pager.thaw())
        while process.alive and not thawing.done():
            await asyncio.sleep(POLL_SECONDS / 10)

    # Adopted

    async def _adopt(self) -> None:
        """Adopt the client if that is still to be done, and attach it.

        :raise FarpageError: something of it could not be done.
        """
        record = await self._client_record("host2")
        released = record.released
        assert released is not None
        if released.adopter != "host2":
            self._claims += 1
            token, epoch = self._claim(record)
            await self._change(
                "host2", lambda now: releasing.adopt(now, "vm1", token, "host2", epoch, force=False)
            )
        if self._indirect and not self.begun:
            self.world.note("the move begins with the adoption")
            self.begun, self.running = True, False
            self._copy()
            self.world.after(self._handing.random(), self._start_intermediary)
        await self._attach()

    def _claim(self, record: ClientRecord) -> tuple[str, int]:
        """Return a new token, and an epoch above every one that is known."""
        known = [disk.volumes["vm1"].claims.current.epoch for disk in self.place.disks if disk.volumes]
        epoch = max(record.epoch, *known) + 1
        return f"{self._claims:08x}{self._claims:08x}", epoch

    async def _attach(self) -> None:
        record = await self._client_record("host2")
        released = record.released
        assert released is not None
        assert released.adopter == "host2"
        device = TARGET if self.begun else SOURCE
        vios = self.place.vioses[PLACES[device]]
        encoded = await self._call("host2", vios, lambda: vios.service._handover("vm1", device))
        found = handover.decode(encoded, whose="vm1")
        if handover.check(encoded, whose="vm1").digest != released.digest:
            self.world.note("another page table is stored")
            return
        self._claims += 1
        token, epoch = self._claim(record)
        self._table, self._next = released, self._made(found, device)
        claimed = await self._change("host2", lambda now: rules.claim(now, "vm1", token, "host2", epoch))
        self._next.open(claimed.epoch)
        await self._look_after(self._next)

    def _made(self, found: Handover, device: str) -> Owner:
        definition = SimulatedDefinition(self.world, [device], lambda: True)
        user = HandedUser(self._pager, found)
        owner = Owner(
            self.place,
            user,
            definition,
            self._chance,
            number=self._claims,
            host="host2",
            devices=[device],
        )
        owner.on_refused = lambda: None
        return owner

    async def _look_after(self, owner: Owner) -> None:
        """Wait until an attachment's worker serves the guest; else put the release in force again."""
        began = asyncio.get_running_loop().time()
        while hasattr(owner, "process") and owner.process.alive and not owner.opened:
            if asyncio.get_running_loop().time() > began + OPEN_SECONDS:
                break
            await asyncio.sleep(POLL_SECONDS / 10)
        if owner.opened:
            self.owner, self._attached = owner, True
            self.world.note("the client is attached by the second hypervisor")
            if not self.begun and not self._moves_first:
                super()._begin()
            return
        owner.ended = True
        if hasattr(owner, "process"):
            owner.process.kill()
        self.world.note("the attachment has come to nothing")
        released = self._table
        assert released is not None

        def restored(now: Definition) -> Definition:
            record = now.clients["vm1"]
            return now if record.released else releasing.restore(now, "vm1", record.owner, released)

        while True:
            try:
                await self._change("host2", restored)
            except Unreachable:
                await asyncio.sleep(POLL_SECONDS)
            else:
                break
        self._next = None

    # The intermediate client

    def carry(self, principal: str) -> Move | None:
        """Bring the page table over as well."""
        move = super().carry(principal)
        client = self.first.defined.clients.get("vm1")
        if move is not None and client is not None and move.state is MoveState.COPYING:
            process = self.intermediary.process
            if process not in self._carriers:
                self._carriers[process] = HandoverCarrier(self._place_of(FIRST), self._place_of(SECOND))
            process.loop.create_task(self._carriers[process].carry(move, client))
        return move

    def _place_of(self, name: str) -> ViosPlace:
        """Return a VIOS as an intermediate client asks it."""

        async def ask(work: Callable[[], Awaitable[Any]]) -> Any:
            try:
                return await self._call(HOST, self.place.vioses[name], work)
            except Unreachable:
                raise
            except FarpageError as error:
                raise RemoteError(404, error.code, error.cause, "") from error

        async def request(_method: str, _path: str, *, params: dict[str, Any]) -> Any:
            service = self.place.vioses[name].service
            return await ask(lambda: service._handover("vm1", params["device"]))

        async def put(_path: str, encoded: bytes, _answer: object, *, params: dict[str, Any]) -> Any:
            service, claim = self.place.vioses[name].service, Claim(params["epoch"], params["owner"])
            return await ask(
                lambda: service._put_handover("vm1", params["device"], claim, bytearray(encoded))
            )

        return cast(ViosPlace, SimpleNamespace(name=name, client=SimpleNamespace(request=request, put=put)))

    # The end

    def _finish(self) -> None:
        self._restart()
        if self._wanted and not self._quiet(lambda: self._attached, "the client is not handed over"):
            return
        super()._finish()
