"""Documents of an intermediate client's control API."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from farpage.definition.model import DeviceId, Name


class IntermediaryStatus(BaseModel):
    """`GET /v1/status`: how far one move is, as its intermediate client sees it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    client: Name
    volume: Name
    source: DeviceId
    target: DeviceId
    pid: int
    relay: str
    state: str
    """What the first VIOS wants: `copying`, `paused`, `retiring`, `gone`; empty before it has answered."""
    complete: bool
    present_bytes: int
    total_bytes: int
    read_bytes: int
    written_bytes: int
    zeroed_bytes: int
    """Bytes of holes: nothing was transferred for them."""
    rate_bytes: int
    """Bytes copied in a second, lately."""
    relayed_connections: int
    relayed_reads: int
    relayed_writes: int
    relayed_in_flight: int
    definition_revision: int
    problem: str
