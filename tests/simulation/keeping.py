"""The definition: a hypervisor's real keeper changes it at VIOS that come and go, and is killed at any step.

What must hold: a change that was acknowledged is never lost, whoever is killed, cut off or restarted, in
whatever order they come back; and a replica that was recorded stale counts again only when it has everything.
Only an operator who promotes a copy may lose changes, and then the promoted one stays, whoever comes back.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

from farpage.definition import rules
from farpage.definition.copy import DefinitionCopy
from farpage.definition.database import Database
from farpage.definition.errors import StoreFailed
from farpage.definition.model import Definition, PagingCommand, Redundancy, ReplicaState, ViosRecord
from farpage.definition.store import DefinitionStore
from farpage.errors import FarpageError, Unreachable
from farpage.hypervisor.definitions import DefinitionKeeper
from tests.simulation.checker import History
from tests.simulation.world import Process, ProcessState, World

FAULTY_SECONDS = 20.0
QUIET_SECONDS = 60.0
TIMEOUT_SECONDS = 2.0
POLL_SECONDS = 0.3
PATIENCE_SECONDS = 0.5
"""How long an operator waits for a VIOS before a copy is promoted."""
CLIENT = "vm1"
OTHER = "vm2"
"""One whose changes come at the same time."""
DEVICES = [str(uuid.UUID(int=number)) for number in (1, 2)]


class KeptCopy:
    """The hypervisor's own copy: a file that outlives its process."""

    def __init__(self, world: World) -> None:
        self.content: dict[str, Definition] = {}
        self._world = world
        self._chance = world.random("copy")

    def of(self, name: str) -> KeptFile:
        """Return one of its files."""
        return KeptFile(self, name)

    def fails(self) -> bool:
        """Draw whether the file system has had enough."""
        return self._chance.random() < 0.02


class KeptFile:
    """Stands in for `farpage.definition.copy.DefinitionCopy`."""

    def __init__(self, copy: KeptCopy, name: str) -> None:
        self._copy = copy
        self._name = name

    def load(self) -> Definition | None:
        return self._copy.content.get(self._name)

    def save(self, definition: Definition) -> None:
        if self._copy.fails():
            self.discard()
            raise StoreFailed(self._name, "Input/output error")
        self._copy.content[self._name] = definition

    def discard(self) -> None:
        self._copy.content.pop(self._name, None)


class KeptVios:
    """One VIOS' store as the hypervisor sees it; stands in for `farpage.hypervisor.vioses.Vios`."""

    def __init__(self, world: World, name: str) -> None:
        self.name = name
        self.control = f"unix:/{name}"
        self.problem = "not asked yet"
        self.cut = False
        """Nothing comes through, either way."""
        self.database = Database(":memory:")
        self.process: Process
        self.store: DefinitionStore
        self._world = world
        self._chance = world.random(f"requests to {name}")
        self._waiting: set[asyncio.Future[Definition]] = set()
        self.start()

    def start(self) -> None:
        """Start its process, if there is none."""
        process = self._world.process(self.name)
        self.process, self.store = process, DefinitionStore(self.database)

    @property
    def reachable(self) -> bool:
        return not self.problem

    def give_up(self) -> None:
        """Find it away, as when it was doubted: nothing waits for its answers, which may yet come."""
        self.problem = "doubted"
        for answer in self._waiting:
            if not answer.done():
                answer.set_exception(Unreachable("VIOS", self.name, "doubted", "start it"))

    async def definition(self) -> Definition:
        return await self._request(self.store.current)

    async def put_definition(self, expected_revision: int, definition: Definition) -> None:
        await self._request(lambda: self.store.compare_and_swap(expected_revision, definition))

    async def _request(self, work: Callable[[], Definition]) -> Definition:
        """Have the VIOS do something; the request or its answer may be lost.

        :raise Unreachable: no answer came; it may be done all the same.
        """
        answer: asyncio.Future[Definition] = asyncio.get_running_loop().create_future()
        hypervisor = self._world.processes[self._asking]
        server = self.process

        def arrive() -> None:
            if self.cut:
                return
            try:
                result: Definition | FarpageError = work()
            except FarpageError as error:
                result = error
            if not self.cut:
                self._world.after(self._delay(), lambda: reply(result), hypervisor)

        def reply(result: Definition | FarpageError) -> None:
            if answer.done():
                return
            if isinstance(result, FarpageError):
                answer.set_exception(result)
            else:
                answer.set_result(result)

        if not server.alive:
            raise Unreachable("VIOS", self.name, "connection refused", "start it")
        if not self.cut:
            self._world.after(self._delay(), arrive, server)
        self._waiting.add(answer)
        try:
            async with asyncio.timeout(TIMEOUT_SECONDS):
                return await answer
        except TimeoutError:
            raise Unreachable("VIOS", self.name, "no answer", "start it") from None
        finally:
            self._waiting.discard(answer)

    _asking = 0

    def asked_by(self, process: Process) -> None:
        """Answer to a control process from now on."""
        self._asking = self._world.processes.index(process)
        self.problem = "not asked yet"

    def _delay(self) -> float:
        return self._chance.choice((0.0005, 0.0005, 0.02)) * (0.5 + self._chance.random())


class Register:
    """A number in the definition that every change of it replaces."""

    def __init__(self, client: str) -> None:
        self.client = client
        self.acknowledged = 1
        self.attempted: set[int] = set()
        """Numbers of changes since the latest acknowledged one of which nobody knows what became of them."""
        self.under_way: set[int] = set()
        """The number of the change that the hypervisor makes now, if it makes one: what is promoted meanwhile
        may be there before."""

    def found(self, definition: Definition) -> int:
        """Return the number of the latest change that a definition has."""
        return definition.clients[self.client].limit_bytes or 0

    def begin(self, number: int) -> None:
        """A change is on its way."""
        self.attempted.add(number)
        self.under_way = {number}

    def acknowledge(self, number: int) -> None:
        """A change was made; every change before it has ended."""
        self.acknowledged = number
        self.attempted.clear()

    def promoted(self, definition: Definition) -> None:
        """Some copy is followed, whatever is lost by that."""
        self.acknowledged = self.found(definition)
        self.attempted &= self.under_way


class Keeping:
    """One definition in two or three VIOS, a hypervisor's control process, and what befalls them."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.fault_names: list[str] = []
        self._chance = world.random("keeping")
        self._crowd = world.random("crowd")
        self._crowded = self._crowd.random() < 0.4
        """Another client's changes come too, VIOS are doubted, and copies promoted without need."""
        self._copy = KeptCopy(world)
        names = [f"vios{n}" for n in range(1, self._chance.choice((3, 3, 4)))]
        self._vioses = {name: KeptVios(world, name) for name in names}
        first = _first_definition(names)
        for vios in self._vioses.values():
            vios.store.compare_and_swap(0, first)
        self._process: Process
        self._keeper: DefinitionKeeper
        self._number = 1
        self._own = Register(CLIENT)
        self._other = Register(OTHER)
        self._missing: set[str] = set()
        """Devices whose replica has missed an acknowledged write."""
        self._forgiven: set[str] = set()
        """Those that count again in a copy that is being promoted."""
        self._healed = False
        self._calm = False

    def histories(self) -> Iterable[History]:
        return ()

    def close(self) -> None:
        for vios in self._vioses.values():
            vios.database.close()

    def run(self) -> None:
        world = self.world
        self._start()
        world.run_until(1.0)
        for _ in range(self._chance.choice((2, 6, 12, 20))):
            world.after(self._chance.random() * FAULTY_SECONDS, self._fault)
        world.run_until(world.now_seconds + FAULTY_SECONDS)
        self._heal()
        if not world.run_until(world.now_seconds + QUIET_SECONDS, self._at_rest) and not world.violations:
            world.violated("the copies do not come to agree")
        self._check("in the end")

    # The control process

    def _start(self) -> None:
        process = self._process = self.world.process("hypervisor")
        for vios in self._vioses.values():
            vios.asked_by(process)
        keeper = self._keeper = DefinitionKeeper(
            cast(Any, self._vioses),
            cast(DefinitionCopy, self._copy.of("own")),
            cast(DefinitionCopy, self._copy.of("attempted")),
            self._alarm,
            hypervisor="host",
            clock=lambda: self.world.now_seconds,
        )

        async def live() -> None:
            await keeper.start()
            self._check("after a start")
            await asyncio.gather(self._poll(keeper), self._work(keeper))

        process.loop.create_task(live())

    def _alarm(self, kind: str, message: str) -> None:
        self.world.note(f"alarm {kind}: {message}")
        if kind == "definition_promoted":  # from now on it may be stored, whoever is killed
            for register in (self._own, self._other):
                register.attempted.add(register.found(self._keeper.current))
            self._forgiven = {
                device for device, state in _states(self._keeper.current).items() if state is _SYNC
            }

    async def _poll(self, keeper: DefinitionKeeper) -> None:
        """Look after the VIOS as `hypervisor.service` does."""
        unproven_seconds = 0.0
        while True:
            for vios in self._vioses.values():
                was_away = bool(vios.problem)
                try:
                    found = await vios.definition()
                except FarpageError as error:
                    vios.problem = error.cause
                    continue
                vios.problem = ""
                if was_away or found.revision != keeper.current.revision:
                    await keeper.repair(cast(Any, vios))
            self._check("after a look at the VIOS")
            if keeper.unproven:
                await keeper.load()
                unproven_seconds += POLL_SECONDS
                if unproven_seconds > PATIENCE_SECONDS and self._chance.random() < 0.3:
                    await self._promote(keeper)
            await asyncio.sleep(POLL_SECONDS)

    def _promote_now(self) -> None:
        """Have an operator promote a copy without need."""
        if self._process.state is ProcessState.RUNNING:
            self._process.loop.create_task(self._promote(self._keeper))

    async def _promote(self, keeper: DefinitionKeeper) -> None:
        """Follow some copy, whatever is lost by that."""
        answering = [vios.name for vios in self._vioses.values() if vios.reachable]
        if not answering:
            return
        try:
            await keeper.promote(self._chance.choice(answering), [], [], force=True)
        except FarpageError as error:
            self.world.note(f"not promoted: {error.cause}")
            return
        for register in (self._own, self._other):
            register.promoted(keeper.current)
        self.world.note(f"promoted {self._own.acknowledged}")
        self._missing -= self._forgiven
        self._forgiven = set()

    # Changes

    async def _work(self, keeper: DefinitionKeeper) -> None:
        while not self._calm:
            changes = [self._change(keeper)]
            if self._crowded and self._crowd.random() < 0.5:
                changes.insert(self._crowd.choice((0, 1)), self._change_other(keeper))
            await asyncio.gather(*changes)
            await asyncio.sleep(self._chance.choice((0.01, 0.1, 0.5)))

    async def _change(self, keeper: DefinitionKeeper) -> None:
        """Make one change of each kind that goes together with what the replicas are worth."""
        self._number += 1
        number, chance = self._number, self._chance
        lost = chance.choice(DEVICES) if not self._missing and chance.random() < 0.4 else None
        back = sorted(self._missing) if chance.random() < 0.5 else []
        for device in back:
            self._missing.discard(device)  # everything is copied before it is recorded
        stale = self._missing | ({lost} if lost else set())
        states = {device: ReplicaState.STALE if device in stale else _SYNC for device in DEVICES}
        claims = chance.random() < 0.2

        def edit(definition: Definition) -> Definition:
            if claims:
                definition = rules.raise_epoch(definition, CLIENT)
            definition = rules.set_limit(definition, CLIENT, number)
            record = definition.clients[CLIENT]
            return rules.set_replica_states(definition, CLIENT, record.owner, record.epoch, states)

        self._strike()
        if not await self._make(keeper, self._own, number, edit):
            return
        self.world.note(f"change {number}: {', '.join(states.values())}")
        self._missing, self._forgiven = stale, set()
        self._check("after a change")

    async def _change_other(self, keeper: DefinitionKeeper) -> None:
        """Make a change of another client, which is refused now and then."""
        self._number += 1
        number, refused = self._number, self._crowd.random() < 0.2

        def edit(definition: Definition) -> Definition:
            if refused:
                raise StoreFailed(OTHER, "refused")
            return rules.set_limit(definition, OTHER, number)

        await self._make(keeper, self._other, number, edit)
        self._check("after a change of the other")

    async def _make(
        self,
        keeper: DefinitionKeeper,
        register: Register,
        number: int,
        edit: Callable[[Definition], Definition],
    ) -> bool:
        """Make a change; returns whether it is acknowledged."""
        register.begin(number)
        try:
            await keeper.change(edit)
        except FarpageError as error:
            self.world.note(f"change {number} failed: {error.cause}")
            return False
        finally:
            register.under_way = set()
        register.acknowledge(number)
        return True

    def _check(self, when: str) -> None:
        """Compare what the hypervisor goes by with what was acknowledged."""
        if self._keeper.unproven:
            return
        found = self._keeper.current
        states = _states(found)
        for register in (self._own, self._other):
            number = register.found(found)
            if number != register.acknowledged and number not in register.attempted:
                self.world.violated(
                    f"{when} the definition has change {number} of {register.client}, "
                    f"but {register.acknowledged} was acknowledged"
                )
        for device in sorted(self._missing - self._forgiven):
            if states[device] is not ReplicaState.STALE:
                self.world.violated(f"{when} the replica on {device} counts, and has missed writes")

    # What befalls them

    def _fault(self) -> None:
        if self._healed:
            return
        chance = self._chance
        vios = chance.choice(list(self._vioses.values()))
        seconds = chance.choice((0.005, 0.05, 0.5, 3.0, 8.0)) * (0.5 + chance.random())
        faults: list[tuple[str, int, Callable[[], None], Callable[[], None]]] = [
            (f"kill {vios.name}", 4, vios.process.kill, lambda: _start_again(vios)),
            (f"stop {vios.name}", 3, vios.process.stop, vios.process.cont),
            (f"cut {vios.name}", 4, lambda: setattr(vios, "cut", True), lambda: setattr(vios, "cut", False)),
            (f"doubt {vios.name}", 4 if self._crowded else 0, vios.give_up, lambda: None),
            ("promote a copy", 4 if self._crowded else 0, self._promote_now, lambda: None),
            ("kill the hypervisor", 6, self._process.kill, self._restart),
            ("lose the hypervisor's copy", 3, self._lose_copy, lambda: None),
        ]
        (fault,) = chance.choices(faults, [weight for _, weight, _, _ in faults])
        name, _, begin, end = fault
        self.fault_names.append(name)
        self.world.note(f"fault: {name} for {seconds:.3f} s")
        begin()
        self.world.after(seconds, end)

    def _strike(self) -> None:
        """Now and then hit a change itself: somebody is lost while it is stored, and some VIOS for longer."""
        chance = self._chance
        if self._healed or chance.random() > 0.1:
            return
        away, other = chance.sample(list(self._vioses.values()), 2)
        name = f"cut {away.name} off from a change"
        now, then = 0.02 * chance.random() ** 2, 0.02 + 0.04 * chance.random()
        after = self.world.after
        after(now, lambda: setattr(away, "cut", True))
        if self._crowded and self._crowd.random() < 0.5:
            after(now + 0.02 * self._crowd.random(), away.give_up)
        after(chance.choice((then, 3.0)), lambda: setattr(away, "cut", False))
        if chance.random() < 0.7:
            name += " and kill the hypervisor"
            after(then, self._process.kill)
            after(then + 0.1 * chance.random(), self._restart)
        if chance.random() < 0.5:
            name += f", then cut {other.name} off"
            after(then, lambda: setattr(other, "cut", True))
            after(3.0, lambda: setattr(other, "cut", False))
        self.fault_names.append(name)
        self.world.note(f"fault: {name}")

    def _restart(self) -> None:
        if not self._process.alive:
            self._start()

    def _lose_copy(self) -> None:
        """Lose the file together with the process, which would write it anew."""
        self._process.kill()
        self._copy.content.clear()
        self.world.after(0.2, self._restart)

    def _heal(self) -> None:
        self._healed = True
        self.world.note("healed")
        for vios in self._vioses.values():
            vios.cut = False
            vios.process.cont()
            _start_again(vios)
        self._restart()
        self.world.after(2.0, lambda: setattr(self, "_calm", True))

    def _at_rest(self) -> bool:
        return (
            self._calm
            and not self._keeper.unproven
            and self._process.state is ProcessState.RUNNING
            and all(vios.store.current() == self._keeper.current for vios in self._vioses.values())
        )


_SYNC = ReplicaState.IN_SYNC


def _start_again(vios: KeptVios) -> None:
    if not vios.process.alive:
        vios.start()


def _first_definition(names: Sequence[str]) -> Definition:
    """Return one client's definition: a mirror on two devices."""
    definition = Definition()
    for name in names:
        record = ViosRecord(control=f"unix:/{name}", data=(f"unix:/{name}.data",))
        found = [
            rules.FoundDevice(device, f"disk{n}", "dir", f"dir:/d{n}", 1 << 30, tuple(PagingCommand))
            for n, device in enumerate(DEVICES)
            if n == 0 or name != names[0]
        ]
        definition = rules.register_vios(definition, name, record, found)
    definition = rules.add_client(
        definition, CLIENT, memory_bytes=4096, hypervisor="host", redundancy=Redundancy.MIRROR
    )
    definition = rules.add_client(definition, OTHER, memory_bytes=4096, hypervisor="host")
    for client in (CLIENT, OTHER):
        definition = rules.set_limit(definition, client, 1)
    return definition


def _states(definition: Definition) -> dict[str, ReplicaState]:
    return {r.device: r.state for r in definition.clients[CLIENT].volumes[0].replicas}
