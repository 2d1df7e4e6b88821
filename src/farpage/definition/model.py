"""The device interface definition as a document: its records and their types.

Every VIOS stores it. A record never changes in place: the functions of
`farpage.definition.rules` make a new document with the next revision.
"""

from __future__ import annotations

import enum
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from farpage.definition.states import PAGE_BYTES as PAGE_BYTES  # noqa: PLC0414
from farpage.definition.states import Redundancy as Redundancy  # noqa: PLC0414
from farpage.definition.states import ReplicaState as ReplicaState  # noqa: PLC0414

FORMAT_VERSION: Literal[1] = 1

NUMBER_MAX = (1 << 53) - 1
"""Revisions, epochs and sizes stay exact in every JSON reader (RFC 8259, section 6)."""

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
"""Name of a client, volume, device, VIOS or hypervisor; fit for a file name and an NBD export name."""

DeviceId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$")]
"""UUID from the device's label, which tells two VIOS that they see the same device."""


class Record(BaseModel):
    """Base of the definition's records: immutable, without unknown fields."""

    # Each is built when it is first used: processes that clients wait for load this.
    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class ViosRedundancy(enum.StrEnum):
    """Whether a client must be reachable through two VIOS to be activated."""

    REQUIRED = "required"
    IF_POSSIBLE = "if_possible"
    NONE = "none"


class Access(enum.StrEnum):
    """What a grant allows."""

    READ = "read"
    WRITE = "write"
    FILL = "fill"
    """Write pages that are not present yet, and nothing else."""


class MoveState(enum.StrEnum):
    """How far a client's move from one device to another has come."""

    PREPARING = "preparing"
    """The volume on the target may be opened, and nothing is copied yet: the client's running pager may
    still write to the source without the target's VIOS. Who opens the volume anew does so over that VIOS."""
    COPYING = "copying"
    """The client writes to the source through the target's VIOS alone, and pages are copied."""
    RETIRING = "retiring"
    """The target has everything and serves alone; the volume on the source is to be deleted."""


class PagingCommand(enum.StrEnum):
    """Commands that a VIOS accepts for a device's volumes and turns into commands of the device."""

    OPEN = "open"
    PAGE_IN = "page_in"
    PAGE_OUT = "page_out"
    DISCARD = "discard"
    ZERO = "zero"
    FLUSH = "flush"
    QUERY = "query"
    CLOSE = "close"


class ViosRecord(Record):
    """One virtual I/O server and the addresses at which it answers."""

    control: str
    data: tuple[str, ...] = Field(min_length=1)
    lease_seconds: float | None = Field(default=None, gt=0)
    """How long its leases last; None when it was not asked yet."""


class Reach(Record):
    """How one VIOS reaches a device, as that VIOS spells it (`dir:PATH`, `memory:SIZE`)."""

    vios: Name
    spec: str


class DeviceRecord(Record):
    """One paging device; `reached_by` more than one VIOS makes it common, else it is independent."""

    name: Name
    kind: str
    size_bytes: int = Field(gt=0, le=NUMBER_MAX)
    reached_by: tuple[Reach, ...] = Field(min_length=1)
    commands: tuple[PagingCommand, ...]

    @property
    def is_common(self) -> bool:
        """Whether two or more VIOS reach the device."""
        return len(self.reached_by) > 1


class Replica(Record):
    """A copy of a volume on one device."""

    device: DeviceId
    state: ReplicaState


class VolumeRecord(Record):
    """One client's paging space."""

    name: Name
    size_bytes: int = Field(gt=0, le=NUMBER_MAX, multiple_of=PAGE_BYTES)
    replicas: tuple[Replica, ...] = Field(min_length=1)


class Release(Record):
    """Every page of a client is on its devices, and its page table is stored for who adopts it."""

    hypervisor: Name
    """Who released it."""
    epoch: int = Field(ge=1, le=NUMBER_MAX)
    """Under which its pages were written last; the table is tagged with it."""
    digest: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Of the table, which is a `farpage.handover`; any other is an older one, or damaged."""
    adopter: str = Field(default="", pattern=r"^([a-z0-9][a-z0-9._-]{0,62})?$")
    """The hypervisor that may attach it; empty while anybody may adopt it."""


class ClientRecord(Record):
    """One virtual client: what it has, who owns it and since which epoch."""

    memory_bytes: int = Field(gt=0, le=NUMBER_MAX, multiple_of=PAGE_BYTES)
    entitlement_bytes: int = Field(default=0, ge=0)
    weight: int = Field(default=128, ge=0, le=255)
    limit_bytes: int | None = Field(default=None, gt=0)
    """Most memory that the client's pages take; None for no limit but the pool's."""
    hypervisor: Name
    epoch: int = Field(default=1, ge=1, le=NUMBER_MAX)
    owner: str = Field(default="", pattern=r"^([0-9a-f]{16})?$")
    """Token of the claim that the epoch belongs to; empty for a client that nobody has claimed yet."""
    redundancy: Redundancy = Redundancy.PATH
    vios_redundancy: ViosRedundancy = ViosRedundancy.IF_POSSIBLE
    volumes: tuple[VolumeRecord, ...] = Field(min_length=1)
    released: Release | None = None
    """None for a client that somebody has, or that has no content."""


class Grant(Record):
    """Leave for a principal to use a volume, on one device or wherever it is."""

    principal: str
    volume: Name
    access: Access
    device: DeviceId | None = None
    """None for every device."""


class Move(Record):
    """A client's volume on its way from one device to another, while the client goes on using it.

    The source is what the intermediate client reads, through `source_vios`; the target is what
    it fills, through `target_vios`, the one VIOS that the client uses meanwhile.
    """

    volume: Name
    source: DeviceId
    target: DeviceId
    source_vios: Name
    target_vios: Name
    principal: str = Field(pattern=r"^[0-9a-f]{16}$")
    """The intermediate client: its name in the grants, and the token by which it is let in."""
    state: MoveState
    paused: bool = False
    bandwidth_bytes: int | None = Field(default=None, gt=0, le=NUMBER_MAX)
    """Most that is copied in a second; None for as much as the client leaves."""


class Definition(Record):
    """The whole document. Revision 0 is the empty definition that a new VIOS starts with."""

    format: Literal[1] = FORMAT_VERSION
    revision: int = Field(default=0, ge=0, le=NUMBER_MAX)
    promoted_ms: int = Field(default=0, ge=0, le=NUMBER_MAX)
    """When an operator made a copy the newest, in milliseconds since 1970; 0 for never. The latest counts."""
    vioses: dict[Name, ViosRecord] = Field(default_factory=dict)
    devices: dict[DeviceId, DeviceRecord] = Field(default_factory=dict)
    clients: dict[Name, ClientRecord] = Field(default_factory=dict)
    grants: tuple[Grant, ...] = ()
    moves: dict[Name, Move] = Field(default_factory=dict)
    """By client."""
