"""Documents of the hypervisor's control API about clients that move to other devices."""

from __future__ import annotations

import enum

from pydantic import Field

from farpage.definition.model import NUMBER_MAX, Name
from farpage.hypervisor.model import Document


class MoveKind(enum.StrEnum):
    """Who copies."""

    DIRECT = "direct"
    """The client's data worker, as when a device is replaced: the hypervisor reaches both devices."""
    INDIRECT = "indirect"
    """An intermediate client, while the client uses the target's VIOS alone."""


class MoveStage(enum.StrEnum):
    """How far a client is."""

    WAITING = "waiting"
    """For another request about it, for its turn, or for a VIOS."""
    PREPARING = "preparing"
    """Its pager is about to go over to the target's VIOS."""
    COPYING = "copying"
    PAUSED = "paused"
    RETIRING = "retiring"
    """Everything is on the target; what is left on the source is being deleted."""
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"


ENDED = (MoveStage.DONE, MoveStage.FAILED, MoveStage.CANCELLED)


class ClientMove(Document):
    """`POST /v1/clients/{name}/move`: bring the volume to another device while the client runs."""

    to: str = Field(max_length=63)
    """Name or identifier of the device."""
    indirect: bool = False
    """By an intermediate client, also where the hypervisor reaches both devices itself."""
    bandwidth_bytes: int | None = Field(default=None, gt=0, le=NUMBER_MAX)
    """Most that an intermediate client copies in a second; None for as much as the client leaves."""


class MoveAdjust(Document):
    """`PATCH /v1/clients/{name}/move`: what is not given stays as it is."""

    paused: bool | None = None
    bandwidth_bytes: int | None = Field(default=None, gt=0, le=NUMBER_MAX)
    unlimited: bool = False
    """Without a bandwidth from now on."""


class IntermediaryInfo(Document):
    """The intermediate client of a move."""

    running_here: bool
    """Started by this hypervisor."""
    seen_seconds_ago: float | None
    """Since the target's VIOS last heard of it; None if never."""
    relay: str = ""
    connected: bool = False
    """The target's VIOS has a connection over it."""
    problem: str = ""
    command: str = ""
    """Starts one by hand, where this hypervisor does not."""


class MoveInfo(Document):
    """`GET /v1/clients/{name}/move`: one client on its way, or at its end; devices by name."""

    client: Name
    kind: MoveKind
    source: str
    target: str
    source_vios: str = ""
    target_vios: str = ""
    stage: MoveStage
    problem: str = ""
    paused: bool = False
    bandwidth_bytes: int | None = None
    total_pages: int = 0
    present_pages: int = 0
    """What the target has."""
    rate_bytes: float = 0.0
    """Copied a second."""
    eta_seconds: float | None = None
    waiting_commands: int = 0
    """Commands of the client that wait for the intermediate client."""
    relayed_reads: int = 0
    kept_pages: int = 0
    filled_pages: int = 0
    intermediary: IntermediaryInfo | None = None


class EvacuationStart(Document):
    """`POST /v1/devices/{device}/evacuate`, `POST /v1/vioses/{name}/evacuate`."""

    at_a_time: int = Field(default=1, ge=1, le=64)
    """So many clients are moved beside each other."""
    indirect: bool = False
    bandwidth_bytes: int | None = Field(default=None, gt=0, le=NUMBER_MAX)


class Evacuation(Document):
    """All clients of a device or a VIOS on their way to other devices."""

    what: str
    """`device NAME` or `vios NAME`."""
    done: bool
    clients: tuple[MoveInfo, ...]
    staying: tuple[Name, ...] = ()
    """Clients that another VIOS reaches where they are."""
