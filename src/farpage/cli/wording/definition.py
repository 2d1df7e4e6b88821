"""Words for the device interface definition."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from farpage.cli.output import table
from farpage.terminal.sizes import format_size

if TYPE_CHECKING:
    from rich.console import RenderableType

    from farpage.definition.model import Definition
    from farpage.embedded.model import DefinitionVerification
    from farpage.hypervisor.model import DefinitionPromotion


def details(definition: Definition) -> Iterator[RenderableType]:
    """Return the whole document as tables."""
    yield f"revision {definition.revision}, format {definition.format}"
    yield ""
    yield table(
        ["vios", "control", "data"],
        ((name, vios.control, ", ".join(vios.data)) for name, vios in definition.vioses.items()),
    )
    yield ""
    yield table(
        ["device", "kind", "size", "reached by", "access", "id"],
        (
            (
                device.name,
                device.kind,
                format_size(device.size_bytes),
                ", ".join(f"{reach.vios} ({reach.spec})" for reach in device.reached_by),
                "common" if device.is_common else "independent",
                device_id,
            )
            for device_id, device in definition.devices.items()
        ),
    )
    if definition.clients:
        yield ""
        yield table(
            ["client", "memory", "hypervisor", "epoch", "redundancy", "volume", "replicas"],
            (
                (
                    name,
                    format_size(client.memory_bytes),
                    client.hypervisor,
                    str(client.epoch),
                    str(client.redundancy),
                    volume.name,
                    ", ".join(f"{replica.device} {replica.state}" for replica in volume.replicas),
                )
                for name, client in definition.clients.items()
                for volume in client.volumes
            ),
        )
    if definition.grants:
        yield ""
        yield table(
            ["principal", "volume", "access"],
            ((grant.principal, grant.volume, str(grant.access)) for grant in definition.grants),
        )


def verification(found: DefinitionVerification) -> Iterator[RenderableType]:
    """Return who has which copy, and what is not as it should be."""
    yield table(
        ["copy", "state", "revision", "epochs", "problem"],
        (
            (
                copy.holder,
                str(copy.state),
                "-" if copy.revision is None else str(copy.revision),
                ", ".join(f"{client}: {epoch}" for client, epoch in copy.epochs.items()) or "-",
                copy.problem or "-",
            )
            for copy in found.copies
        ),
    )
    for copy in found.copies:
        for line in copy.differences:
            yield f"{copy.holder} {copy.state}: {line}"
    yield from found.unmet_wishes
    yield from found.problems
    if found.sound:
        yield "all is well"


def promotion(answer: DefinitionPromotion) -> Iterator[str]:
    """Say what promoting a copy has done, or would do."""
    now = "is followed now" if answer.done else "would be followed"
    yield f"the copy of VIOS {answer.vios} at revision {answer.copy_revision} {now}, as {answer.revision}"
    yield "changes compared with the newest copy that is known:" if answer.lost else "no known change is lost"
    yield from (f"  {line}" for line in answer.lost)
    for vios, problem in answer.missing.items():
        yield f"changes that only VIOS {vios} has are lost: {problem}"
    if answer.at_risk:
        yield f"a mark that a replica is stale may be missing for: {', '.join(answer.at_risk)}"
    if not answer.done:
        yield "nothing was changed; do it with --force"
