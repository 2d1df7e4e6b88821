"""Documents of the VIOS control API."""

from __future__ import annotations

import enum

from pydantic import BaseModel, ConfigDict, Field

from farpage.api.model import ErrorAnswer, ErrorBody
from farpage.definition.model import NUMBER_MAX, PAGE_BYTES, DeviceId, Name, PagingCommand
from farpage.device.spec import Allocate

__all__ = [
    "CopyOrders",
    "CopyState",
    "CopyStatus",
    "DeviceAdd",
    "DeviceInfo",
    "ErrorAnswer",
    "ErrorBody",
    "HandoverInfo",
    "Health",
    "IntermediaryReport",
    "VolumeCreate",
    "VolumeInfo",
    "VolumeOpen",
]


class Document(BaseModel):
    """Base of the API's documents."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)


class Health(Document):
    """`GET /v1/health`."""

    vios: Name
    version: str
    pid: int
    uptime_seconds: float
    definition_revision: int
    data: tuple[str, ...]
    devices: int
    open_exports: int
    lease_seconds: float
    """So long after a hypervisor's worker was last heard of are its writes carried out."""
    leases: int
    """Workers that keep a lease here now."""
    data_processes: tuple[int, ...] = ()
    """The processes that serve volumes; none where the VIOS does so by itself."""


class DeviceInfo(Document):
    """`GET /v1/devices`: a device as this VIOS reaches it."""

    id: DeviceId
    name: Name
    kind: str
    spec: str
    access: str
    """How the storage is read and written: `direct`, `buffered`, or what it came to."""
    allocate: Allocate = Allocate.SPARSE
    """When the storage allocates the blocks of a new volume: as they are written, or all of them at once."""
    size_bytes: int
    provisioned_bytes: int | None
    """None, as the two below, while the device does not answer."""
    used_bytes: int | None
    volumes: int | None
    commands: tuple[PagingCommand, ...]


class DeviceAdd(Document):
    """`POST /v1/devices`: start to serve a device; labels it when it has no label yet."""

    spec: str
    name: Name | None = None
    size_bytes: int | None = Field(default=None, gt=0, le=NUMBER_MAX)
    force: bool = False


class VolumeInfo(Document):
    """`GET /v1/volumes`."""

    name: Name
    device: DeviceId
    size_bytes: int
    used_bytes: int
    epoch: int
    owner: str = ""
    """Token of the claim that the epoch belongs to; empty where the owner gave none."""
    open_connections: int


class VolumeCreate(Document):
    """`POST /v1/volumes`."""

    name: Name
    device: DeviceId
    size_bytes: int = Field(gt=0, le=NUMBER_MAX, multiple_of=PAGE_BYTES)


class VolumeOpen(Document):
    """`POST /v1/volumes/{name}/open`: claim the volume at `epoch`, for the owner with this token.

    The answer comes when no command of an older epoch can reach the device any more.
    """

    epoch: int = Field(ge=1, le=NUMBER_MAX)
    owner: str = Field(default="", pattern=r"^([0-9a-f]{16})?$")


class HandoverInfo(Document):
    """`PUT /v1/volumes/{name}/handover`: what is stored of a released client's page table."""

    volume: Name
    device: DeviceId
    epoch: int
    """Under which the pages were written last."""
    pages: int
    on_device_pages: int
    digest: str


class CopyState(enum.StrEnum):
    """What an intermediate client is to do."""

    COPYING = "copying"
    PAUSED = "paused"
    """Relay, and copy nothing: as was asked for, or because pages may not be copied yet."""
    RETIRING = "retiring"
    """The target has everything and serves alone: delete the volume on the source."""
    GONE = "gone"
    """There is no such move any more."""


class IntermediaryReport(Document):
    """`PUT /v1/volumes/{name}/intermediary?device=`: an intermediate client at work, twice a second."""

    principal: str = Field(pattern=r"^[0-9a-f]{16}$")
    relay: str
    """Address of its relay."""
    read_bytes: int = Field(ge=0)
    """Read at the source to be copied, since this intermediate client started."""
    written_bytes: int = Field(ge=0)
    rate_bytes: int = Field(ge=0)
    """Copied in a second, lately."""
    problem: str = ""
    """What keeps it from going on; empty if nothing does."""
    freed: bool = False
    """Whether the volume on the source has been deleted, after everything was copied."""


class CopyOrders(Document):
    """The answer to a report."""

    state: CopyState
    bandwidth_bytes: int | None = None
    """Most that may be copied in a second; None for as much as the client leaves."""
    present_bytes: int
    total_bytes: int
    client_commands: int = 0
    """Commands that the client has begun here so far: copying gives way to one that is at work."""


class CopyStatus(Document):
    """`GET /v1/volumes/{name}/copy?device=`: a volume that is copied here while its client uses it."""

    principal: str | None
    """Of the move that this is about, as this VIOS' definition has it; None where that has none any more."""
    present_pages: int
    total_pages: int
    relay_connected: bool
    intermediary: IntermediaryReport | None
    """The last one; None if there was none since this VIOS started."""
    seen_seconds_ago: float | None
    """Since that report."""
    waiting_commands: int
    """Commands of the client that wait for the relay."""
    relayed_reads: int
    kept_pages: int
    """Pages that came over the relay for the client and were kept."""
    filled_pages: int
    """Pages that the intermediate client brought."""
