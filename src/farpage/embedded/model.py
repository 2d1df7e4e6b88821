"""Documents of the set's own control API."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

from farpage.definition.model import Name


class ViosStarted(BaseModel):
    """`POST /v1/vioses/{name}/start`."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    vios: Name
    pid: int
    was_running: bool
