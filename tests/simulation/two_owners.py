"""Two hypervisors that both believe they own a client: the second claims it while the first lives.

The first may be slow, stopped, killed, or cut off from the VIOS at which the second claims the client. Its
guest is lost, by the operator's wish: the second's begins with nothing paged out. From then on whatever the
second is told to be written must stay; the first must be cut off, and never come back by itself. Both may be
cut off where the first, not knowing of the second, comes to its epoch at a VIOS that does not know either.
Then the operator claims the client once more, and that owner must be let in and stay.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from farpage.definition.model import ClientRecord, Definition, VolumeRecord
from farpage.device.claim import Claim
from tests.simulation.checker import History
from tests.simulation.definition import SimulatedDefinition
from tests.simulation.owner import Owner
from tests.simulation.scenario import FAULTY_SECONDS, SETTLE_SECONDS, Scenario
from tests.simulation.users import PagerUser
from tests.simulation.vios import SimulatedVios
from tests.simulation.world import ProcessState, World

CLAIMS_MAX = 4


class TwoOwners(Scenario):
    """A client, and a hypervisor on another host that claims it; perhaps the first claims it back."""

    hosts = ("host1", "host2")

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.before: list[Owner] = []
        """Those whose claims others have replaced."""
        self._claims = 1
        self._some_unaware = False
        """A claim may not have come to a VIOS or a disk: the owner before may come to its epoch there."""
        self._enter(self.owner)

    def histories(self) -> Iterable[History]:
        # What an owner reads after another one has claimed the client is nobody's business.
        return [self.owner.user.history]

    def crash_worker(self) -> None:
        self._chance.choice([self.owner, *self.before]).crash()

    def _begin(self) -> None:
        for _ in range(self._chance.choice((1, 1, 2))):
            self.world.after(self._chance.random() * (FAULTY_SECONDS - 2), self._claim)

    def _enter(self, owner: Owner) -> None:
        """Have the epochs that an owner comes to entered in the definition a little later."""
        owner.on_epoch = lambda epoch: self.world.after(
            0.01 + 0.1 * self._chance.random(), lambda: self._define(owner, epoch)
        )

    # Claiming

    def _claim(self, host: str = "", *, anew: bool = False) -> None:
        """Claim the client at a host, by default another one than the owner's, as soon as a VIOS answers.

        With `anew` the owner works although everything is healed.
        """
        if self._claims >= CLAIMS_MAX and not anew:
            return
        host = host or next(other for other in self.hosts if other != self.owner.host)
        known = self._known_epoch(host)
        if known is None:
            self.world.after(0.5, lambda: self._claim(host))
            return
        self._claims += 1
        first = self.owner
        user = self._user(isinstance(first.user, PagerUser), self._claims)
        if self.faults.healed and not anew:
            user.stop()
        definition = SimulatedDefinition(
            self.world, [disk.name for disk in self.place.disks], lambda: self._known_epoch(host) is not None
        )
        definition.on_attempt = self._crash_while_recording
        owner = Owner(self.place, user, definition, self._chance, number=self._claims, host=host)
        owner.on_refused = partial(self._refused, owner)
        if isinstance(first.user, PagerUser):
            first.user.guest.may_be_lost.update(range(first.user.pages))
        self.world.after(self._chance.choice((0.0, 2.0, 20.0)), first.user.stop)
        first.definition.on_attempt = lambda: None
        first.definition.refuses = self._claim_is_seen
        self.before.append(first)
        self.owner = owner
        self.world.note(f"{host} claims the client at epoch {known + 1}")
        self._some_unaware |= len(self._reached(host)) < len(self.vioses)
        self._some_unaware |= any(disk.hung or disk.failing for disk in self.place.disks)
        self._define(owner, known + 1, claims=True)
        self._enter(owner)
        owner.open(known + 1)

    def _refused(self, owner: Owner) -> None:
        """Let the operator claim the client again where somebody else was at the same epoch first."""
        if owner is not self.owner:
            return
        if self._claims >= CLAIMS_MAX:
            self.world.violated("claim after claim is refused")
        self.world.after(0.1, lambda: self._claim(owner.host))

    def _reached(self, host: str) -> list[SimulatedVios]:
        blocked = self.place.network.blocked
        return [
            vios
            for vios in self.vioses
            if vios.process.state is ProcessState.RUNNING
            and not {(host, vios.name), (vios.name, host)} & blocked
        ]

    def _known_epoch(self, host: str) -> int | None:
        """Return the highest epoch that the VIOS know which a host reaches; None when it reaches none.

        They know it from the volumes and from the definition.
        """
        known = [
            max([self._defined(vios).epoch, *(d.volumes["vm1"].claims.current.epoch for d in vios.disks)])
            for vios in self._reached(host)
        ]
        return max(known, default=None)

    def _defined(self, vios: SimulatedVios) -> Claim:
        """Return the client's epoch and owner in the definition that a VIOS stores."""
        record = vios.defined.clients.get("vm1")
        first, *_ = (*self.before, self.owner)
        return Claim(record.epoch, record.owner) if record else Claim(1, first.token)

    def _define(self, owner: Owner, epoch: int, *, claims: bool = False) -> None:
        """Enter an owner's epoch in the definition at every VIOS that its host reaches."""
        for vios in self._reached(owner.host):
            now = self._defined(vios)
            if epoch > now.epoch and (claims or owner.token == now.owner):
                volume = VolumeRecord.model_construct(name="vm1", replicas=())
                record = ClientRecord.model_construct(epoch=epoch, owner=owner.token, volumes=(volume,))
                vios.define(Definition().model_copy(update={"clients": {"vm1": record}}))

    def _claim_is_seen(self) -> bool:
        """Tell whether a VIOS answers at both hosts, so that the first hears whose the client is."""
        return all(self._known_epoch(host) is not None for host in self.hosts)

    # The end

    def _claim_anew(self) -> None:
        """End it that two owners have cut each other off."""
        world = self.world
        if not self._some_unaware:
            world.violated("the owner by the latest claim is fenced")
            return
        world.note("the owner by the latest claim is fenced: the client is claimed anew")
        self._some_unaware = False
        self._claim(anew=True)
        self._quiet(lambda: self.owner.opened, "the owner of a client that was claimed anew does not get in")
        world.run_until(world.now_seconds + SETTLE_SECONDS)
        self.owner.user.stop()
        if self.owner.ownership.fenced:
            world.violated("the owner of a client that was claimed anew is fenced")

    def _finish(self) -> None:
        for owner in self.before:
            owner.user.stop()
        if self._quiet(lambda: bool(self.owner.opened or self.owner.ownership.fenced), "nobody gets in"):
            if self.owner.ownership.fenced:
                self._claim_anew()
            if not self.world.violations:
                super()._finish()
        world = self.world
        world.run_until(world.now_seconds + SETTLE_SECONDS)
        let_in = [owner.token for owner in (*self.before, self.owner) if not owner.ownership.fenced]
        if len(let_in) > 1:
            world.violated(f"more than one owner is not fenced: {', '.join(let_in)}")
