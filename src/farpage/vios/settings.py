"""What a VIOS is started with."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from farpage.definition.model import Name
from farpage.vios.leases import DEFAULT_LEASE_SECONDS

WORKERS_MAX = 64


class ViosSettings(BaseModel):
    """Settings of `farpage vios run`; addresses as `farpage.address` spells them."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: Name
    state_dir: Path
    """Folder of the database; made if it is not there."""
    control: tuple[str, ...] = Field(min_length=1)
    """Addresses of the control API; TCP ports need `tls`."""
    tls: Path | None = None
    """Folder of the certificates, as `farpage.api.tls` describes it."""
    data: tuple[str, ...] = Field(min_length=1)
    """NBD addresses, UNIX sockets or TCP ports."""
    devices: tuple[str, ...] = ()
    """Specifications of devices to serve, besides those that were added through the API."""
    lease_seconds: float = Field(default=DEFAULT_LEASE_SECONDS, ge=0.1, le=3600)
    """So long after a hypervisor's worker was last heard of are its writes carried out."""
    workers: int = Field(default=1, ge=1, le=WORKERS_MAX)
    """Processes that serve volumes; with 1 the VIOS does so by itself."""
