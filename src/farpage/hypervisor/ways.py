"""Why a client gets at its volume the way it does, put into words for users. No I/O."""

from __future__ import annotations

import enum
from typing import Any

from farpage.definition import rules
from farpage.definition.model import Definition, Name
from farpage.definition.replacing import device_named
from farpage.hypervisor.model import Document
from farpage.volume.resolve import Decision, Direct, Indirect, Place, Unreachable, Viewpoint, resolve


class Way(enum.StrEnum):
    """What a decision comes to."""

    DIRECT = "direct"
    INDIRECT = "indirect"
    UNREACHABLE = "unreachable"


class WayEdge(Document):
    """A VIOS that reaches a device: whether this way is taken, and why or why not."""

    vios: Name
    device: str
    taken: bool
    why: str


class IntermediatePlace(Document):
    """Where an intermediate client can run."""

    place: Place
    where: str


class PathExplanation(Document):
    """`GET /v1/paths/explain`: how a client gets at its volume, or gets it to a device, and why.

    Devices are given by name. The client uses the first device, over the first VIOSes; the second device
    is where the volume is, when that is another one.
    """

    client: Name
    to: str
    """The device that was asked for; empty for wherever the volume is."""
    way: Way
    summary: str
    reasons: tuple[str, ...] = ()
    """What is missing for a way."""
    first_device: str = ""
    first_vioses: tuple[str, ...] = ()
    second_device: str = ""
    second_vioses: tuple[str, ...] = ()
    intermediate: IntermediatePlace | None = None
    under_way: bool = False
    """The client is being moved this way."""
    edges: tuple[WayEdge, ...]


def explain(definition: Definition, client: str, to: str, view: Viewpoint) -> PathExplanation:
    """Explain how a client gets at its volume; `to` is a device's name or identifier, or empty.

    :raise ClientMissing: there is no such client.
    :raise DeviceMissing: there is no such device.
    """
    device = device_named(definition, to) if to else ""
    decision = resolve(definition, client, device, view)
    names = {identifier: record.name for identifier, record in definition.devices.items()}
    return PathExplanation(
        client=client,
        to=names.get(device, ""),
        edges=tuple(
            WayEdge(vios=edge.vios, device=names[edge.device], taken=edge.taken, why=edge.why)
            for edge in decision.edges
        ),
        **_decided(definition, client, names, decision),
    )


def _decided(
    definition: Definition, client: str, names: dict[str, str], decision: Decision
) -> dict[str, Any]:
    match decision:
        case Unreachable():
            return {
                "way": Way.UNREACHABLE,
                "summary": "no way: " + "; ".join(decision.reasons),
                "reasons": decision.reasons,
            }
        case Direct():
            return _direct(definition, client, names, decision)
        case Indirect():
            return _indirect(names, decision)


def _direct(definition: Definition, client: str, names: dict[str, str], decision: Direct) -> dict[str, Any]:
    over = tuple(path.vios for path in decision.paths)
    device, source = names[decision.device], names.get(decision.source, "")
    shown: dict[str, Any] = {"way": Way.DIRECT, "first_device": device, "first_vioses": over}
    if not source:
        state = next(p.replica for p in rules.paths(definition, client) if p.device == decision.device)
        shown["summary"] = (
            f"direct access to device {device}, whose replica is {state}, over VIOS {', '.join(over)}"
        )
        return shown
    return shown | {
        "summary": f"direct access to the volume on device {source}, over VIOS {', '.join(over)}, and to "
        f"device {device}: the hypervisor can copy it there itself",
        "first_vioses": tuple(e.vios for e in decision.edges if e.taken and e.device == decision.device),
        "second_device": source,
        "second_vioses": over,
    }


def _indirect(names: dict[str, str], decision: Indirect) -> dict[str, Any]:
    first, second = names[decision.first_device], names[decision.second_device]
    doing = "is being moved" if decision.under_way else "can be moved"
    return {
        "way": Way.INDIRECT,
        "summary": f"indirect access: the volume is on device {second}, reached over VIOS "
        f"{decision.second_vios}, and {doing} to device {first} over VIOS {decision.first_vios} by an "
        f"intermediate client {decision.standing}",
        "first_device": first,
        "first_vioses": (decision.first_vios,),
        "second_device": second,
        "second_vioses": (decision.second_vios,),
        "intermediate": IntermediatePlace(place=decision.standing.place, where=str(decision.standing)),
        "under_way": decision.under_way,
    }
