"""Which way leads from a client to a location: decided from the definition alone. No I/O.

A location is a paging device. The client has direct access to it when a VIOS that its hypervisor reaches also
reaches the device, and the client's volume is there or on another device that is reached likewise. Otherwise
a second device is located, one that holds the volume in sync: the client uses the first device over
the first VIOS, and an intermediate client brings what is not there yet from the second device over the
second VIOS. Where the data is out of reach and no first device is named, the one that fits best is taken.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import TypeAlias

from farpage.address import TcpAddress, parse_address
from farpage.definition import rules
from farpage.definition.errors import NoDeviceFits
from farpage.definition.model import (
    ClientRecord,
    Definition,
    MoveState,
    Redundancy,
    ReplicaState,
    ViosRecord,
)
from farpage.definition.moving import Route, in_the_way, why_unfit
from farpage.definition.placement import Wish, choose_devices
from farpage.definition.rules import VolumePath


@dataclass(frozen=True)
class Edge:
    """A VIOS that reaches a device, and why this way was taken or not."""

    vios: str
    device: str
    taken: bool
    why: str


class Place(enum.StrEnum):
    """Where an intermediate client can run, judged from the addresses of the two VIOS."""

    HYPERVISOR = "hypervisor"
    """On the hypervisor's host: it reaches both VIOS itself."""
    ANYWHERE = "anywhere"
    """On any host that reaches both over TCP."""
    VIOS_HOST = "vios_host"
    """On the host of those VIOS that answer on UNIX sockets alone."""


@dataclass(frozen=True)
class Standing:
    """Where an intermediate client can run; `vioses` are those whose host it must be, with VIOS_HOST."""

    place: Place
    vioses: tuple[str, ...] = ()

    def __str__(self) -> str:
        match self.place:
            case Place.HYPERVISOR:
                return "on the hypervisor's host, which reaches both VIOS"
            case Place.ANYWHERE:
                return "on any host that reaches both VIOS over TCP"
        if len(self.vioses) == 1:
            return f"on the host of VIOS {self.vioses[0]}, which answers on UNIX sockets alone"
        return f"on the one host of VIOS {' and '.join(self.vioses)}, which answer on UNIX sockets alone"


@dataclass(frozen=True)
class Direct:
    """The hypervisor reaches the volume itself, in the definition's order of VIOS.

    `paths` lead to the volume, on `source` where it is not on `device` yet.
    """

    device: str
    paths: tuple[VolumePath, ...]
    edges: tuple[Edge, ...] = ()
    source: str = ""


@dataclass(frozen=True)
class Indirect:
    """The client uses the first device, and an intermediate client brings the volume from the second."""

    first_device: str
    first_vios: str
    second_device: str
    second_vios: str
    standing: Standing
    edges: tuple[Edge, ...] = ()
    under_way: bool = False
    """The client is being moved this way already."""

    @property
    def route(self) -> Route:
        """The move that it takes."""
        return Route(self.second_device, self.second_vios, self.first_device, self.first_vios)


@dataclass(frozen=True)
class Unreachable:
    """There is no way, with everything that is missing for one."""

    device: str
    reasons: tuple[str, ...]
    edges: tuple[Edge, ...] = ()


Decision: TypeAlias = Direct | Indirect | Unreachable


@dataclass(frozen=True)
class Viewpoint:
    """Where a decision is made: the VIOS that the hypervisor reaches, and what it knows of their devices.

    `provisioned_bytes` says by device identifier what the VIOS report as given away.
    """

    reached_vioses: AbstractSet[str]
    provisioned_bytes: Mapping[str, int] = field(default_factory=dict)


def resolve(
    definition: Definition, client: str, device: str, view: Viewpoint, *, indirect: bool = False
) -> Decision:
    """Decide how a client gets at its volume on `device`, or gets it there; by the device's identifier.

    With an empty `device` it is the volume that counts, wherever it is. With `indirect` direct access is no
    way, so that a second device is located although there is one.

    :raise ClientMissing: there is no such client.
    """
    return _Resolving(definition, client, view).resolve(device, indirect=indirect)


class _Resolving:
    def __init__(self, definition: Definition, name: str, view: Viewpoint) -> None:
        self._definition = definition
        self._name = name
        self._view = view
        self._client: ClientRecord = rules.client_of(definition, name)
        self._states = {r.device: r.state for v in self._client.volumes for r in v.replicas}
        self._in_sync = [device for device, state in self._states.items() if state is ReplicaState.IN_SYNC]

    def resolve(self, device: str, *, indirect: bool) -> Decision:
        if device and device not in self._definition.devices:
            return Unreachable(device, (f"device {device} is not in the definition",))
        move = self._definition.moves.get(self._name)
        if move is not None and move.state is not MoveState.RETIRING and device in ("", move.target):
            return self._under_way()
        wanted = [device] if device else self._in_sync
        if not indirect:
            for holder in wanted:
                if direct := self._direct(holder):
                    return direct
        if device and device not in self._in_sync:
            return self._to(device)
        if device and self._reached(device):
            return self._unreachable(device, ["the volume is on it already, and nothing is to be copied"])
        return self._from(device or (self._in_sync or [""])[0])

    # Direct

    def _direct(self, device: str) -> Direct | None:
        """Return direct access to a device with the volume, or to both ends of a copy."""
        state = self._states.get(device)
        if state is ReplicaState.IN_SYNC or state in (ReplicaState.STALE, ReplicaState.COPYING):
            paths = self._paths(device)
            return Direct(device, paths, self._direct_edges(device)) if paths else None
        if not self._reached(device) or self._unfit(device):
            return None
        for source in self._in_sync:
            if paths := self._paths(source):
                return Direct(device, paths, self._direct_edges(device, source), source)
        return None

    def _paths(self, device: str) -> tuple[VolumePath, ...]:
        return tuple(
            path
            for path in rules.paths(self._definition, self._name)
            if path.device == device and path.vios in self._view.reached_vioses
        )

    # Indirect

    def _to(self, device: str) -> Decision:
        """Bring the volume to a device where it is not."""
        reasons = []
        if not self._reached(device):
            reasons.append(self._out_of_reach(device))
        if not self._in_sync:
            reasons.append("no device holds the volume in sync")
        reasons += self._in_the_way(device)
        if reasons:
            return self._unreachable(device, reasons)
        return self._route(device, self._in_sync[0])

    def _from(self, device: str) -> Decision:
        """Find a first device for a volume on a device that is out of reach."""
        if not device:
            return Unreachable(device, ("no device holds the volume in sync",), self._edges({}, {}))
        if others := [other for other in self._in_sync if other != device and self._reached(other)]:
            also = ", ".join(self._device(other) for other in others)
            return self._unreachable(device, [self._out_of_reach(device), f"{also} holds the volume too"])
        problems = [] if not self._in_sync[1:] else ["a client with more than one replica is not moved"]
        try:
            first = self._fitting()
        except NoDeviceFits as error:
            problems.append(f"no device in reach can take the volume: {error.reasons}")
        if problems:
            return self._unreachable(device, [self._out_of_reach(device), *problems])
        return self._route(first, device)

    def _fitting(self) -> str:
        """Choose among the devices that the hypervisor reaches, as for a new client.

        :raise NoDeviceFits: saying for each device why not.
        """
        devices = {
            identifier: record.model_copy(
                update={
                    "reached_by": tuple(r for r in record.reached_by if r.vios in self._view.reached_vioses)
                }
            )
            for identifier, record in self._definition.devices.items()
            if self._reached(identifier) and identifier not in self._states
        }
        wish = Wish(
            self._name,
            sum(volume.size_bytes for volume in self._client.volumes),
            Redundancy.PATH if self._client.redundancy is Redundancy.MIRROR else self._client.redundancy,
            self._client.vios_redundancy,
            self._view.provisioned_bytes,
        )
        (chosen,) = choose_devices(self._definition.model_copy(update={"devices": devices}), wish)
        return chosen

    def _route(self, first: str, second: str) -> Indirect:
        """Choose the two VIOS: an intermediate client should have as few wishes as possible."""
        firsts = [vios for vios in self._reaching(first) if vios in self._view.reached_vioses]
        seconds = self._reaching(second)
        ways = [(self._standing(one, two), one, two) for one, two in itertools.product(firsts, seconds)]
        ranks = list(Place)
        standing, one, two = min(
            ways, key=lambda way: (ranks.index(way[0].place), len(way[0].vioses), way[1] == way[2])
        )
        taken = {(one, first): "first", (two, second): "second"}
        return Indirect(first, one, second, two, standing, self._indirect_edges(taken, standing))

    def _under_way(self) -> Decision:
        move = self._definition.moves[self._name]
        if move.target_vios not in self._view.reached_vioses:
            reason = (
                f"it is being moved over VIOS {move.target_vios}, and the hypervisor reaches {self._known()}"
            )
            return self._unreachable(move.target, [reason])
        standing = self._standing(move.target_vios, move.source_vios)
        taken = {(move.target_vios, move.target): "first", (move.source_vios, move.source): "second"}
        return Indirect(
            move.target,
            move.target_vios,
            move.source,
            move.source_vios,
            standing,
            self._indirect_edges(taken, standing),
            under_way=True,
        )

    def _standing(self, first_vios: str, second_vios: str) -> Standing:
        both = (first_vios, second_vios)
        if all(vios in self._view.reached_vioses for vios in both):
            return Standing(Place.HYPERVISOR)
        local = [vios for vios in dict.fromkeys(both) if not _answers_on_tcp(self._definition.vioses[vios])]
        return Standing(Place.VIOS_HOST, tuple(local)) if local else Standing(Place.ANYWHERE)

    # Reasons

    def _in_the_way(self, device: str) -> tuple[str, ...]:
        """Say why the volume cannot be moved to a device, beside that it is out of reach."""
        if not self._in_sync:
            return ()
        source = self._in_sync[0]
        route = Route(source, self._reaching(source)[0], device, self._reaching(device)[0])
        return in_the_way(self._definition, self._name, route, self._view.provisioned_bytes.get(device, 0))

    def _unfit(self, device: str) -> bool:
        provisioned_bytes = self._view.provisioned_bytes.get(device, 0)
        return any(why_unfit(self._definition, self._client, device, provisioned_bytes))

    def _unreachable(self, device: str, reasons: Iterable[str]) -> Unreachable:
        return Unreachable(device, tuple(reasons), self._edges({}, {}))

    def _out_of_reach(self, device: str) -> str:
        reaching = ", ".join(self._reaching(device))
        name = self._device(device)
        return f"device {name} is reached by VIOS {reaching}; the hypervisor reaches {self._known()}"

    # Edges

    def _direct_edges(self, device: str, source: str = "") -> tuple[Edge, ...]:
        taken = {}
        for vios in self._reaching(device):
            if vios in self._view.reached_vioses:
                what = "takes the volume" if source else "serves the volume"
                taken[vios, device] = f"the hypervisor reaches VIOS {vios}, which {what} there"
        for vios in self._reaching(source) if source else ():
            if vios in self._view.reached_vioses:
                taken[vios, source] = f"the hypervisor reaches VIOS {vios}, where the volume is now"
        return self._edges(taken, {})

    def _indirect_edges(self, roles: Mapping[tuple[str, str], str], standing: Standing) -> tuple[Edge, ...]:
        taken, instead = {}, {}
        for (vios, device), role in roles.items():
            if role == "first":
                taken[vios, device] = "first VIOS and first device: the hypervisor reaches them"
            else:
                taken[vios, device] = (
                    "second VIOS and second device: the volume is there in sync; an intermediate client can "
                    f"run {standing}"
                )
            instead[device] = vios
        return self._edges(taken, instead)

    def _edges(self, taken: Mapping[tuple[str, str], str], instead: Mapping[str, str]) -> tuple[Edge, ...]:
        """Say of every VIOS and device that it reaches why this way is taken or not.

        `instead` names the VIOS that was preferred for a device.
        """
        edges = []
        for device in sorted(self._definition.devices, key=self._device):
            for vios in self._reaching(device):
                why = taken.get((vios, device))
                edges.append(
                    Edge(vios, device, why is not None, why or self._not_taken(vios, device, instead))
                )
        return tuple(edges)

    def _not_taken(self, vios: str, device: str, instead: Mapping[str, str]) -> str:
        reached = vios in self._view.reached_vioses
        state = self._states.get(device)
        if device in instead:
            if not reached and state is not ReplicaState.IN_SYNC:
                return f"the hypervisor does not reach VIOS {vios}"
            return f"VIOS {instead[device]} is used for this device meanwhile"
        where = "" if reached else f"; the hypervisor does not reach VIOS {vios}"
        if state is not None:
            return f"the volume's replica on {self._device(device)} is {state}{where}"
        problems = self._in_the_way(device)
        what = "; ".join(problems) or "it could be moved there; another device was asked for, or fits better"
        return f"the volume is not on {self._device(device)}: {what}{where}"

    # The definition

    def _reaching(self, device: str) -> list[str]:
        return [reach.vios for reach in self._definition.devices[device].reached_by]

    def _reached(self, device: str) -> bool:
        return not self._view.reached_vioses.isdisjoint(self._reaching(device))

    def _device(self, identifier: str) -> str:
        return self._definition.devices[identifier].name

    def _known(self) -> str:
        return ", ".join(sorted(self._view.reached_vioses)) or "none"


def _answers_on_tcp(vios: ViosRecord) -> bool:
    """Tell whether other hosts reach both its control API and its data."""
    return isinstance(parse_address(vios.control), TcpAddress) and any(_tcp(vios.data))


def _tcp(addresses: Iterable[str]) -> Iterator[bool]:
    for address in addresses:
        yield isinstance(parse_address(address), TcpAddress)
