"""Documents of the VIOS control API."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

from farpage.api.model import ErrorAnswer, ErrorBody
from farpage.definition.model import NUMBER_MAX, PAGE_BYTES, DeviceId, Name, PagingCommand

__all__ = [
    "DeviceAdd",
    "DeviceInfo",
    "ErrorAnswer",
    "ErrorBody",
    "HandoverInfo",
    "Health",
    "VolumeCreate",
    "VolumeInfo",
    "VolumeOpen",
]


class Document(BaseModel):
    """Base of the API's documents."""

    model_config = ConfigDict(frozen=True, extra="forbid")


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


class DeviceInfo(Document):
    """`GET /v1/devices`: a device as this VIOS reaches it."""

    id: DeviceId
    name: Name
    kind: str
    spec: str
    access: str
    """How the storage is read and written: `direct`, `buffered`, or what it came to."""
    size_bytes: int
    provisioned_bytes: int
    used_bytes: int
    volumes: int
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
